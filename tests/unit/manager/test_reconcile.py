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

"""What a host does not tell of, though it should: found by what runs there."""

from __future__ import annotations

import pytest

from nova_pmt import exception
from nova_pmt.arbiter.base import Arrangement
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.service import ManagerService

UUID = "5a2f3c1e-0000-4000-8000-0000000000bb"


@pytest.fixture
def service(database: Database) -> ManagerService:
    database.begin(Arrangement(UUID, "web1", 1, "a", "b"))
    database.transition(UUID, 1, "protected", host="a")
    return ManagerService(database)


def state(service: ManagerService) -> str:
    return str(service.pair(UUID)["state"])


TOLD = [{"uuid": UUID, "generation": 1, "role": "primary", "state": "protected"}]


def test_a_pair_that_its_agent_knows_nothing_of_is_noticed(service: ManagerService) -> None:
    for _ in range(2):
        service.beat("a", {}, [], [UUID])
        assert state(service) == "protected", "it may just have begun"
    service.beat("a", {}, [], [UUID])
    assert state(service) == "primary_alone"
    assert service.claim(UUID, 1, "standby") is False


def test_a_guest_that_is_gone_as_well_leaves_its_standby_the_choice(
    service: ManagerService,
) -> None:
    for _ in range(3):
        service.beat("a", {}, [], [])
    assert state(service) == "error"
    assert service.claim(UUID, 1, "standby") is True


def test_being_told_of_once_is_enough(service: ManagerService) -> None:
    for _ in range(4):
        service.beat("a", {}, [], [UUID])
        service.beat("a", {}, [], [UUID])
        service.beat("a", {}, TOLD, [UUID])
    assert state(service) == "protected"


def test_a_host_that_does_not_say_what_runs_is_not_concluded_from(
    service: ManagerService,
) -> None:
    for _ in range(5):
        service.beat("a", {}, [])
        service.beat("b", {}, [], [])
    assert state(service) == "protected"


def test_a_primary_that_died_before_its_first_commit_can_be_started_again(
    service: ManagerService, database: Database
) -> None:
    """Its standby has given up, and nobody else would ever close the generation."""
    for _ in range(4):
        service.beat("a", {}, TOLD, [UUID])
        service.beat("b", {}, [], [])
    assert state(service) == "protected", "its primary lives, and says so"
    (heard,) = [one for one in database.hosts() if one.name == "a"]
    assert database.judge("a", heard.beats, False, "silent")
    for _ in range(3):
        service.beat("b", {}, [], [])
    assert state(service) == "primary_alone"
    assert service.claim(UUID, 1, "standby") is False


def test_a_standby_that_is_there_may_still_go_on(
    service: ManagerService, database: Database
) -> None:
    waits = [{"uuid": UUID, "generation": 1, "role": "standby", "state": "protected"}]
    for _ in range(5):
        service.beat("b", {}, waits, [])
    assert state(service) == "protected"
    for _ in range(5):
        service.beat("b", {}, [], [UUID])
    assert state(service) == "protected"
    assert service.claim(UUID, 1, "standby") is True


def test_a_standby_that_won_and_runs_need_not_say_so(service: ManagerService) -> None:
    service.claim(UUID, 1, "standby")
    service.beat("b", {}, [], [])
    assert state(service) == "failing_over", "it does not run yet"
    service.beat("a", {}, [], [UUID])
    assert state(service) == "failing_over", "that is the side which lost"
    service.beat("b", {}, [], [UUID])
    assert state(service) == "standby_active"


@pytest.mark.parametrize("running", ["x", 7, {}, ["x"] * 10_001])
def test_a_bad_list_is_refused(service: ManagerService, running: object) -> None:
    with pytest.raises(exception.InvalidInput):
        service.beat("a", {}, [], running)
