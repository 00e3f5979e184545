#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Commands that ask the managers: through the fake bus, to a real manager and its database."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nova_pmt.client import managers
from tests.unit.agent.rig import NAME, UUID, Rig, eventually
from tests.unit.client.managed import OTHER, OTHER_NAME, Managed

Run = Callable[..., Any]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.fixture
def protected(managed: Managed, rig: Rig) -> Managed:
    rig.protect()
    eventually(lambda: managed.state() == "protected")
    return managed


# -- pairs ------------------------------------------------------------------------------


def test_pairs_tells_where_each_guest_runs_and_waits(protected: Managed, nova_pmt: Run) -> None:
    protected.remember()
    ran = nova_pmt("pairs")
    assert (ran.status, ran.err) == (0, "")
    head, one, two = words(ran.out)
    assert head == ["SERVER", "UUID", "STATE", "RUNS", "ON", "STANDBY", "SINCE", "REASON"]
    assert one[:5] == [NAME, UUID, "protected", "a", "b"]
    assert two[:5] == [OTHER_NAME, OTHER, "checking", "a", "b"]


def test_pairs_of_one_that_has_gone_on_names_no_standby(managed: Managed, nova_pmt: Run) -> None:
    managed.remember()
    managed.database.claim(OTHER, 7, "standby")
    (_, line) = words(nova_pmt("pairs").out)
    assert line[:5] == [OTHER_NAME, OTHER, "failing_over", "b", "-"]


def test_pairs_can_be_asked_of_a_host_or_a_state(protected: Managed, nova_pmt: Run) -> None:
    protected.remember(primary_host="c", standby_host="d")
    names = [pair["name"] for pair in nova_pmt("pairs", "--host", "d", "--json").json["pairs"]]
    assert names == [OTHER_NAME]
    (pair,) = nova_pmt("pairs", "--state", "protected", "-f", "json").json["pairs"]
    assert (pair["uuid"], pair["active_host"], pair["wanted"]) == (UUID, "a", True)
    assert nova_pmt("pairs", "--state", "error").out.endswith("no pairs\n")


# -- hosts and maintenance --------------------------------------------------------------


def test_hosts_tells_who_lives_and_what_is_there(protected: Managed, nova_pmt: Run) -> None:
    ran = nova_pmt("hosts")
    assert ran.status == 0
    head, a, b = words(ran.out)
    assert head == [
        "HOST", "STATE", "GUESTS", "STANDBYS", "FREE", "MiB", "CPU", "HEARD", "REMARK",
    ]  # fmt: skip
    assert (a[:6], b[:6]) == (
        ["a", "alive", "1", "0", "8192", "EPYC"],
        ["b", "alive", "0", "1", "8192", "EPYC"],
    )
    rows = nova_pmt("hosts", "--json").json["hosts"]
    assert [(row["name"], row["alive"], row["maintenance"]) for row in rows] == [
        ("a", True, False),
        ("b", True, False),
    ]


def test_hosts_shows_what_is_dead_and_what_an_agent_complains_of(
    managed: Managed, nova_pmt: Run
) -> None:
    managed.database.beat("c", {"error": "libvirtd is away"})
    (beats,) = [host.beats for host in managed.database.hosts() if host.name == "c"]
    assert managed.database.judge("c", beats, False, "silent")
    (line,) = [line for line in nova_pmt("hosts").out.splitlines() if line.startswith("c ")]
    assert line.split()[1] == "dead"
    assert line.endswith("libvirtd is away")


def test_maintenance_is_turned_on_and_off_and_can_be_asked_again(
    protected: Managed, nova_pmt: Run
) -> None:
    for _ in range(2):
        ran = nova_pmt("maintenance", "a", "on")
        assert ran.status == 0
        assert ran.out.startswith("a: in maintenance\n  1 guests of pairs and 0 standbys are still")
    assert words(nova_pmt("hosts").out)[1][:3] == ["a", "alive", "maintenance"]
    assert nova_pmt("maintenance", "a", "off").out == "a: in service\n"
    assert nova_pmt("maintenance", "a", "off", "--json").json["maintenance"] is False
    changes = [event.new for event in protected.database.events() if event.host == "a"]
    assert changes.count("maintenance") == changes.count("in service") == 1


