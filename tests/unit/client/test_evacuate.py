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

"""``nova-pmt evacuate-host``: real agents and workers, a real manager."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.client import evacuate
from tests.unit.agent.rig import NAME, UUID, Rig, eventually
from tests.unit.client.managed import OTHER, OTHER_NAME, Managed

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evacuate, "_POLL_S", 0.05)


@pytest.fixture
def two(managed: Managed, rig: Rig) -> Managed:
    """Two protected guests on host a."""
    rig.protect()
    rig.a.host.define(uuid=OTHER, name=OTHER_NAME)
    rig.api.protect("a", OTHER, "b")
    eventually(lambda: managed.state() == managed.state(OTHER) == "protected")
    return managed


class Failovers:
    """What the command asks of agents, one call after the other or at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = AgentAPI.failover
        self.calls: list[str] = []
        self.under_way = 0
        self.most = 0
        self.before: Callable[[str], None] = lambda uuid: None
        calls = self

        def failover(api: AgentAPI, host: str, domain: str, force: bool = False) -> Any:
            calls.calls.append(domain)
            calls.under_way += 1
            calls.most = max(calls.most, calls.under_way)
            try:
                assert not force
                calls.before(domain)
                return calls.real(api, host, domain)
            finally:
                calls.under_way -= 1

        monkeypatch.setattr(AgentAPI, "failover", failover)


@pytest.fixture
def failovers(monkeypatch: pytest.MonkeyPatch) -> Failovers:
    return Failovers(monkeypatch)


def test_all_guests_go_to_their_standbys_one_after_the_other(
    two: Managed, rig: Rig, nova_pmt: Run, failovers: Failovers
) -> None:
    ran = nova_pmt("evacuate-host", "a")
    assert (ran.status, ran.out) == (0, "a: 2 guests moved, 0 left\n")
    assert (sorted(failovers.calls), failovers.most) == ([OTHER, UUID], 1)
    told = ran.err.splitlines()
    assert told[0] == "a: in maintenance"
    assert told[1] == f"{NAME} ({UUID}): moves, a -> b"
    assert told[2].startswith(f"{NAME} ({UUID}): runs on b, after ")
    assert [rig.b.host.state(uuid) for uuid in (UUID, OTHER)] == ["running", "running"]
    (a,) = [host for host in two.database.hosts() if host.name == "a"]
    assert a.maintenance


def test_several_go_at_once_when_asked_so(
    two: Managed, nova_pmt: Run, failovers: Failovers
) -> None:
    failovers.before = lambda _uuid: eventually(lambda: len(failovers.calls) == 2)
    ran = nova_pmt("evacuate-host", "a", "--at-once", "2")
    assert (ran.status, failovers.most) == (0, 2)


def test_it_can_be_asked_again(two: Managed, nova_pmt: Run, failovers: Failovers) -> None:
    assert nova_pmt("evacuate-host", "a").status == 0
    ran = nova_pmt("evacuate-host", "a")
    assert (ran.status, ran.out) == (0, "a: 0 guests moved, 0 left\n")
    assert len(failovers.calls) == 2


def test_a_host_without_guests_is_empty_and_its_standbys_are_named(
    two: Managed, nova_pmt: Run, failovers: Failovers
) -> None:
    ran = nova_pmt("evacuate-host", "b")
    assert ran.status == 0
    assert ran.out.splitlines() == [
        "b: 0 guests moved, 0 left",
        f"  standby: {NAME} ({UUID}) of a: it gets another one when b goes",
        f"  standby: {OTHER_NAME} ({OTHER}) of a: it gets another one when b goes",
    ]
    assert failovers.calls == []


