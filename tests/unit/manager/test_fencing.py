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

"""No standby goes on before its primary's host is off, where an operator wants it so."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.arbiter.base import Side
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.fencing import CommandFence, Fence, Fencing, NoFence
from nova_pmt.manager.service import ManagerService
from tests.unit.manager.database_cases import FIRST, UUID, protected, state, step


class Switch(Fence):
    """A power switch that does what the test says."""

    def __init__(self, conf: Any = None) -> None:
        self.asked: list[str] = []
        self.works = threading.Event()
        self.error: exception.FencingFailed | None = None

    def fence(self, host: str) -> None:
        self.asked.append(host)
        assert self.works.wait(30)
        if self.error is not None:
            raise self.error


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def fencing(switch: Switch, now: list[float]) -> Iterator[Fencing]:
    found = Fencing(switch, remember_s=30.0, clock=lambda: now[0])
    yield found
    switch.works.set()
    found.close()


def demanded(fencing: Fencing, host: str) -> None:
    """Ask, as a standby does, until the switch has done it or has failed."""
    while True:
        try:
            return fencing.demand(host)
        except exception.FencingFailed as error:
            if "being turned off" not in str(error):
                raise
            time.sleep(0.001)


def test_a_claim_is_asked_again_until_the_host_is_off(fencing: Fencing, switch: Switch) -> None:
    for _ in range(3):
        with pytest.raises(exception.FencingFailed, match="being turned off"):
            fencing.demand("a")
    switch.works.set()
    demanded(fencing, "a")
    assert switch.asked == ["a"]


def test_claims_of_many_pairs_turn_a_host_off_once(fencing: Fencing, switch: Switch) -> None:
    for _ in range(5):
        with pytest.raises(exception.FencingFailed):
            fencing.demand("a")
    with pytest.raises(exception.FencingFailed):
        fencing.demand("b")
    switch.works.set()
    demanded(fencing, "a")
    demanded(fencing, "b")
    assert sorted(switch.asked) == ["a", "b"]


def test_a_host_that_was_off_long_ago_may_be_on_again(
    fencing: Fencing, switch: Switch, now: list[float]
) -> None:
    switch.works.set()
    demanded(fencing, "a")
    now[0] += 29
    demanded(fencing, "a")
    assert switch.asked == ["a"]
    now[0] += 2
    demanded(fencing, "a")
    assert switch.asked == ["a", "a"]


def test_a_failure_is_told_and_tried_again(fencing: Fencing, switch: Switch) -> None:
    switch.works.set()
    switch.error = exception.FencingFailed("a: the switch is broken")
    with pytest.raises(exception.FencingFailed, match="broken"):
        demanded(fencing, "a")
    switch.error = None
    with contextlib.suppress(exception.FencingFailed):  # it may be told once more
        demanded(fencing, "a")
    demanded(fencing, "a")


def test_without_a_fence_nobody_waits() -> None:
    fencing = Fencing(NoFence(None))
    fencing.demand("a")
    fencing.close()


# -- claims -----------------------------------------------------------------------------


@pytest.fixture
def service(database: Database, fencing: Fencing) -> ManagerService:
    """Of a pair that is protected, from a to b."""
    protected(database)
    return ManagerService(database, fencing)


def won(service: ManagerService, side: Side = "standby", **told: Any) -> bool:
    """Claim, as a side does, until there is an answer."""
    while True:
        try:
            return service.claim(UUID, 1, side, "the link is cut", **told)
        except exception.FencingFailed as error:
            if "being turned off" not in str(error):
                raise
            time.sleep(0.001)


def refused(service: ManagerService) -> None:
    with pytest.raises(exception.FencingFailed, match="a is being turned off"):
        service.claim(UUID, 1, "standby")


def test_a_primary_that_comes_back_while_it_is_turned_off_has_lost(
    service: ManagerService, database: Database, switch: Switch
) -> None:
    """It would win and be turned off all the same, and the standby would end: nobody is left."""
    refused(service)
    assert service.claim(UUID, 1, "primary") is False
    assert service.winner(UUID, 1) is None, "nobody acts on it before the host is off"
    assert state(database) == "protected"
    switch.works.set()
    assert won(service) is True
    assert service.claim(UUID, 1, "primary") is False
    assert (service.winner(UUID, 1), state(database)) == ("standby", "failing_over")
    assert switch.asked == ["a"]


def test_a_primary_that_won_first_is_not_turned_off(
    service: ManagerService, switch: Switch
) -> None:
    assert service.claim(UUID, 1, "primary") is True
    assert service.claim(UUID, 1, "standby") is False
    assert switch.asked == []


def test_nobody_waits_for_the_switch(service: ManagerService) -> None:
    before = time.monotonic()
    for _ in range(20):
        refused(service)
    assert time.monotonic() - before < 10


def test_what_the_switch_failed_with_is_told_and_the_standby_asks_on(
    service: ManagerService, switch: Switch
) -> None:
    switch.error = exception.FencingFailed("a: the switch is broken")
    switch.works.set()
    for _ in range(3):
        with pytest.raises(exception.FencingFailed, match="broken"):
            won(service)
        assert service.claim(UUID, 1, "primary") is False
        assert service.winner(UUID, 1) is None
    switch.error = None
    with contextlib.suppress(exception.FencingFailed):  # it may be told once more
        won(service)
    assert won(service) is True


def test_a_primary_that_says_itself_that_it_stands_still_is_not_turned_off(
    service: ManagerService, switch: Switch
) -> None:
    assert service.claim(UUID, 1, "standby", "planned", other_stopped=True) is True
    assert switch.asked == []


def test_a_standby_whose_primary_says_so_later_need_not_wait_for_the_switch(
    service: ManagerService,
) -> None:
    refused(service)
    assert service.claim(UUID, 1, "primary", "it said BYE", other_stopped=True) is False
    assert service.claim(UUID, 1, "standby", "planned", other_stopped=True) is True


def test_another_manager_keeps_to_it(
    service: ManagerService, database: Database, switch: Switch
) -> None:
    refused(service)
    fencing = Fencing(switch)
    other = ManagerService(database, fencing)
    assert other.claim(UUID, 1, "primary") is False
    switch.works.set()
    assert won(other) is True
    assert won(service) is True
    fencing.close()


def test_without_a_fence_nothing_is_reserved(database: Database) -> None:
    protected(database)
    fencing = Fencing(NoFence(None))
    assert ManagerService(database, fencing).claim(UUID, 1, "standby") is True
    assert [row.kind for row in database.events(uuid=UUID)][-1] == "claim"
    assert "reserved" not in [row.kind for row in database.events(uuid=UUID)]
    fencing.close()


def test_what_the_primary_that_lost_reports_changes_nothing(
    service: ManagerService, database: Database, switch: Switch
) -> None:
    refused(service)
    for told in ("primary_alone", "unprotected", "ended"):
        report = {"uuid": UUID, "generation": 1, "role": "primary", "state": told}
        service.beat("a", {}, [report])
        assert state(database) == "protected"
    step(database, "error")
    service.beat("a", {}, [{"uuid": UUID, "generation": 1, "role": "primary", "state": "ended"}])
    assert state(database) == "error"
    switch.works.set()
    assert won(service) is True


def test_an_operator_gives_up_what_waits_for_a_switch_that_never_works(
    service: ManagerService, database: Database
) -> None:
    refused(service)
    with pytest.raises(exception.NotProtected, match="nothing waits"):
        service.release(UUID)
    step(database, "error")
    assert service.release(UUID)["state"] == "unprotected"
    assert service.claim(UUID, 1, "standby") is False
    assert service.claim(UUID, 1, "primary") is False
    assert database.begin(replace(FIRST, generation=2, primary_host="c")).state == "checking"
    assert service.claim(UUID, 1, "standby") is False


# -- the command ------------------------------------------------------------------------


def conf(command: str, timeout_s: float = 10.0) -> Any:
    return SimpleNamespace(
        manager=SimpleNamespace(fence_command=command, fence_timeout_s=timeout_s)
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fence it"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/seen\n[ "$2" != bad ]\n')
    path.chmod(0o755)
    return path


def test_the_command_gets_the_host_as_its_last_argument(script: Path) -> None:
    CommandFence(conf(f"'{script}' off")).fence("compute7")
    assert (script.parent / "seen").read_text() == "off compute7\n"


def test_a_status_other_than_0_says_that_it_is_not_off(script: Path) -> None:
    with pytest.raises(exception.FencingFailed, match="ended with 1"):
        CommandFence(conf(f"'{script}' off")).fence("bad")


@pytest.mark.parametrize("command", ["/no/such/program", "sleep 30"])
def test_a_command_that_is_not_there_or_hangs_has_failed(command: str) -> None:
    with pytest.raises(exception.FencingFailed):
        CommandFence(conf(command, 0.2)).fence("1")


def test_an_empty_command_is_refused_at_the_start() -> None:
    with pytest.raises(exception.ConfigError, match="fence_command"):
        CommandFence(conf(""))