@pytest.mark.parametrize("argv", [("maintenance", "x", "on"), ("evacuate-host", "x")])
def test_a_host_that_nobody_heard_of_is_refused(
    managed: Managed, nova_pmt: Run, argv: tuple[str, ...]
) -> None:
    ran = nova_pmt(*argv)
    assert (ran.status, ran.out) == (3, "")
    assert ran.err.startswith("error UNKNOWN_HOST: ")


# -- events -----------------------------------------------------------------------------


def test_events_tells_what_happened_the_oldest_first(protected: Managed, nova_pmt: Run) -> None:
    protected.remember()
    ran = nova_pmt("events", NAME)
    assert ran.status == 0
    assert OTHER not in ran.out
    head, *lines = words(ran.out)
    assert head == ["AT", "SERVER", "GENERATION", "HOST", "WHAT", "CHANGE", "REASON"]
    assert lines[0][2] == UUID
    assert lines[0][4:7] == ["a", "transition", "checking"]
    assert lines[-1][7:9] == ["->", "protected"]


def test_events_can_be_limited_and_are_there_for_programs(managed: Managed, nova_pmt: Run) -> None:
    managed.remember()
    (event,) = nova_pmt("events", "--limit", "1", "--json").json["events"]
    assert (event["pair_uuid"], event["new"], event["kind"]) == (OTHER, "checking", "transition")


def test_events_of_a_server_that_was_never_protected_are_refused(
    managed: Managed, nova_pmt: Run
) -> None:
    ran = nova_pmt("events", "nobody")
    assert (ran.status, ran.err.split(":")[0]) == (3, "error NOT_PROTECTED")


