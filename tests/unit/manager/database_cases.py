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

"""What holds on every database: run on SQLite by the unit tests, on MariaDB by the functional ones.

Whoever imports these brings the fixtures ``connect``, ``engine`` and ``database``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from nova_pmt import exception
from nova_pmt.arbiter.base import Arrangement, Side
from nova_pmt.manager import states
from nova_pmt.manager.db import migration, models
from nova_pmt.manager.db.api import MAX_REASON, Database, EventRow
from nova_pmt.manager.db.engine import Engine
from nova_pmt.manager.db.nova import NovaNotes
from nova_pmt.manager.states import State

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
OTHER = "4dea22b3-1d52-d8f3-2516-782e98ab3fa1"
SIDES: tuple[Side, ...] = ("primary", "standby")
FIRST = Arrangement(UUID, "web1", 1, "a", "b", "pmt", {"interval_ms": 25})

Connect = Callable[[], Engine]


def other_side(side: Side) -> Side:
    return "standby" if side == "primary" else "primary"


def at_once(*works: Callable[[], Any], timeout_s: float = 60) -> list[Any]:
    """Call all at the same time, each in a thread; what each returned or raised."""
    barrier = threading.Barrier(len(works))
    answers: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            barrier.wait(timeout_s)
            answers[number] = works[number]()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            answers[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    assert not any(thread.is_alive() for thread in threads)
    return answers


def managers(connect: Connect, count: int) -> list[Database]:
    """As many managers, each with connections of its own."""
    return [Database(connect()) for _ in range(count)]


def story(database: Database, uuid: str = UUID) -> list[tuple[str, int, str, str]]:
    """The audit trail of a pair."""
    rows = database.events(uuid=uuid, limit=1000)
    return [(row.kind, row.generation, row.old, row.new) for row in rows]


def state(database: Database, uuid: str = UUID) -> str:
    pair = database.pair(uuid)
    assert pair is not None
    return pair.state


def protected(database: Database, wanted: Arrangement = FIRST) -> Database:
    """With that pair in state ``protected``."""
    database.begin(wanted)
    assert step(database, "protected", generation=wanted.generation, uuid=wanted.uuid)
    return database


def step(
    database: Database, new: State, *, generation: int = 1, uuid: str = UUID, **arguments: Any
) -> bool:
    return database.transition(uuid, generation, new, **{"host": "a", **arguments})


# -- a generation begins ----------------------------------------------------------------


def test_a_server_that_was_never_protected_begins_with_checking(database: Database) -> None:
    pair = database.begin(FIRST)
    assert database.pair(UUID) == pair
    assert (pair.state, pair.winner, pair.generation, pair.wanted) == ("checking", "", 1, True)
    assert (pair.name, pair.primary_host, pair.standby_host) == ("web1", "a", "b")
    assert (pair.strategy, pair.options, pair.attempts) == ("pmt", {"interval_ms": 25}, 0)
    assert pair.active_host == "a"
    assert story(database) == [("transition", 1, "", "checking")]
    assert database.events()[0].host == "a"


def test_a_beginning_whose_answer_got_lost_is_asked_for_again(database: Database) -> None:
    first = database.begin(FIRST)
    assert database.begin(FIRST) == first
    step(database, "syncing")
    assert database.begin(FIRST).state == "syncing"
    assert len(story(database)) == 2


@pytest.mark.parametrize("generation", [4, 5])
def test_only_a_newer_generation_begins(database: Database, generation: int) -> None:
    database.begin(replace(FIRST, generation=5))
    with pytest.raises(exception.PairMismatch, match="not newer than 5"):
        database.begin(replace(FIRST, generation=generation, standby_host="c"))
    assert len(story(database)) == 1


def test_a_generation_that_was_claimed_does_not_begin_again(database: Database) -> None:
    database.begin(FIRST)
    database.claim(UUID, 1, "standby")
    with pytest.raises(exception.PairMismatch):
        database.begin(FIRST)
    assert database.winner(UUID, 1) == "standby"


@pytest.mark.parametrize("host", ["b", "c"])
@pytest.mark.parametrize("begun", ["checking", "syncing", "protected", "primary_alone"])
def test_no_other_host_begins_while_the_primary_has_the_guest(
    database: Database, begun: State, host: str
) -> None:
    database.begin(FIRST)
    if begun == "primary_alone":
        database.claim(UUID, 1, "primary")
    elif begun != "checking":
        step(database, begun)
    with pytest.raises(exception.PairMismatch, match=f"runs on a: {host} cannot") as caught:
        database.begin(replace(FIRST, generation=2, primary_host=host, standby_host="d"))
    assert "events" in caught.value.cure
    assert state(database) == begun


def test_after_the_standby_won_only_its_host_begins(database: Database) -> None:
    protected(database)
    assert database.claim(UUID, 1, "standby")
    pair = database.pair(UUID)
    assert pair is not None and pair.active_host == "b"
    for host in ("a", "c"):
        with pytest.raises(exception.PairMismatch, match="runs on b"):
            database.begin(replace(FIRST, generation=2, primary_host=host, standby_host="d"))
    pair = database.begin(replace(FIRST, generation=2, primary_host="b", standby_host="c"))
    assert (pair.state, pair.winner, pair.active_host) == ("reprotecting", "", "b")
    assert database.winner(UUID, 1) == "standby"


@pytest.mark.parametrize("begun", ["checking", "syncing", "protected"])
def test_a_new_generation_closes_what_was_open(database: Database, begun: State) -> None:
    database.begin(FIRST)
    if begun != "checking":
        step(database, begun)
    pair = database.begin(replace(FIRST, generation=2, standby_host="c"))
    assert (pair.generation, pair.standby_host, pair.winner) == (2, "c", "")
    assert pair.state == states.BEGINS[begun]
    assert database.winner(UUID, 1) == "primary"
    assert database.claim(UUID, 1, "standby") is False
    assert database.claim(UUID, 1, "primary") is True
    assert database.winner(UUID, 2) is None


def test_a_server_whose_protection_ended_begins_anywhere(database: Database) -> None:
    protected(database)
    step(database, "unprotected")
    pair = database.begin(replace(FIRST, generation=2, primary_host="c", standby_host="a"))
    assert (pair.state, pair.wanted, pair.active_host) == ("checking", True, "c")


@pytest.mark.parametrize(
    ("host", "primary", "standby"),
    [("a", True, False), ("b", False, True), ("c", False, False)],
)
def test_whoever_begins_after_an_error_is_who_had_the_open_generation(
    database: Database, host: str, primary: bool, standby: bool
) -> None:
    """Its agents failed before anybody claimed; the guest may run on any host by now."""
    protected(database)
    step(database, "error")
    database.begin(replace(FIRST, generation=2, primary_host=host, standby_host="d"))
    assert database.claim(UUID, 1, "primary") is primary
    assert database.claim(UUID, 1, "standby") is standby


def test_of_many_that_begin_the_first_generation_all_hear_the_same(
    database: Database, connect: Connect
) -> None:
    databases = managers(connect, 4)
    answers = at_once(*[lambda one=one: one.begin(FIRST) for one in databases * 2])
    assert not [one for one in answers if isinstance(one, Exception)]
    assert len({(one.uuid, one.generation, one.state) for one in answers}) == 1
    assert story(databases[0]) == [("transition", 1, "", "checking")]


def test_of_many_different_beginnings_the_newest_stays(
    database: Database, connect: Connect
) -> None:
    database.begin(FIRST)
    databases = managers(connect, 4)

    def begin(one: Database, generation: int) -> Any:
        return one.begin(replace(FIRST, generation=generation))

    works = [
        lambda one=one, n=2 + n * 4 + k: begin(one, n)
        for n in range(2)
        for k, one in enumerate(databases)
    ]
    answers = at_once(*works)
    for answer in answers:
        assert not isinstance(answer, Exception) or isinstance(answer, exception.PairMismatch)
    pair = database.pair(UUID)
    assert pair is not None and pair.generation == 9
    begun = [generation for _, generation, _, _ in story(database)]
    assert begun == sorted(set(begun))
    for generation in begun[:-1]:
        assert database.winner(UUID, generation) == "primary"


# -- who goes on ------------------------------------------------------------------------


@pytest.mark.parametrize("first", SIDES)
@pytest.mark.parametrize("begun", ["checking", "syncing", "protected", "error"])
def test_the_first_side_that_asks_wins_for_ever(
    database: Database, begun: State, first: Side
) -> None:
    database.begin(FIRST)
    if begun != "checking":
        step(database, begun)
    assert database.winner(UUID, 1) is None
    assert database.claim(UUID, 1, first, "the link is cut") is True
    for _ in range(3):
        assert database.claim(UUID, 1, other_side(first)) is False
        assert database.claim(UUID, 1, first) is True  # an answer that got lost
    assert database.winner(UUID, 1) == first
    pair = database.pair(UUID)
    assert pair is not None
    assert (pair.state, pair.winner) == (states.CLAIMED[first], first)
    assert pair.reason == "the link is cut"
    claims = [row for row in database.events() if row.kind == "claim"]
    assert [(row.old, row.new, row.host, row.reason) for row in claims] == [
        (begun, states.CLAIMED[first], "a" if first == "primary" else "b", "the link is cut")
    ]


def test_each_generation_of_each_pair_is_decided_for_itself(database: Database) -> None:
    protected(database)
    protected(database, replace(FIRST, uuid=OTHER))
    assert database.claim(UUID, 1, "standby")
    assert database.claim(OTHER, 1, "primary")
    database.begin(replace(FIRST, generation=2, primary_host="b", standby_host="a"))
    assert database.claim(UUID, 2, "primary")
    assert database.claim(UUID, 1, "standby")  # long ago, and it stays so
    assert database.claim(UUID, 1, "primary") is False
    assert database.claim(OTHER, 1, "standby") is False


def test_exactly_one_side_of_many_that_ask_at_once_wins(
    database: Database, connect: Connect
) -> None:
    databases = managers(connect, 4)
    for generation in range(1, 6):
        database.begin(replace(FIRST, generation=generation, primary_host="a"))
        asked = [(databases[n // 2], SIDES[n % 2]) for n in range(8)]
        answers = at_once(*[lambda d=d, s=s, g=generation: d.claim(UUID, g, s) for d, s in asked])
        assert not [one for one in answers if isinstance(one, Exception)]
        winner = database.winner(UUID, generation)
        assert answers == [side == winner for _, side in asked]
        assert [e.kind for e in database.events() if e.generation == generation].count("claim") == 1
        if winner == "standby":  # the next one is to be between the same hosts
            step(database, "standby_active", generation=generation)
            step(database, "unprotected", generation=generation)


def test_a_claim_and_the_next_beginning_at_once_never_both_have_the_guest(
    database: Database, connect: Connect
) -> None:
    databases = managers(connect, 2)
    for number in range(6):
        uuid = OTHER[:-1] + str(number)
        protected(database, replace(FIRST, uuid=uuid))
        won, begun = at_once(
            lambda uuid=uuid: databases[0].claim(uuid, 1, "standby"),
            lambda uuid=uuid: databases[1].begin(replace(FIRST, uuid=uuid, generation=2)),
        )
        if won is True:
            assert isinstance(begun, exception.PairMismatch)
        else:
            assert won is False and begun.generation == 2
        assert database.winner(uuid, 1) == ("standby" if won else "primary")


@pytest.mark.parametrize("side", SIDES)
def test_what_the_managers_do_not_know_is_not_decided(database: Database, side: Side) -> None:
    with pytest.raises(exception.ArbiterUnavailable, match="know nothing") as caught:
        database.claim(UUID, 1, side)
    assert not isinstance(caught.value, exception.DatabaseUnavailable)
    assert database.pair(UUID) is None
    database.begin(replace(FIRST, generation=5))
    database.begin(replace(FIRST, generation=7))
    for generation in (4, 6, 8):  # older than the first, between two, newer than the last
        with pytest.raises(exception.ArbiterUnavailable, match=f"generation {generation} "):
            database.claim(UUID, generation, side)
    assert database.winner(UUID, 8) is None
    assert database.winner(OTHER, 1) is None
    # A host whose clock is behind asks so whether a number is free.
    assert database.winner(UUID, 6) is not None


@pytest.mark.parametrize("begun", ["checking", "syncing", "protected"])
def test_after_an_orderly_end_there_is_nothing_to_take_over(
    database: Database, begun: State
) -> None:
    database.begin(FIRST)
    if begun != "checking":
        step(database, begun)
    assert step(database, "unprotected", reason="on request")
    assert database.claim(UUID, 1, "standby") is False
    assert database.claim(UUID, 1, "primary") is True
    assert database.winner(UUID, 1) == "primary"
    assert state(database) == "unprotected"


def test_a_side_that_lost_is_noted_once_however_often_it_asks(database: Database) -> None:
    protected(database)
    database.claim(UUID, 1, "standby")
    for _ in range(5):
        database.claim(UUID, 1, "primary")
    refused = [row for row in database.events() if row.kind == "refused"]
    assert [(row.host, row.new, row.generation) for row in refused] == [("a", "primary", 1)]
    assert "standby has it" in refused[0].reason


def test_whoever_asks_for_a_generation_of_other_hosts_is_not_called_by_theirs(
    database: Database,
) -> None:
    protected(database)
    database.claim(UUID, 1, "standby")
    database.begin(replace(FIRST, generation=2, primary_host="b", standby_host="c"))
    for _ in range(2):
        database.claim(UUID, 1, "primary")
    refused = [row for row in database.events() if row.kind == "refused"]
    assert [(row.host, row.generation) for row in refused] == [("", 1)]


# -- reserved for a standby -------------------------------------------------------------


@pytest.mark.parametrize("begun", ["checking", "syncing", "protected", "error"])
def test_what_is_reserved_only_the_standby_wins(database: Database, begun: State) -> None:
    database.begin(FIRST)
    if begun != "checking":
        step(database, begun)
    for _ in range(3):
        assert database.reserve(UUID, 1, "the link is cut") == "a"
        assert database.claim(UUID, 1, "primary") is False
    pair = database.pair(UUID)
    assert pair is not None and (pair.state, pair.winner, pair.active_host) == (begun, "", "a")
    assert database.winner(UUID, 1) is None
    for _ in range(2):
        assert database.claim(UUID, 1, "standby", "it is off") is True
    assert database.claim(UUID, 1, "primary") is False
    assert (database.winner(UUID, 1), state(database)) == ("standby", "failing_over")
    assert database.reserve(UUID, 1) is None
    lines = [row for row in database.events(uuid=UUID) if row.kind != "transition"]
    assert [(row.kind, row.old, row.new, row.host) for row in lines] == [
        ("reserved", begun, begun, "a"),
        ("refused", "", "primary", "a"),
        ("claim", begun, "failing_over", "b"),
    ]
    assert "the link is cut" in lines[0].reason
    assert "standby has it" in lines[1].reason


@pytest.mark.parametrize("side", SIDES)
def test_what_is_decided_or_unknown_is_not_reserved(database: Database, side: Side) -> None:
    assert database.reserve(UUID, 1) is None
    protected(database)
    assert database.reserve(UUID, 2) is None
    assert database.claim(UUID, 1, side)
    assert database.reserve(UUID, 1) is None
    host = "a" if side == "primary" else "b"
    database.begin(replace(FIRST, generation=2, primary_host=host, standby_host="c"))
    assert database.reserve(UUID, 1) is None
    assert database.winner(UUID, 1) == side


@pytest.mark.parametrize("begun", ["checking", "syncing", "protected", "error"])
def test_the_primary_begins_nothing_while_it_is_reserved_for_the_standby(
    database: Database, begun: State
) -> None:
    database.begin(FIRST)
    if begun != "checking":
        step(database, begun)
    database.reserve(UUID, 1)
    before = database.pair(UUID)
    for wanted in (FIRST, replace(FIRST, generation=2), replace(FIRST, generation=2, name="web2")):
        with pytest.raises(exception.PairMismatch):
            database.begin(wanted)
    with pytest.raises(exception.PairMismatch):
        database.begin(replace(FIRST, generation=2, primary_host="c"))
    assert database.pair(UUID) == before
    assert database.claim(UUID, 1, "standby") is True


def test_the_host_of_the_standby_may_begin_what_was_reserved_for_it(database: Database) -> None:
    protected(database)
    database.reserve(UUID, 1)
    pair = database.begin(replace(FIRST, generation=2, primary_host="b", standby_host="c"))
    assert (pair.generation, pair.winner, pair.active_host) == (2, "", "b")
    assert database.winner(UUID, 1) == "standby"
    assert database.claim(UUID, 1, "primary") is False
    assert database.claim(UUID, 2, "primary") is True


@pytest.mark.parametrize("begun", ["protected", "error"])
@pytest.mark.parametrize("new", ["primary_alone", "unprotected", "failing_over", "standby_active"])
def test_no_report_ends_what_is_reserved(database: Database, begun: State, new: State) -> None:
    protected(database)
    if begun == "error":
        step(database, "error")
    database.reserve(UUID, 1)
    before = database.pair(UUID)
    assert step(database, new) is False
    assert database.pair(UUID) == before
    assert database.claim(UUID, 1, "standby") is True


def test_what_an_operator_takes_back_nobody_wins(database: Database) -> None:
    protected(database)
    database.reserve(UUID, 1)
    assert step(database, "unprotected", withdraw=True) is False, "the standby is about to go on"
    assert step(database, "error")
    assert step(database, "unprotected", withdraw=True) is True
    for side in SIDES:
        assert database.claim(UUID, 1, side) is False
    pair = database.begin(replace(FIRST, generation=2, primary_host="c", standby_host="a"))
    assert (pair.state, pair.winner, pair.active_host) == ("checking", "", "c")
    for side in SIDES:
        assert database.claim(UUID, 1, side) is False
    assert database.claim(UUID, 2, "primary") is True


def test_taking_back_what_is_not_reserved_is_an_orderly_end(database: Database) -> None:
    protected(database)
    assert step(database, "unprotected", withdraw=True) is True
    assert database.winner(UUID, 1) == "primary"


def test_a_reservation_and_claims_at_once_leave_one_survivor(
    database: Database, connect: Connect
) -> None:
    databases = managers(connect, 4)
    for number in range(8):
        uuid = OTHER[:-1] + str(number)
        protected(database, replace(FIRST, uuid=uuid))
        *reserved, won = at_once(
            lambda uuid=uuid: databases[0].reserve(uuid, 1),
            lambda uuid=uuid: databases[1].reserve(uuid, 1),
            lambda uuid=uuid: databases[2].claim(uuid, 1, "primary"),
        )
        assert won in (True, False)
        assert set(reserved) == ({None} if won else {"a"})
        assert database.claim(uuid, 1, "standby") is not won
        assert [kind for kind, *_ in story(database, uuid)].count("claim") == 1


def test_a_reservation_and_the_next_beginning_at_once_leave_one_survivor(
    database: Database, connect: Connect
) -> None:
    databases = managers(connect, 2)
    for number in range(6):
        uuid = OTHER[:-1] + str(number)
        protected(database, replace(FIRST, uuid=uuid))
        reserved, begun = at_once(
            lambda uuid=uuid: databases[0].reserve(uuid, 1),
            lambda uuid=uuid: databases[1].begin(replace(FIRST, uuid=uuid, generation=2)),
        )
        if reserved is None:
            assert begun.generation == 2
        else:
            assert isinstance(begun, exception.PairMismatch)
        assert database.claim(uuid, 1, "standby") is (reserved is not None)


# -- steps ------------------------------------------------------------------------------


def test_each_step_writes_one_line_with_its_reason(database: Database) -> None:
    database.begin(FIRST)
    assert step(database, "syncing", reason="begins")
    assert step(database, "protected", reason="all is there")
    assert step(database, "protected", reason="told again")
    rows = database.events(uuid=UUID)
    assert [(row.kind, row.old, row.new, row.host, row.reason) for row in rows[1:]] == [
        ("transition", "checking", "syncing", "a", "begins"),
        ("transition", "syncing", "protected", "a", "all is there"),
    ]
    pair = database.pair(UUID)
    assert pair is not None and pair.reason == "all is there"


@pytest.mark.parametrize("new", states.STATES)
def test_a_report_of_another_generation_changes_nothing(database: Database, new: State) -> None:
    protected(database)
    database.begin(replace(FIRST, generation=2))
    before, lines = database.pair(UUID), story(database)
    assert step(database, new, generation=1) is False
    assert step(database, new, generation=3) is False
    assert step(database, new, uuid=OTHER) is False
    assert (database.pair(UUID), story(database)) == (before, lines)


@pytest.mark.parametrize("side", SIDES)
def test_a_report_that_is_late_changes_nothing(database: Database, side: Side) -> None:
    protected(database)
    database.claim(UUID, 1, side)
    before, lines = database.pair(UUID), story(database)
    for new in ("checking", "syncing", "protected", states.CLAIMED[other_side(side)]):
        assert step(database, new) is False
    assert (database.pair(UUID), story(database)) == (before, lines)


@pytest.mark.parametrize("new", ["failing_over", "standby_active"])
def test_no_standby_goes_on_by_a_report(database: Database, new: State) -> None:
    protected(database)
    assert step(database, new) is False
    assert database.winner(UUID, 1) is None


def test_a_primary_that_gave_its_standby_up_in_order_has_the_generation(
    database: Database,
) -> None:
    protected(database)
    assert step(database, "primary_alone") is True
    assert database.winner(UUID, 1) == "primary"
    assert database.claim(UUID, 1, "standby") is False


@pytest.mark.parametrize("new", ["checking", "reprotecting"])
@pytest.mark.parametrize("side", SIDES)
def test_no_generation_begins_by_a_report(database: Database, side: Side, new: State) -> None:
    protected(database)
    database.claim(UUID, 1, side)
    assert step(database, new) is False
    step(database, "error")
    assert step(database, new) is False
    assert state(database) == "error"


@pytest.mark.parametrize("side", SIDES)
def test_after_an_error_only_the_side_that_won_goes_on(database: Database, side: Side) -> None:
    protected(database)
    database.claim(UUID, 1, side)
    assert step(database, "error")
    assert step(database, states.CLAIMED[other_side(side)]) is False
    assert step(database, states.CLAIMED[side]) is True
    pair = database.pair(UUID)
    assert pair is not None and pair.winner == side


def test_a_pair_that_fails_over_does_not_become_unprotected_before_it_has(
    database: Database,
) -> None:
    protected(database)
    database.claim(UUID, 1, "standby")
    assert step(database, "unprotected") is False
    assert step(database, "standby_active", host="b") is True
    assert step(database, "unprotected") is True
    assert database.winner(UUID, 1) == "standby"
    pair = database.pair(UUID)
    assert pair is not None and pair.wanted is False


def test_a_step_can_be_asked_for_from_certain_states_only(database: Database) -> None:
    protected(database)
    assert step(database, "unprotected", old=["syncing"]) is False
    assert step(database, "unprotected", old=["syncing", "protected"]) is True


def test_all_steps_that_are_made_are_steps_of_the_machine(database: Database) -> None:
    """Whatever is asked, in any state that there is: what changed is a step that exists."""
    number = 0
    for path in reaching():
        for new in states.STATES:
            number += 1
            uuid = f"{UUID[:-4]}{number:04x}"
            walk(database, uuid, path)
            database.transition(uuid, 1, new, host="a")
    for row in database.events(limit=100_000):
        assert row.old == "" or states.may_follow(row.old, row.new), row  # type: ignore[arg-type]


def reaching() -> list[tuple[State, ...]]:
    """For each state one way to it, as a pair's life goes."""
    return [
        (),
        ("syncing",),
        ("protected",),
        ("protected", "primary_alone"),
        ("protected", "failing_over"),
        ("protected", "failing_over", "standby_active"),
        ("protected", "error"),
        ("protected", "unprotected"),
        ("protected", "primary_alone", "reprotecting"),
    ]