def test_a_pair_that_is_not_protected_is_waited_for(
    managed: Managed, rig: Rig, nova_pmt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.protect()
    eventually(lambda: managed.state() == "protected")
    rig.b.kill_worker()
    eventually(lambda: managed.state() != "protected")
    ran = nova_pmt("evacuate-host", "a")
    assert (ran.status, ran.out) == (0, "a: 1 guests moved, 0 left\n")
    assert f"{NAME} ({UUID}): waits: it is " in ran.err


def test_what_is_not_protected_in_time_is_named_and_fails(
    managed: Managed, rig: Rig, nova_pmt: Run, failovers: Failovers
) -> None:
    rig.a.behave(primary="stay_syncing")
    rig.api.protect("a", NAME, "b")
    eventually(lambda: managed.state() == "syncing")
    ran = nova_pmt("evacuate-host", "a", "--timeout", "1")
    assert ran.status == 1
    assert ran.out.splitlines()[0] == "a: 0 guests moved, 1 left"
    assert f"  left: {NAME} ({UUID}): syncing; " in ran.out
    assert "error HOST_NOT_EMPTY: 1 guests of pairs are still on a" in ran.err
    assert ran.err.count("waits: ") == 1
    assert failovers.calls == []


def test_a_move_that_fails_is_tried_again_for_some_times(
    managed: Managed, rig: Rig, nova_pmt: Run, failovers: Failovers
) -> None:
    rig.protect()
    eventually(lambda: managed.state() == "protected")

    def fail(_uuid: str) -> None:
        raise exception.GuestError("no final round", code="SWITCHOVER_FAILED", cure="again")

    failovers.before = fail
    ran = nova_pmt("evacuate-host", "a", "--json")
    assert ran.status == 1
    (left,) = ran.json["left"]
    assert (left["attempts"], left["error"]["code"]) == (3, "SWITCHOVER_FAILED")
    assert (ran.json["moved"], len(failovers.calls)) == ([], 3)
    assert ran.err.count("was not moved") == 1
    assert '"code": "HOST_NOT_EMPTY"' in ran.err


def test_a_move_that_somebody_else_began_is_waited_for(
    managed: Managed, rig: Rig, nova_pmt: Run, failovers: Failovers
) -> None:
    rig.protect()
    eventually(lambda: managed.state() == "protected")

    def busy(uuid: str) -> None:
        if len(failovers.calls) < 6:
            raise exception.NotReady("it is switching_over")

    failovers.before = busy
    ran = nova_pmt("evacuate-host", "a")
    assert (ran.status, len(failovers.calls)) == (0, 6)


def test_a_pair_that_only_the_managers_know_is_not_taken_for_moved(
    managed: Managed, rig: Rig, nova_pmt: Run
) -> None:
    rig.a.host.define(uuid=OTHER, name=OTHER_NAME)
    managed.remember()
    managed.database.transition(OTHER, 7, "protected", host="a")
    ran = nova_pmt("evacuate-host", "a", "--json")
    assert ran.status == 1
    assert ran.json["left"][0]["error"]["code"] == "NOT_PROTECTED"


def test_a_domain_that_is_not_there_does_not_keep_a_host(managed: Managed, nova_pmt: Run) -> None:
    managed.remember()
    managed.database.transition(OTHER, 7, "protected", host="a")
    ran = nova_pmt("evacuate-host", "a")
    assert (ran.status, ran.out) == (0, "a: 0 guests moved, 0 left\n")
    assert "[UNKNOWN_DOMAIN]" in ran.err


def test_a_pair_that_the_managers_do_not_know_is_moved_too(
    managed: Managed, rig: Rig, nova_pmt: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(managed.database, "begin", lambda arrangement: None)
    rig.protect()
    ran = nova_pmt("evacuate-host", "a")
    assert (ran.status, managed.state()) == (0, None)
    assert ran.out == "a: 1 guests moved, 0 left\n"


def test_an_agent_that_does_not_answer_ends_with_4(
    managed: Managed, rig: Rig, nova_pmt: Run
) -> None:
    rig.a.stop()
    ran = nova_pmt("evacuate-host", "a")
    assert ran.status == 4
    assert "error HOST_UNREACHABLE: nova-pmt-agent on a: " in ran.err


def test_ctrl_c_does_not_wait_for_a_move_and_says_that_it_goes_on(
    managed: Managed, rig: Rig, nova_pmt: Run, failovers: Failovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.protect()
    eventually(lambda: managed.state() == "protected")
    interrupted = threading.Event()
    failovers.before = lambda _uuid: interrupted.wait(10) and None

    def interrupt(_work: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evacuate._Evacuation, "_collect", interrupt)
    ran = nova_pmt("evacuate-host", "a")
    interrupted.set()
    assert (ran.status, ran.out) == (130, "")
    assert f"{NAME} ({UUID}): its move goes on" in ran.err
    eventually(lambda: rig.b.recent() == "standby_active")


def test_managers_that_go_away_meanwhile_are_waited_for(
    two: Managed, nova_pmt: Run, failovers: Failovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(uuid: str) -> None:
        if len(failovers.calls) == 1:
            two.stop()

    real = evacuate._Evacuation._look

    def look(work: Any, tolerant: bool) -> None:
        real(work, tolerant)
        if work._silent:
            two.start()

    failovers.before = away
    monkeypatch.setattr(evacuate._Evacuation, "_look", look)
    ran = nova_pmt("evacuate-host", "a")
    assert (ran.status, ran.out) == (0, "a: 2 guests moved, 0 left\n")
    assert ran.err.count("error HOST_UNREACHABLE: nova-pmt-manager") == 1
