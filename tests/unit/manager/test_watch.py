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

"""Who is taken for dead: never for a silence that may be our own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nova_pmt import exception
from nova_pmt.manager.db.api import Database, HostRow
from nova_pmt.manager.watch import HostWatch


class World:
    """Hosts that beat, and managers that look, by one clock."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.now = 1000.0
        self.watches = [HostWatch(database, 10.0, lambda: self.now) for _ in range(2)]

    def go(self, seconds: float, *beating: str, step_s: float = 1.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += step_s
            for name in beating:
                self.database.beat(name, {})
            for watch in self.watches:
                watch.look()

    def alive(self) -> dict[str, bool]:
        return {host.name: host.alive for host in self.database.hosts()}

    def judged(self) -> list[tuple[str, str]]:
        rows = [row for row in self.database.events() if row.kind == "host" and row.old]
        return [(row.host, row.new) for row in rows]


@pytest.fixture
def world(database: Database) -> World:
    made = World(database)
    made.go(5, "a", "b", "c")
    return made


def test_a_host_that_falls_silent_is_dead_and_one_manager_says_so(world: World) -> None:
    world.go(9, "a", "b")
    assert all(world.alive().values())
    world.go(3, "a", "b")
    assert world.alive() == {"a": True, "b": True, "c": False}
    assert world.judged() == [("c", "dead")]


def test_a_host_that_is_heard_again_is_alive(world: World) -> None:
    world.go(15, "a", "b")
    world.go(1, "a", "b", "c")
    assert all(world.alive().values())
    assert world.judged() == [("c", "dead"), ("c", "alive")]


def test_nobody_is_judged_while_all_are_silent(world: World) -> None:
    """The message bus is away, as a rule, and no host has died of it."""
    world.go(100)
    assert all(world.alive().values())


def test_after_a_silence_of_all_each_has_its_time_to_be_heard(world: World) -> None:
    world.go(100)
    world.go(1, "a")
    # Whether b and c are slower to come back, or dead, is not to be known yet.
    world.go(8, "a", "b", "c")
    assert world.judged() == []


def test_a_manager_that_stood_still_judges_nobody(world: World) -> None:
    world.now += 60  # it was stopped; heartbeats went on, and the first ones are there
    world.go(2, "a")
    world.go(3, "a", "b", "c")
    assert world.judged() == []
    world.go(15, "a", "b")
    assert world.alive()["c"] is False


def test_a_database_that_stood_still_is_no_silence_of_hosts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's heartbeat could be written; what comes first when it goes on is one host's."""
    hosts = Database.hosts

    def slow(self: Database) -> list[HostRow]:
        world.now += 60
        world.database.beat("a", {})
        return hosts(self)

    monkeypatch.setattr(Database, "hosts", slow)
    world.watches[0].look()
    monkeypatch.undo()
    world.watches[0].look()
    assert all(world.alive().values())


@pytest.mark.parametrize("where", ["hosts", "judge"])
def test_a_database_that_was_away_gives_all_hosts_their_time_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    world.watches = world.watches[:1]
    world.go(9, "a", "b")

    def away(*_args: object) -> object:
        raise exception.DatabaseUnavailable("it is away")

    monkeypatch.setattr(Database, where, away)
    world.database.beat("a", {})
    world.now += 2
    with pytest.raises(exception.DatabaseUnavailable):
        world.watches[0].look()
    monkeypatch.undo()
    world.go(5, "a")
    assert all(world.alive().values())


def test_a_new_manager_knows_nobody_to_be_silent(world: World, database: Database) -> None:
    world.watches = [HostWatch(database, 10.0, lambda: world.now)]
    world.go(9, "a")
    assert all(world.alive().values())
    world.go(3, "a")
    assert world.alive() == {"a": True, "b": False, "c": False}


def test_a_clock_that_starts_anywhere_serves(database: Database) -> None:
    clock: Callable[[], float] = lambda: 0.0  # noqa: E731
    HostWatch(database, 10.0, clock).look()