def walk(database: Database, uuid: str, path: Sequence[State]) -> None:
    database.begin(replace(FIRST, uuid=uuid))
    for new in path:
        if new == "primary_alone":
            assert database.claim(uuid, 1, "primary")
        elif new == "failing_over":
            assert database.claim(uuid, 1, "standby")
        elif new == "reprotecting":
            database.begin(replace(FIRST, uuid=uuid, generation=2))
        else:
            assert step(database, new, uuid=uuid)
        assert state(database, uuid) == new


def test_of_many_that_tell_of_a_step_one_writes_it_down(
    database: Database, connect: Connect
) -> None:
    database.begin(FIRST)
    databases = managers(connect, 4)
    answers = at_once(*[lambda one=one: step(one, "protected") for one in databases * 2])
    assert answers == [True] * 8
    assert story(database)[1:] == [("transition", 1, "checking", "protected")]


def test_a_reason_without_end_is_cut(database: Database) -> None:
    database.begin(FIRST)
    long = "\N{SNOWMAN}" * (MAX_REASON + 100)
    assert step(database, "protected", reason=long)
    assert database.claim(UUID, 1, "primary", long)
    pair = database.pair(UUID)
    assert pair is not None and pair.reason == long[:MAX_REASON]
    assert {len(row.reason) for row in database.events()} == {0, MAX_REASON}


