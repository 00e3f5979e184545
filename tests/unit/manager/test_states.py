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

"""The machine of a pair's life holds together."""

from __future__ import annotations

import pytest

from nova_pmt.manager import states
from nova_pmt.manager.states import State


def test_every_state_has_its_steps_and_its_successors_exist() -> None:
    assert set(states.STEPS) == set(states.STATES)
    for new in states.STEPS.values():
        assert new <= set(states.STATES)


def test_every_state_is_reached_and_left() -> None:
    reached: set[State] = {"checking"}  # where a server's first pair begins
    while more := {new for old in reached for new in states.STEPS[old]} - reached:
        reached |= more
    assert reached == set(states.STATES)
    assert all(states.STEPS[state] for state in states.STATES)


def test_a_generation_begins_from_every_state_by_a_step_that_exists() -> None:
    assert set(states.BEGINS) == set(states.STATES) - {"unprotected"} | {"unprotected"}
    for old, new in states.BEGINS.items():
        assert new in states.OPEN
        assert old == new or states.may_follow(old, new)


@pytest.mark.parametrize("new", states.CLAIMED.values())
def test_whoever_wins_an_open_generation_takes_a_step_that_exists(new: State) -> None:
    for old in {*states.OPEN, "error"}:
        assert states.may_follow(old, new)  # type: ignore[arg-type]
    assert new not in states.OPEN


def test_what_agents_report_is_a_state_to_which_there_is_a_step() -> None:
    for new in states.REPORTED.values():
        assert states.before(new)
        assert new not in states.BEGINS.values()


def test_what_is_repaired_runs_and_may_begin_anew() -> None:
    for state in states.BROKEN:
        assert state not in states.OPEN
        assert states.BEGINS[state] == "reprotecting"


def test_the_states_before_one_are_those_it_may_follow() -> None:
    for new in states.STATES:
        assert states.before(new) == {old for old in states.STATES if states.may_follow(old, new)}
