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

"""A host is heard for as long as it lives, and a change of a pair at once."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.agent.control import Pair
from nova_pmt.agent.heartbeat import Heartbeats
from nova_pmt.agent.notifications import Notifications
from nova_pmt.agent.pairs import Pairs
from nova_pmt.agent.records import Record, RecordStore

UUIDS = [f"4dea22b3-1d52-d8f3-2516-782e98ab3fa{number}" for number in range(3)]
_LONG_S = 600.0


class Managers:
    """Remembers what it is told, and fails as the test says."""

    def __init__(self) -> None:
        self.told: queue.Queue[tuple[dict[str, Any], list[dict[str, Any]]]] = queue.Queue()
        self.error: Exception | None = None
        self.running: list[str] | None = None

    def beat(
        self,
        host: str,
        facts: dict[str, Any],
        pairs: list[dict[str, Any]],
        running: list[str] | None = None,
    ) -> dict[str, Any]:
        assert host == "a"
        self.running = running
        self.told.put((facts, pairs))
        if self.error is not None:
            raise self.error
        return {"alive": True, "maintenance": False}

    def next(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return self.told.get(timeout=10)


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return Pairs("a", RecordStore(str(tmp_path)), Notifications(None))


@pytest.fixture
def managers() -> Managers:
    return Managers()


Start = Callable[..., Heartbeats]


@pytest.fixture
def start(managers: Managers, pairs: Pairs) -> Iterator[Start]:
    made: list[Heartbeats] = []

    def begin(
        interval_s: float = _LONG_S, facts: Callable[[], dict[str, Any]] = dict
    ) -> Heartbeats:
        made.append(Heartbeats("a", managers, pairs, facts, interval_s))
        return made[-1]

    yield begin
    for one in made:
        one.close(5)


def record(number: int = 0, generation: int = 1) -> Record:
    return Record("primary", Pair(UUIDS[number], f"web{number}", generation, "a", "b"), state="new")


def test_it_beats_at_once_and_then_at_its_interval(managers: Managers, start: Start) -> None:
    start(0.01, lambda: {"memory_free_bytes": 7})
    for _ in range(3):
        assert managers.next() == ({"memory_free_bytes": 7}, [])


def test_a_change_of_a_pair_is_told_at_once(managers: Managers, start: Start, pairs: Pairs) -> None:
    start()
    assert managers.next()[1] == []
    entry = pairs.add(record(), "asked for")
    (told,) = managers.next()[1]
    assert told == {
        "uuid": UUIDS[0], "generation": 1, "role": "primary", "state": "new", "reason": "asked for"
    }  # fmt: skip
    entry.transition("protected", "x" * 10_000)
    (told,) = managers.next()[1]
    assert (told["state"], told["reason"]) == ("protected", "x" * 500)


def test_the_guests_that_run_are_told_beside_the_facts(managers: Managers, start: Start) -> None:
    start(facts=lambda: {"memory_free_bytes": 7, "running": UUIDS[:1]})
    assert managers.next() == ({"memory_free_bytes": 7}, [])
    assert managers.running == UUIDS[:1]


@pytest.mark.parametrize(
    "error", [exception.HostUnreachable("no manager"), RuntimeError("unforeseen")]
)
def test_it_goes_on_after_managers_that_do_not_hear(
    managers: Managers, start: Start, error: Exception
) -> None:
    managers.error = error
    start(0.01)
    for _ in range(3):
        managers.next()
    managers.error = None
    managers.next()


@pytest.mark.parametrize("error", [exception.GuestError("libvirt is away"), OSError("unforeseen")])
def test_facts_that_fail_do_not_keep_pairs_from_being_told(
    managers: Managers, start: Start, pairs: Pairs, error: Exception
) -> None:
    def facts() -> dict[str, Any]:
        raise error

    pairs.add(record())
    start(0.01, facts)
    for _ in range(2):
        told, reports = managers.next()
        assert set(told) == {"error"}
        assert managers.running is None  # nothing is to be concluded from it
        assert [one["uuid"] for one in reports] == [UUIDS[0]]


def test_what_ended_is_told_in_order_and_before_what_is(
    managers: Managers, start: Start, pairs: Pairs
) -> None:
    for generation in (1, 2):
        pairs.drop(pairs.add(record(0, generation)), "unprotected")
    pairs.drop(pairs.add(record(1)), "ended")
    pairs.add(record(0, 3))
    start()
    _, reports = managers.next()
    assert [(one["uuid"][-1], one["generation"], one["state"]) for one in reports] == [
        ("0", 1, "unprotected"),
        ("0", 2, "unprotected"),
        ("1", 1, "ended"),
        ("0", 3, "new"),
    ]


def test_a_pair_that_ended_undecided_is_not_told_as_ended(
    managers: Managers, start: Start, pairs: Pairs
) -> None:
    pairs.drop(pairs.add(record()), "ended", "nobody went on", undecided=True)
    start()
    assert [one["state"] for one in managers.next()[1]] == ["error"]


def test_it_ends_without_waiting_for_its_interval(managers: Managers, start: Start) -> None:
    for _ in range(20):
        heartbeats = start()
        heartbeats.close(5)
        assert not heartbeats._thread.is_alive()