# -- repairs ----------------------------------------------------------------------------


def broken(database: Database) -> Database:
    protected(database)
    database.claim(UUID, 1, "primary")
    return database


def test_exactly_one_of_many_managers_takes_a_repair(database: Database, connect: Connect) -> None:
    broken(database)
    databases = managers(connect, 4)
    for attempts in range(3):
        answers = at_once(*[lambda d=d, n=attempts: d.attempt(UUID, 1, n) for d in databases * 2])
        assert sorted(answers) == [False] * 7 + [True]
    pair = database.pair(UUID)
    assert pair is not None and pair.attempts == 3


def test_only_what_broke_is_repaired(database: Database) -> None:
    protected(database)
    assert database.attempt(UUID, 1, 0) is False
    database.claim(UUID, 1, "standby")
    assert database.attempt(UUID, 1, 0) is False  # nobody runs yet
    step(database, "standby_active")
    assert database.attempt(UUID, 2, 0) is False
    assert database.attempt(OTHER, 1, 0) is False
    assert database.attempt(UUID, 1, 1) is False
    assert database.attempt(UUID, 1, 0) is True


def test_repairs_are_counted_until_it_is_protected(database: Database) -> None:
    broken(database)
    assert database.attempt(UUID, 1, 0)
    assert database.begin(replace(FIRST, generation=2)).attempts == 1
    assert database.claim(UUID, 2, "primary")
    assert database.attempt(UUID, 2, 1)
    assert database.begin(replace(FIRST, generation=3)).attempts == 2
    assert step(database, "protected", generation=3)
    pair = database.pair(UUID)
    assert pair is not None and pair.attempts == 0


