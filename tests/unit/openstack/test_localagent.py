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


from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.agent import presence
from nova_pmt.openstack.nova.localagent import LocalAgent

UUID = "5d6c0c3e-5a1b-4c7d-9a53-0123456789ab"


class Others:
    """Agents and managers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[Any] = []

    def _answer(self, *call: Any) -> Any:
        self.calls.append(call)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def unprotect(self, host: str, domain: str) -> dict[str, Any]:
        return self._answer("unprotect", host, domain)  # type: ignore[no-any-return]

    def status(self, host: str, domain: str | None = None) -> dict[str, Any]:
        return self._answer("status", host, domain)  # type: ignore[no-any-return]

    def release_standby(
        self, host: str, *, uuid: str, generation: int, forget: bool = False
    ) -> dict[str, Any]:
        return self._answer("release", host, uuid, generation, forget)  # type: ignore[no-any-return]

    def pair(self, domain: str) -> dict[str, Any]:
        return self._answer("pair", domain)  # type: ignore[no-any-return]


class Rig:
    def __init__(self, tmp_path: Path) -> None:
        self.directory = str(tmp_path)
        self.others = Others()
        self.now = 100.0
        self.agent = LocalAgent(
            "b",
            self.directory,
            self.others,
            self.others,
            lambda: self.now,
            lambda: self.now,
            self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def tells(self, role: str | None = None) -> None:
        pairs = {UUID: role} if role else {}
        presence.write(
            presence.path(self.directory), presence.Presence(os.getpid(), self.now, pairs=pairs)
        )


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_host_without_an_agent_has_no_pairs(rig: Rig) -> None:
    assert rig.agent.presence() is None
    assert rig.agent.role(UUID) is None
    assert rig.agent.unprotect(UUID) is False  # workers ended with their agent
    assert rig.others.calls == []


def test_an_agent_that_hangs_is_dead_and_its_file_is_not_read_for_each_event(rig: Rig) -> None:
    rig.tells("primary")
    assert rig.agent.role(UUID) == "primary"
    rig.tells("standby")
    assert rig.agent.role(UUID) == "primary"
    rig.now += 1
    assert rig.agent.role(UUID) == "standby"
    rig.now += 10
    assert rig.agent.role(UUID) is None


def test_what_was_protected_is_remembered(rig: Rig) -> None:
    rig.tells("primary")
    assert rig.agent.role(UUID) == "primary"
    rig.now += 1
    rig.tells()
    assert rig.agent.role(UUID) is None
    assert rig.agent.was_primary(UUID)
    assert not rig.agent.was_primary("other")


def test_protection_ends(rig: Rig) -> None:
    rig.tells()
    rig.others.answers = [{}]
    assert rig.agent.unprotect(UUID) is True
    assert rig.others.calls == [("unprotect", "b", UUID)]


@pytest.mark.parametrize("kind", [exception.NotProtected, exception.UnknownDomain])
def test_what_is_not_protected_needs_no_end(rig: Rig, kind: type[exception.PmtError]) -> None:
    rig.tells()
    rig.others.answers = [kind("there is none")]
    assert rig.agent.unprotect(UUID) is False


def test_protection_that_may_go_on_is_an_error(rig: Rig) -> None:
    rig.tells()
    rig.others.answers = [exception.HostUnreachable("no answer")]
    with pytest.raises(exception.HostUnreachable):
        rig.agent.unprotect(UUID)


def test_the_standby_that_is_ended_is_the_newest(rig: Rig) -> None:
    rig.others.answers = [{"pairs": [{"generation": 7}]}, {"gone": True}]
    assert rig.agent.end_standby(UUID) is True
    assert rig.others.calls[-1] == ("release", "b", UUID, 7, True)
    rig.others.answers = [exception.NotProtected("none"), {"gone": False}]
    assert rig.agent.end_standby(UUID) is False


@pytest.mark.parametrize(
    ("state", "winner", "active", "verdict"),
    [
        ("unprotected", "", "a", ("free", "")),
        ("protected", "", "a", ("open", "c")),
        ("syncing", "", "a", ("open", "c")),
        ("failing_over", "standby", "c", ("open", "c")),
        ("standby_active", "standby", "c", ("elsewhere", "c")),
        ("standby_active", "standby", "b", ("free", "")),
        ("primary_alone", "primary", "b", ("free", "")),
        ("primary_alone", "primary", "a", ("free", "")),  # which Nova knows to be down
        ("error", "", "b", ("open", "c")),
        ("error", "primary", "b", ("free", "")),
    ],
)
def test_whether_a_guest_may_start_here(
    rig: Rig, state: str, winner: str, active: str, verdict: tuple[str, str]
) -> None:
    rig.others.answers = [
        {"state": state, "winner": winner, "active_host": active, "standby_host": "c"}
    ]
    assert rig.agent.verdict(UUID, dead="a") == verdict


def test_without_an_answer_nobody_knows(rig: Rig) -> None:
    rig.others.answers = [exception.HostUnreachable("no answer")]
    assert rig.agent.verdict(UUID) == ("unknown", "")
    rig.others.answers = [exception.NotProtected("never")]
    assert rig.agent.verdict(UUID) == ("free", "")
    rig.others.answers = [exception.NotProtected("never")]
    assert rig.agent.active_host(UUID) is None


@pytest.mark.parametrize(("refusals", "works"), [(3, True), (1000, False)])
def test_a_worker_that_is_just_being_started_is_waited_for(
    rig: Rig, refusals: int, works: bool
) -> None:
    rig.tells("primary")
    rig.others.answers = [exception.NotReady("it is being started")] * refusals + [{}]
    if works:
        assert rig.agent.unprotect(UUID) is True
    else:
        with pytest.raises(exception.NotReady):
            rig.agent.unprotect(UUID)
        assert rig.others.answers, "not for ever"


def test_without_a_bus_nothing_is_protected(tmp_path: Path) -> None:
    alone = LocalAgent("b", str(tmp_path), None, None)
    assert alone.unprotect(UUID) is False
    assert alone.verdict(UUID) == ("free", "")
    with pytest.raises(exception.HostUnreachable):
        alone.end_standby(UUID)
