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

"""The command line, through the fake bus, to real agents."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nova_pmt import exception
from tests.unit.agent.rig import NAME, UUID, Rig, eventually, file_arbiter

Run = Callable[..., Any]

#: What ``status -f json`` promises for each pair: others may be added, none may go.
PAIR_KEYS = {
    "uuid", "name", "role", "host", "state", "reason", "details", "since", "primary_host",
    "standby_host", "generation", "strategy", "options", "desired", "progress", "stats",
    "output_commit", "attempts", "next_attempt_s", "last_error", "worker_pid",
}  # fmt: skip


def refusals() -> list[type[exception.Refusal]]:
    """Every typed refusal that a check can bring."""
    return [
        kind for kind in exception.Refusal.__subclasses__() if kind is not exception.HostUnreachable
    ]


@pytest.mark.parametrize("kind", refusals(), ids=lambda kind: kind.code)
def test_every_refusal_of_the_primary_ends_with_3_and_its_cure(
    rig: Rig, nova_pmt: Run, kind: type[exception.Refusal]
) -> None:
    rig.a.host.refusals = [kind(f"because of {kind.code}")]
    ran = nova_pmt("protect", NAME, "--standby", "b")
    assert ran.status == 3
    assert ran.err == f"error {kind.code}: because of {kind.code}\ncure: {kind.cure}\n"
    assert rig.a.state() is None
    assert rig.a.recorder.events == rig.b.recorder.events == []
    assert rig.a.host.state() == "running"


def test_every_refusal_of_the_standby_is_told_at_once(rig: Rig, nova_pmt: Run) -> None:
    rig.b.host.standby_refusals = [
        exception.TooLittleMemory("1 GiB is missing"),
        exception.UnsupportedKernel("b has Linux 6.1"),
    ]
    ran = nova_pmt("protect", NAME, "--standby", "b")
    assert ran.status == 3
    assert "error TOO_LITTLE_MEMORY: 1 GiB is missing\ncure: Choose" in ran.err
    assert "error UNSUPPORTED_KERNEL: b has Linux 6.1\ncure: The default" in ran.err
    assert rig.a.state() is None


def test_an_unknown_domain_is_refused(nova_pmt: Run) -> None:
    ran = nova_pmt("protect", "nobody", "--standby", "b")
    assert ran.status == 3
    assert ran.err.startswith("error UNKNOWN_DOMAIN: ")
    assert "cure: " in ran.err


def test_the_primarys_own_host_is_refused_as_standby(nova_pmt: Run) -> None:
    ran = nova_pmt("protect", NAME, "--standby", "a")
    assert (ran.status, ran.err.split(":")[0]) == (3, "error SAME_HOST")


def test_a_domain_that_does_not_run_is_refused(rig: Rig, nova_pmt: Run) -> None:
    rig.a.host.define(state="shut")
    ran = nova_pmt("protect", NAME, "--standby", "b")
    assert (ran.status, ran.err.split(":")[0]) == (3, "error NOT_RUNNING")


def test_a_protected_server_is_refused_and_stays_protected(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    generation = rig.generation()
    ran = nova_pmt("protect", NAME, "--standby", "b")
    assert (ran.status, ran.err.split(":")[0]) == (3, "error ALREADY_PROTECTED")
    assert (rig.a.state(), rig.generation()) == ("protected", generation)


def test_a_second_running_copy_is_refused(rig: Rig, nova_pmt: Run) -> None:
    rig.b.host.define()
    ran = nova_pmt("protect", NAME, "--standby", "b", "--host", "a")
    assert (ran.status, ran.err.split(":")[0]) == (3, "error DUPLICATE_DOMAIN")


def test_a_standby_host_that_does_not_answer_ends_with_4(rig: Rig, nova_pmt: Run) -> None:
    rig.b.stop()
    ran = nova_pmt("protect", NAME, "--standby", "b", "--host", "a")
    assert ran.status == 4
    assert ran.err.startswith("error HOST_UNREACHABLE: nova-pmt-agent on b")
    assert rig.a.state() is None


def test_hosts_that_do_not_share_an_arbiter_are_found_out(rig: Rig, nova_pmt: Run) -> None:
    rig.b.stop()
    rig.b.arbiter = file_arbiter(rig.path)
    rig.b.start()
    ran = nova_pmt("check", NAME, "--standby", "b")
    assert ran.status == 3
    assert "error ARBITER_UNAVAILABLE: b does not see" in ran.err


def test_check_tells_that_all_is_well_and_changes_nothing(rig: Rig, nova_pmt: Run) -> None:
    rig.a.host.warnings = ["the clock is not kvm-clock"]
    ran = nova_pmt("check", NAME, "--standby", "b")
    assert (ran.status, ran.err) == (0, "")
    assert "warning: the clock is not kvm-clock" in ran.out
    assert f"{NAME} ({UUID}) on a can be protected with its standby on b" in ran.out
    assert rig.a.recorder.events == rig.b.recorder.events == []


def test_check_for_programs(rig: Rig, nova_pmt: Run) -> None:
    rig.a.host.refusals = [exception.UnsupportedDevice("vfio"), exception.UnsupportedMemory("1G")]
    ran = nova_pmt("check", NAME, "-f", "json")
    assert ran.status == 3
    assert ran.json["ok"] is False
    assert [r["code"] for r in ran.json["refusals"]] == ["UNSUPPORTED_DEVICE", "UNSUPPORTED_MEMORY"]
    assert all(r["cure"] for r in ran.json["refusals"])


def test_protect_shows_the_first_synchronisation_until_it_is_done(rig: Rig, nova_pmt: Run) -> None:
    ran = nova_pmt("protect", NAME, "--standby", "b", "--interval-ms", "20", "--passes", "1")
    assert ran.status == 0
    assert ran.out == f"{NAME} ({UUID}): protected, a -> b\n"
    assert "protected" in ran.err
    assert rig.a.spec("primary")["options"] == {"interval_ms": 20, "passes": 1}


def test_protect_does_not_wait_when_told_so(rig: Rig, nova_pmt: Run) -> None:
    rig.a.behave(primary="stay_syncing")
    ran = nova_pmt("protect", NAME, "--standby", "b", "--no-wait", "-f", "json")
    assert (ran.status, ran.json["state"]) == (0, "syncing")


def test_protect_gives_up_waiting_in_time_and_leaves_it_going_on(rig: Rig, nova_pmt: Run) -> None:
    rig.a.behave(primary="stay_syncing")
    ran = nova_pmt("protect", NAME, "--standby", "b", "--timeout", "1")
    assert ran.status == 1
    assert "syncing 25 % (50 of 200 pages" in ran.err
    assert "error TIMEOUT" in ran.err
    assert rig.a.state() == "syncing"


def test_protect_tells_why_the_worker_could_not_start(rig: Rig, nova_pmt: Run) -> None:
    rig.a.behave(primary="refuse")
    ran = nova_pmt("protect", NAME, "--standby", "b")
    assert ran.status == 1
    assert ran.err == "error CERTIFICATE_REFUSED: wrong CA\ncure: sign it\n"


def test_unprotect(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    ran = nova_pmt("unprotect", UUID)
    assert (ran.status, ran.out) == (0, f"{NAME} ({UUID}): unprotected; it runs on, on a\n")
    assert nova_pmt("unprotect", UUID).err.startswith("error NOT_PROTECTED")


def test_unprotect_on_the_standbys_host_names_the_right_one(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    ran = nova_pmt("unprotect", UUID, "--host", "b")
    assert ran.status == 3
    assert "cure: Send the command there: --host a." in ran.err


def test_list_has_both_sides_of_a_pair(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    ran = nova_pmt("list")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert lines[0].split()[:5] == ["SERVER", "UUID", "HOST", "ROLE", "STATE"]
    assert [line.split()[2:5] for line in lines[1:]] == [
        ["a", "primary", "protected"],
        ["b", "standby", "protected"],
    ]


def test_status_for_programs_keeps_its_schema(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    eventually(lambda: all(h.parts.pairs.get(UUID).stats for h in (rig.a, rig.b)))
    ran = nova_pmt("status", NAME, "-f", "json")
    assert ran.status == 0
    assert set(ran.json) == {"pairs", "recent", "errors"}
    primary, standby = ran.json["pairs"]
    assert set(primary) >= PAIR_KEYS
    assert (primary["role"], standby["role"]) == ("primary", "standby")
    assert (primary["state"], primary["output_commit"]) == ("protected", True)
    assert primary["stats"]["pause_ms"] == {
        "p50": 1.5, "p99": 2.5, "max": 3.0, "mean": 1.6, "last": 1.4
    }  # fmt: skip
    assert standby["stats"]["staging_mib"] == 3.0
    assert (standby["stats"]["disks"], standby["stats"]["disk_bytes_applied"]) == (1, 5 << 20)
    stats = primary["stats"]
    assert stats["output_delay_ms"]["p99"] == 19.0
    (nic,), (disk,) = stats["network"], stats["disks"]
    assert set(nic) >= {
        "nic", "mac", "buffer", "held_bytes", "peak_bytes", "limit_bytes", "dropped_packets",
        "released_bytes",
    }  # fmt: skip
    assert set(disk) >= {"disk", "log_bytes", "log_peak_bytes", "written_bytes"}


def test_status_for_people(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    eventually(lambda: all(h.parts.pairs.get(UUID).stats for h in (rig.a, rig.b)))
    out = " ".join(nova_pmt("status", NAME).out.split())
    for text in (
        f"server {NAME} ({UUID})",
        "output commit yes",
        "output delay ms p50/p99 7.2/19.0",
        "nic 52:54:00:00:00:0a redirector, holds 0.50 of 64 MiB (peak 3.00)",
        "disk vda log 0.25 MiB (peak 2.00), 5.0 MiB replicated",
        "written to disks MiB 5.0",
        "pause ms p50/p99/max 1.50/2.50/3.0",
        "cache MiB used/backed/limit 4.0/8.0/512",
        "delta cache MiB 1.5",
        "compression zstd -1: pages to 41%",
        "MB/s 80.0",
        "last commit 31 ms ago",
        "staging MiB 3.0",
    ):
        assert text in out


def test_status_remembers_a_failover(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    assert nova_pmt("failover", NAME, "--yes").status == 0
    eventually(lambda: rig.b.recent() == "standby_active")
    out = nova_pmt("status", NAME, "--host", "b").out
    assert "standby_active, a -> b; failed over; failover_ms 42" in out


def test_status_of_a_server_that_is_in_no_pair_is_refused(nova_pmt: Run) -> None:
    ran = nova_pmt("status", NAME)
    assert (ran.status, ran.err.count("error")) == (3, 1)
    assert ran.err.startswith("error NOT_PROTECTED")


def test_a_host_that_is_down_does_not_hide_the_others(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    rig.b.stop()
    ran = nova_pmt("list", "-f", "json")
    assert ran.status == 4
    assert [pair["host"] for pair in ran.json["pairs"]] == ["a"]
    assert ran.json["errors"]["b"]["code"] == "HOST_UNREACHABLE"
    assert json.loads(ran.err)["error"]["code"] == "HOST_UNREACHABLE"


def test_top_shows_one_line_for_each_primary(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    eventually(lambda: rig.a.parts.pairs.get(UUID).stats)
    ran = nova_pmt("top", "--once")
    assert ran.status == 0
    head, line = ran.out.splitlines()
    assert "PAUSE ms p50" in head
    assert "DELAY ms" in head
    assert line.split() == [
        NAME, "a", "b", "protected", "12", "1.50", "2.50", "7.2", "1000", "80.0", "4.0/512", "1",
        "31",
    ]  # fmt: skip
    rows = nova_pmt("top", "-n", "1", "-f", "json").json["pairs"]
    assert rows[0]["stats"]["in_flight"] == 1
    assert rows[0]["stats"]["output_delay_ms"]["p50"] == 7.25
    assert rows[0]["stats"]["network"][0]["held_bytes"] == 1 << 19
    assert rows[0]["stats"]["disks"][0]["disk"] == "vda"


def test_failover_tells_where_the_server_runs(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    ran = nova_pmt("failover", NAME, "--yes")
    assert ran.status == 0
    assert f"{NAME} ({UUID}) runs on b, after" in ran.out
    assert rig.b.host.state() == "running"


def test_failover_asks_first_and_refuses_without_a_terminal(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    ran = nova_pmt("failover", NAME)
    assert ran.status == 2
    assert "cure: Add --yes." in ran.err
    assert rig.a.state() == "protected"


def test_a_forced_failover_goes_to_the_standbys_host(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    ran = nova_pmt("failover", NAME, "--force", "--yes", "-f", "json")
    assert (ran.status, ran.json["active_host"]) == (0, "b")
    eventually(lambda: rig.a.recent() == "standby_active")


def test_failover_on_a_healthy_standby_is_refused_with_the_cure(rig: Rig, nova_pmt: Run) -> None:
    rig.protect()
    ran = nova_pmt("failover", NAME, "--host", "b", "--yes")
    assert ran.status == 3
    assert f"cure: For a planned move: nova-pmt failover {UUID} --host a" in ran.err


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("protect", NAME),
        ("protect", "a/b", "--standby", "b"),
        ("protect", NAME, "--standby", "b c"),
        ("protect", NAME, "--standby", "b", "--interval-ms", "1"),
        ("protect", NAME, "--standby", "b", "--max-pause-ms", "nan"),
        ("protect", NAME, "--standby", "b", "--passes", "two"),
        ("top", "-n", "0"),
        ("status", "-f", "xml"),
    ],
)
def test_bad_usage_ends_with_2(nova_pmt: Run, argv: tuple[str, ...]) -> None:
    ran = nova_pmt(*argv)
    assert ran.status == 2
    assert "usage: nova-pmt" in ran.err


def test_without_known_hosts_it_says_how_to_name_them(rig: Rig, nova_pmt: Run) -> None:
    rig.config.write_text("[DEFAULT]\ntransport_url = fake://\n")
    ran = nova_pmt("list")
    assert ran.status == 1
    assert "[client] hosts" in ran.err


def test_a_configuration_that_is_not_there_is_an_error_with_a_cure(rig: Rig, nova_pmt: Run) -> None:
    rig.config.unlink()
    ran = nova_pmt("list")
    assert ran.status == 1
    assert ran.err.startswith("error CONFIG_ERROR")


def test_two_servers_of_one_name_must_be_named_by_uuid(rig: Rig, nova_pmt: Run) -> None:
    rig.b.host.define(uuid=UUID[:-1] + "0")
    ran = nova_pmt("check", NAME)
    assert ran.status == 3
    assert "cure: Name the server by its UUID." in ran.err
    assert nova_pmt("check", UUID).status == 0


def test_names_and_reasons_cannot_steer_the_terminal(rig: Rig, nova_pmt: Run) -> None:
    rig.a.host.refusals = [exception.UnsupportedDevice("\x1b[2Jgone [red]text[/red]")]
    ran = nova_pmt("check", NAME)
    assert "\x1b" not in ran.err + ran.out
    assert "[red]text[/red]" in ran.err


def test_help_has_examples_and_the_exit_codes(nova_pmt: Run) -> None:
    ran = nova_pmt("--help")
    assert ran.status == 0
    assert "nova-pmt protect web1 --standby compute2" in ran.out
    assert "exit status: 0 ok" in ran.out