def test_what_is_wanted_can_be_changed(database: Database) -> None:
    broken(database)
    for wanted in (False, True):
        database.want(UUID, wanted)
        pair = database.pair(UUID)
        assert pair is not None and pair.wanted is wanted


# -- tokens -----------------------------------------------------------------------------


def test_the_last_token_is_seen_by_every_manager(database: Database, connect: Connect) -> None:
    other = Database(connect())
    assert other.challenged(UUID) == ""
    for token in ("one", "two"):
        database.challenge(UUID, token)
        assert other.challenged(UUID) == token
    assert other.challenged(OTHER) == ""


def test_many_leave_tokens_at_once(database: Database, connect: Connect) -> None:
    databases = managers(connect, 4)
    tokens = [f"token-{n}" for n in range(8)]
    works = [
        lambda d=d, t=t: d.challenge(UUID, t) for d, t in zip(databases * 2, tokens, strict=True)
    ]
    assert at_once(*works) == [None] * 8
    assert database.challenged(UUID) in tokens


# -- hosts ------------------------------------------------------------------------------


def host_story(database: Database) -> list[tuple[str, str, str]]:
    return [(row.host, row.old, row.new) for row in database.events() if row.kind == "host"]


def test_a_host_is_known_from_its_first_heartbeat(database: Database) -> None:
    assert database.hosts() == []
    first = database.beat("a", {"memory_free_bytes": 1})
    assert (first.beats, first.alive, first.maintenance) == (1, True, False)
    second = database.beat("a", {"memory_free_bytes": 2})
    assert (second.beats, second.facts) == (2, {"memory_free_bytes": 2})
    assert database.hosts() == [second]
    assert host_story(database) == [("a", "", "alive")]