def test_watched_events_come_once_each_as_they_happen(
    managed: Managed, nova_pmt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that a slower manager wrote with a smaller number, after a greater one was seen."""
    managed.remember()
    monkeypatch.setattr(managers, "_WATCH_S", 0.0)
    real, turns = managers._look, []

    def look(session: Any, trail: Any) -> Any:
        turns.append(trail.after)
        if len(turns) == 2:
            managed.database.transition(OTHER, 7, "syncing", host="a")
        if len(turns) == 3:
            managed.database.transition(OTHER, 7, "protected", host="a", reason="[red]x\x1b")
        return real(session, trail)

    monkeypatch.setattr(managers, "_look", look)
    ran = nova_pmt("events", OTHER_NAME, "--watch", "-n", "4")
    assert ran.status == 0
    found = words(ran.out)
    assert [line[-1] for line in found] == ["checking", "syncing", "[red]x?"]
    assert found[1][-5:] == ["a", "transition", "checking", "->", "syncing"]


def test_watched_events_for_programs_are_one_object_in_each_line(
    managed: Managed, nova_pmt: Run
) -> None:
    managed.remember()
    ran = nova_pmt("events", "--watch", "-n", "1", "--json")
    assert [json.loads(line)["kind"] for line in ran.out.splitlines()] == [
        "host", "host", "transition",
    ]  # fmt: skip


def test_watching_survives_managers_that_are_away_for_a_while(
    managed: Managed, nova_pmt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(managers, "_WATCH_S", 0.0)
    real, turns = managers._look, []

    def look(session: Any, trail: Any) -> Any:
        turns.append(len(turns))
        if turns[-1] == 1:
            managed.stop()
        if turns[-1] == 2:
            managed.start()
            managed.remember()
        return real(session, trail)

    monkeypatch.setattr(managers, "_look", look)
    ran = nova_pmt("events", "--watch", "-n", "3")
    assert ran.status == 0
    assert ran.err.startswith("error HOST_UNREACHABLE: nova-pmt-manager: ")
    assert ran.out.splitlines()[-1].endswith("checking")


def trail_of(limit: int, *pages: list[int]) -> list[list[int]]:
    trail = managers._Trail(limit)
    return [[one["id"] for one in trail.new([{"id": n} for n in page])] for page in pages]


def test_a_trail_shows_nothing_twice_and_nothing_that_was_left_out() -> None:
    assert trail_of(2, [8, 9], [1, 7, 8, 9, 10], [10, 11]) == [[8, 9], [10], [11]]
    # a smaller number that is committed later
    assert trail_of(50, [300, 302], [300, 301, 302]) == [[300, 302], [301]]
    assert trail_of(50, [], [1, 2]) == [[], [1, 2]]


def test_a_full_page_goes_on_right_behind_it() -> None:
    trail = managers._Trail(1000)
    trail.new([{"id": number} for number in range(1, 1001)])
    assert trail.after == 1000
    trail.new([{"id": 1001}])
    assert trail.after == 901


# -- without managers, and with them in place of [client] hosts -----------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ("pairs",),
        ("hosts",),
        ("events",),
        ("events", "--watch"),
        ("maintenance", "a", "on"),
        ("evacuate-host", "a"),
    ],
)
def test_without_managers_the_commands_say_what_to_set(
    nova_pmt: Run, argv: tuple[str, ...]
) -> None:
    ran = nova_pmt(*argv)
    assert ran.status == 1
    assert ran.err.startswith("error CONFIG_ERROR: ")
    assert "[manager] enabled = true" in ran.err


def test_managers_that_do_not_answer_end_with_4_and_a_cure_of_their_own(
    managed: Managed, nova_pmt: Run
) -> None:
    managed.stop()
    ran = nova_pmt("pairs")
    assert ran.status == 4
    assert ran.err.startswith("error HOST_UNREACHABLE: nova-pmt-manager: no answer within 5 s")
    assert "cure: Check that nova-pmt-manager runs" in ran.err


@pytest.mark.parametrize(
    "argv",
    [
        ("pairs", "--state", "gone"),
        ("maintenance", "a"),
        ("maintenance", "a", "maybe"),
        ("events", "--limit", "0"),
        ("events", "--limit", "1001"),
        ("evacuate-host",),
        ("evacuate-host", "a", "--at-once", "0"),
        ("evacuate-host", "a b"),
    ],
)
def test_bad_usage_ends_with_2(nova_pmt: Run, argv: tuple[str, ...]) -> None:
    ran = nova_pmt(*argv)
    assert ran.status == 2
    assert "usage: nova-pmt" in ran.err


@pytest.mark.parametrize("name", ["pairs", "hosts", "events", "maintenance", "evacuate-host"])
def test_help_of_each_command_has_examples(nova_pmt: Run, name: str) -> None:
    ran = nova_pmt(name, "--help")
    assert ran.status == 0
    assert f"examples:\n  nova-pmt {name}" in ran.out


def test_the_managers_know_the_hosts_when_the_configuration_does_not(
    managed: Managed, nova_pmt: Run
) -> None:
    ran = nova_pmt("protect", NAME, "--standby", "b")
    assert (ran.status, ran.out) == (0, f"{NAME} ({UUID}): protected, a -> b\n")
    assert [pair["host"] for pair in nova_pmt("list", "--json").json["pairs"]] == ["a", "b"]


def test_a_host_that_is_dead_is_told_of_and_not_waited_for(managed: Managed, nova_pmt: Run) -> None:
    managed.database.beat("c", {})
    assert managed.database.judge("c", 1, False, "silent")
    ran = nova_pmt("list")
    assert ran.status == 4
    assert ran.err.startswith("error HOST_UNREACHABLE: the managers take c for dead")
    assert nova_pmt("check", NAME).status == 0


def test_hosts_of_the_configuration_come_first(managed: Managed, rig: Rig, nova_pmt: Run) -> None:
    managed.stop()
    rig.config.write_text(rig.config.read_text() + "[client]\nhosts = a\n")
    assert nova_pmt("check", NAME).status == 0