def test_heartbeats_that_come_at_once_are_all_counted(database: Database, connect: Connect) -> None:
    databases = managers(connect, 4)
    answers = at_once(*[lambda one=one: one.beat("a", {}) for one in databases * 2])
    assert not [one for one in answers if isinstance(one, Exception)]
    assert database.hosts()[0].beats == 8
    assert host_story(database) == [("a", "", "alive")]


def test_exactly_one_manager_judges(database: Database, connect: Connect) -> None:
    beats = database.beat("a", {}).beats
    databases = managers(connect, 4)
    for alive in (False, True):
        answers = at_once(
            *[lambda d=d, v=alive: d.judge("a", beats, v, "silent") for d in databases]
        )
        assert sorted(answers) == [False, False, False, True]
        assert database.hosts()[0].alive is alive
    assert host_story(database) == [
        ("a", "", "alive"),
        ("a", "alive", "dead"),
        ("a", "dead", "alive"),
    ]


def test_a_host_that_was_heard_meanwhile_is_not_dead(database: Database) -> None:
    beats = database.beat("a", {}).beats
    database.beat("a", {})
    assert database.judge("a", beats, False, "silent") is False
    assert database.judge("b", beats, False, "silent") is False
    assert database.hosts()[0].alive is True


def test_a_heartbeat_says_whether_the_managers_take_the_host_for_alive(database: Database) -> None:
    beats = database.beat("a", {}).beats
    database.judge("a", beats, False, "silent")
    assert database.beat("a", {}).alive is False
    database.judge("a", beats, True, "heard")
    assert database.beat("a", {}).alive is True


def test_a_host_is_taken_out_of_service_and_back(database: Database) -> None:
    assert database.maintain("a", True) is False
    database.beat("a", {})
    for _ in range(2):
        assert database.maintain("a", True) is True
    assert database.beat("a", {}).maintenance is True
    assert database.maintain("a", False) is True
    assert database.beat("a", {}).maintenance is False
    assert [new for _, _, new in host_story(database)] == ["alive", "maintenance", "in service"]


def test_many_take_a_host_out_of_service_and_one_writes_it_down(
    database: Database, connect: Connect
) -> None:
    database.beat("a", {})
    databases = managers(connect, 4)
    assert at_once(*[lambda d=d: d.maintain("a", True) for d in databases * 2]) == [True] * 8
    assert [new for _, _, new in host_story(database)] == ["alive", "maintenance"]


# -- looking ----------------------------------------------------------------------------


def three(database: Database) -> Database:
    """Pairs a-b, b-c, c-a of three servers."""
    for number, (primary, standby) in enumerate(["ab", "bc", "ca"]):
        uuid, name = OTHER[:-1] + str(number), f"web{3 - number}"
        database.begin(Arrangement(uuid, name, 1, primary, standby))
    return database


def test_pairs_are_found_by_host_state_and_name(database: Database) -> None:
    three(database)
    step(database, "protected", uuid=OTHER[:-1] + "1")
    assert [pair.name for pair in database.pairs()] == ["web1", "web2", "web3"]
    assert [pair.name for pair in database.pairs(host="b")] == ["web2", "web3"]
    assert [pair.name for pair in database.pairs(in_states=["protected"])] == ["web2"]
    assert [pair.name for pair in database.pairs(host="a", in_states=["protected"])] == []
    assert [pair.name for pair in database.pairs(name="web1")] == ["web1"]
    assert database.pairs(in_states=[]) == []
    assert database.pair(UUID[:-1] + "f") is None


def test_names_are_told_apart_to_the_letter(database: Database) -> None:
    """MariaDB's usual order does not."""
    names = ["web", "WEB", "wéb"]
    for number, name in enumerate(names):
        database.begin(Arrangement(OTHER[:-1] + str(number), name, 1, "a", "b"))
        database.beat(name, {"number": number})
    for number, name in enumerate(names):
        assert [pair.name for pair in database.pairs(name=name)] == [name]
        assert {host.name: host.facts["number"] for host in database.hosts()}[name] == number
    assert len(database.hosts()) == len(names)


def test_pairs_are_counted_by_state(database: Database) -> None:
    assert database.counts() == dict.fromkeys(states.STATES, 0)
    three(database)
    step(database, "protected", uuid=OTHER[:-1] + "1")
    counts = database.counts()
    assert (counts["checking"], counts["protected"], sum(counts.values())) == (2, 1, 3)


def many_events(database: Database) -> list[EventRow]:
    """Ten lines, of two pairs in turns."""
    for generation in range(1, 6):
        for uuid in (UUID, OTHER):
            database.begin(replace(FIRST, uuid=uuid, generation=generation))
    return database.events(limit=1000)


def test_events_are_told_oldest_first(database: Database) -> None:
    lines = many_events(database)
    assert len(lines) == 10
    assert [row.id for row in lines] == sorted({row.id for row in lines})
    assert [row.generation for row in database.events(uuid=UUID)] == [1, 2, 3, 4, 5]


def test_the_last_events_are_told_or_those_after_a_number(database: Database) -> None:
    lines = many_events(database)
    assert database.events(limit=3) == lines[-3:]
    assert database.events(after=lines[4].id) == lines[5:]
    assert database.events(after=lines[4].id, limit=2) == lines[5:7]
    assert database.events(after=lines[-1].id) == []
    assert database.events(uuid=OTHER, limit=2) == [lines[7], lines[9]]
    assert database.events(uuid=OTHER, after=lines[0].id, limit=2) == [lines[1], lines[3]]
    assert database.events(limit=0) == []


def test_old_events_are_forgotten_and_what_was_decided_is_not(engine: Engine) -> None:
    times = iter(range(1000))
    database = Database(engine, now=lambda: float(next(times)))
    protected(database)
    database.claim(UUID, 1, "standby")
    lines = database.events()
    assert database.forget(lines[-1].at) == len(lines) - 1
    assert database.events() == lines[-1:]
    assert database.forget(1e12) == 1
    assert database.claim(UUID, 1, "primary") is False


# -- tables -----------------------------------------------------------------------------


def test_the_migrations_make_what_the_models_say(engine: Engine) -> None:
    def differences(bare: sa.Engine) -> list[Any]:
        with bare.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "compare_server_default": True}
            )
            return list(compare_metadata(context, models.Base.metadata))

    assert engine.ask(differences) == []
    assert engine.ask(migration.current) == migration.head()


def test_an_upgrade_of_what_is_up_to_date_keeps_all(engine: Engine, database: Database) -> None:
    database.begin(FIRST)
    engine.ask(migration.upgrade)
    engine.ask(migration.check)
    assert database.pair(UUID) is not None


def test_other_tables_than_this_releases_are_refused(engine: Engine) -> None:
    def become(revision: str) -> Callable[[sa.Engine], None]:
        def change(bare: sa.Engine) -> None:
            with bare.begin() as connection:
                connection.execute(
                    sa.text("UPDATE alembic_version SET version_num = :r"), {"r": revision}
                )

        return change

    needed = migration.head()
    engine.ask(become("9999"))
    with pytest.raises(exception.ConfigError, match=f"revision 9999, .* needs {needed}"):
        engine.ask(migration.check)
    with pytest.raises(exception.ConfigError, match="9999") as caught:
        engine.ask(migration.upgrade)
    assert "newer" in caught.value.cure
    engine.ask(become(needed))
    engine.ask(migration.check)


def test_load_counts_where_guests_run_and_where_they_wait(database: Database) -> None:
    assert database.load() == {}
    protected(database)
    assert database.load() == {"a": 1, "b": 1}
    database.claim(UUID, 1, "standby")
    assert database.load() == {"b": 1}, "the standby runs now, and nothing waits"
    step(database, "standby_active")
    step(database, "unprotected")
    assert database.load() == {}


# -- servers of Nova --------------------------------------------------------------------


def note_keepers(connect: Connect, count: int) -> list[NovaNotes]:
    return [NovaNotes(connect()) for _ in range(count)]


def test_a_server_that_several_begin_to_follow_has_one_row(
    engine: Engine, connect: Connect
) -> None:
    keepers = note_keepers(connect, 4)
    kept = at_once(*(lambda one=one: one.keep(UUID) for one in keepers))
    assert [(note.uuid, note.turn, note.holder) for note in kept] == [(UUID, 0, "")] * 4
    assert [note.uuid for note in NovaNotes(engine).notes()] == [UUID]


def test_of_all_who_want_a_turn_one_gets_it(engine: Engine, connect: Connect) -> None:
    keepers = note_keepers(connect, 4)
    for turn in range(5):
        turns = [lambda one=one, turn=turn: one.take(UUID, turn, "x") for one in keepers]
        keepers[0].keep(UUID)
        assert sorted(at_once(*turns)) == [False, False, False, True]


def test_only_who_has_the_last_turn_changes_a_row(engine: Engine) -> None:
    notes = NovaNotes(engine)
    assert not notes.take(UUID, 0, "one"), "it is not followed"
    notes.keep(UUID)
    assert notes.take(UUID, 0, "one")
    assert notes.write(UUID, 1, step="rebind", source="a", target="b", generation=3, ordered="pmt")
    assert notes.take(UUID, 1, "two")
    assert not notes.write(UUID, 1, step="evacuate")
    assert not notes.drop(UUID, 1)
    note = notes.note(UUID)
    assert note is not None
    assert (note.step, note.source, note.target, note.generation) == ("rebind", "a", "b", 3)
    assert (note.holder, note.turn, note.ordered) == ("two", 2, "pmt")
    assert notes.write(UUID, 2, reason="x" * 10_000)
    assert len(notes.note(UUID).reason) == MAX_REASON  # type: ignore[union-attr]
    assert notes.drop(UUID, 2)
    assert notes.note(UUID) is None


def test_a_host_that_was_forced_down_is_remembered_once(engine: Engine, connect: Connect) -> None:
    keepers = note_keepers(connect, 4)
    at_once(*(lambda one=one: one.force("a", "service") for one in keepers))
    assert NovaNotes(engine).forced() == {"a": "service"}
    at_once(*(lambda one=one: one.unforce("a") for one in keepers))
    assert NovaNotes(engine).forced() == {}


def test_what_managers_do_in_nova_is_in_the_audit_trail(engine: Engine, database: Database) -> None:
    NovaNotes(engine).remark(UUID, "evacuate", "it runs on b", generation=7)
    (event,) = database.events(uuid=UUID)
    assert (event.kind, event.new, event.generation) == ("nova", "evacuate", 7)
    assert event.reason == "it runs on b"
