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

"""Managers follow Nova: from wherever it is, to one server that runs, and what it asks for."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest

from nova_pmt import exception
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from nova_pmt.manager.db.nova import NovaNotes
from nova_pmt.openstack import failover, policy
from nova_pmt.openstack.failover import Settling
from nova_pmt.openstack.follow import LEASE_S, MAX_BACKOFF_S, Follower
from tests.unit.openstack.cloud import HOSTS, US, UUID, AtOnce, Cloud, Killed


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A cloud and the managers of it."""

    def __init__(self, engine: Engine) -> None:
        self.database = Database(engine)
        self.notes = NovaNotes(engine)
        self.cloud = Cloud(self.database)
        self.clock = Clock()
        self.names = itertools.count(1)
        self.told: list[tuple[str, str]] = []
        self.follower = self.manager()
        self.settling = Settling(self.cloud, self.cloud, self.notes)
        self.cloud.hosts_beat()

    def manager(self) -> Follower:
        """One more, or the same one started again."""
        return Follower(
            self.cloud,
            self.cloud,
            self.database,
            self.notes,
            AtOnce(),
            computes=self.cloud,
            name=f"manager-{next(self.names)}",
            honour="allowed",
            reconcile_interval_s=60.0,
            failover_timeout_s=120.0,
            announce=lambda what, uuid, reason: self.told.append((what, reason)),
            clock=self.clock,
        )

    def go_on(self, seconds: float = 200.0, *managers: Follower, stride: float = 2.0) -> None:
        """Time passes; those that die are started again."""
        until = self.clock.now + seconds
        running = list(managers or (self.follower,))
        while self.clock.now < until:
            self.clock.now += stride
            for number, manager in enumerate(running):
                try:
                    with contextlib.suppress(exception.PmtError):
                        manager.sweep()
                    alive = frozenset(h.name for h in self.database.hosts() if h.alive)
                    with contextlib.suppress(exception.PmtError):
                        self.settling.sweep(alive)
                except Killed:
                    running[number] = self.manager()
                    if manager is self.follower:
                        self.follower = running[number]

    def standbys(self) -> list[str]:
        return [one.host for one in self.cloud.servers_.values() if one.user_id == US]

    def demand_protected(self) -> None:
        """One server runs, with one standby elsewhere, and all agree on it."""
        cloud, server = self.cloud, self.cloud.servers_[UUID]
        assert cloud.runs[UUID] == server.host == cloud.bound[UUID]
        assert self.standbys() == [cloud.waits[UUID]]
        assert cloud.waits[UUID] != server.host
        pair = self.database.pair(UUID)
        assert pair is not None and pair.state == "protected"
        assert server.status == "ACTIVE"
        assert cloud.allocations[UUID] - cloud.dead == {server.host}
        note = self.notes.note(UUID)
        assert note is not None and (note.step, note.holder) == ("", "")


@pytest.fixture
def world(engine: Engine) -> World:
    return World(engine)


def test_a_server_that_asks_for_it_is_protected_by_itself(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.demand_protected()
    calls = len([call for call in world.cloud.calls if call == "server"])
    world.go_on(50)
    again = len([call for call in world.cloud.calls if call == "server"])
    assert again == calls, "what is as it should be is left alone"


def test_a_notification_is_only_faster(world: World) -> None:
    world.go_on(5)
    world.cloud.boot()
    world.follower.touch(UUID)
    world.go_on(5)
    world.demand_protected()


def test_servers_that_ask_for_nothing_are_not_written_down(world: World) -> None:
    world.cloud.boot(metadata={})
    world.follower.touch(UUID)
    world.go_on(100)
    assert world.notes.notes() == []
    assert world.standbys() == []


def test_the_property_of_a_running_server_is_followed(world: World) -> None:
    world.cloud.boot(metadata={})
    world.go_on(5)
    world.cloud.change(metadata={policy.PROPERTY: "pmt"})
    world.follower.touch(UUID)
    world.go_on(5)
    world.demand_protected()
    world.cloud.change(metadata={})
    world.follower.touch(UUID)
    world.go_on(10)
    assert (world.standbys(), world.cloud.waits, world.notes.notes()) == ([], {}, [])
    assert world.cloud.runs[UUID] == "a"


def test_a_server_that_is_deleted_leaves_nothing(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.cloud.remove()
    world.follower.touch(UUID)
    world.go_on(10)
    assert (world.cloud.servers_, world.cloud.allocations, world.notes.notes()) == ({}, {}, [])


def test_a_refusal_is_told_and_nothing_is_made(world: World) -> None:
    world.cloud.boot()
    world.cloud.refusals = [exception.SharedStorage("disk vda is on NFS")]
    world.go_on(100)
    assert world.standbys() == []
    note = world.notes.note(UUID)
    assert note is not None
    assert "disk vda is on NFS [SHARED_STORAGE]" in note.reason
    assert note.attempts < 10, "it does not loop hot"
    world.cloud.refusals = []
    world.go_on(2 * MAX_BACKOFF_S)
    world.demand_protected()


def test_no_room_for_a_standby_is_told_and_made_up_for(world: World) -> None:
    world.cloud.boot()
    world.cloud.room = {"a": 1, "b": 0, "c": 0}
    world.go_on(60)
    assert world.cloud.waits == {}
    world.cloud.room["c"] = 1
    world.go_on(60)
    world.demand_protected()
    assert world.cloud.waits[UUID] == "c"


@pytest.mark.parametrize("dies", [True, False])
def test_a_failover_is_told_to_nova_and_it_is_protected_again(world: World, dies: bool) -> None:
    world.cloud.boot()
    world.go_on(10)
    assert world.cloud.fail_over(dies=dies)
    world.follower.touch(UUID)
    world.go_on(60)
    world.demand_protected()
    assert world.cloud.servers_[UUID].host == "b"
    order = [
        call for call in world.cloud.calls if call in ("rebind", "force_down", "free", "evacuate")
    ]
    assert order == ["rebind", "force_down", "free", "evacuate"]
    assert world.cloud.forced == ({"a"} if dies else set())
    world.cloud.come_back("a")
    world.go_on(30)
    assert world.cloud.forced == set()
    assert world.cloud.allocations[UUID] == {"b"}
    assert world.notes.forced() == {}


def test_a_failover_that_nova_does_not_follow_is_told_of_once(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.cloud.room["b"] = 0
    world.cloud.fail_over()
    world.go_on(100)
    assert "overdue" not in dict(world.told)
    world.go_on(400)
    overdue = [reason for what, reason in world.told if what == "overdue"]
    assert len(overdue) == 1 and "step '" in overdue[0]
    world.cloud.room["b"] = 2
    world.go_on(200)
    world.demand_protected()
    assert "failed_over" in dict(world.told)


def test_the_standbys_room_is_given_back_before_nova_needs_it(world: World) -> None:
    world.cloud.room["b"] = 1
    world.cloud.boot()
    world.go_on(10)
    world.cloud.fail_over()
    world.go_on(60)
    world.demand_protected()


def test_a_record_in_error_is_taken_over_when_there_is_room(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.cloud.room["b"] = 0
    world.cloud.fail_over()
    world.go_on(30)
    assert world.cloud.servers_[UUID].status == "ERROR"
    world.cloud.room["b"] = 2
    world.go_on(60)
    world.demand_protected()


def test_a_server_that_its_owner_paused_is_followed_too(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.cloud.change(status="PAUSED")
    world.cloud.fail_over()
    world.go_on(60)
    assert world.cloud.servers_[UUID].host == "b"


def test_who_was_forced_down_by_an_operator_stays_so(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.cloud.forced.add("a")
    world.cloud.fail_over(dies=False)
    world.go_on(60)
    assert "a" in world.cloud.forced


def test_a_standby_whose_host_is_gone_is_made_elsewhere(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    cloud = world.cloud
    cloud.dead.add("b")
    cloud._heard("b", False)
    pair = world.database.pair(UUID)
    assert pair is not None
    world.database.claim(UUID, pair.generation, "primary")
    cloud.waits.clear()
    world.go_on(60)
    world.demand_protected()
    assert cloud.waits[UUID] == "c"


def test_a_server_that_was_moved_onto_its_standbys_host_gets_another(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    cloud = world.cloud
    cloud.stop()
    cloud.allocations[UUID] = {"b"}
    cloud.runs[UUID] = cloud.bound[UUID] = "b"
    cloud.change(host="b")
    world.follower.touch(UUID)
    world.go_on(60)
    world.demand_protected()


def test_a_server_of_another_size_gets_a_standby_of_that_size(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.cloud.stop()
    world.cloud.runs[UUID] = "a"
    world.cloud.change(flavor="large")
    world.follower.touch(UUID)
    world.go_on(30)
    world.demand_protected()
    assert {one.flavor for one in world.cloud.servers_.values()} == {"large"}


def test_a_record_in_error_says_nothing_of_the_guest(world: World) -> None:
    world.cloud.boot()
    world.go_on(10)
    world.cloud.change(status="ERROR")
    world.follower.touch(UUID)
    world.go_on(30)
    assert world.standbys() == [world.cloud.waits[UUID]]


def test_a_strangers_mark_makes_no_standby(world: World) -> None:
    world.cloud.boot()
    stranger = world.cloud.boot(uuid="5a2f3c1e-0000-4000-8000-0000000000bb", host="b")
    world.cloud.change(stranger.uuid, metadata={policy.STANDBY: UUID})
    world.go_on(30)
    world.demand_protected()
    assert stranger.uuid in world.cloud.servers_


@pytest.mark.parametrize("kind", ["fail", "lost", "kill"])
@pytest.mark.parametrize("number", [*range(10), 13, 17])
def test_whatever_fails_at_any_call_it_comes_out_right(
    world: World, kind: str, number: int
) -> None:
    """From the boot through a failover: each call fails, loses its answer, or kills its manager."""
    world.cloud.trouble = (number, kind)
    world.cloud.boot()
    world.go_on(160)  # a look at all, and a lease
    world.demand_protected()
    assert world.cloud.fail_over()
    world.go_on(160)
    world.demand_protected()


@pytest.mark.parametrize("step", failover.STEPS)
def test_a_manager_that_dies_at_a_step_leaves_it_to_another(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    world.cloud.boot()
    world.go_on(10)
    other = world.manager()
    dead = []

    def reach(name: str) -> None:
        if name == f"nova.{step}" and not dead:
            dead.append(name)
            raise Killed

    monkeypatch.setattr(failover.faultpoint, "reach", reach)
    assert world.cloud.fail_over()
    with contextlib.suppress(Killed):
        for _ in range(20):
            world.clock.now += 1.0
            world.follower.sweep()
    world.go_on(LEASE_S + 60, other)
    assert dead
    world.demand_protected()


def test_two_managers_do_not_get_into_each_others_way(world: World) -> None:
    other = world.manager()
    world.cloud.boot()
    world.go_on(100, world.follower, other)
    world.demand_protected()
    world.cloud.fail_over()
    world.follower.touch(UUID)
    other.touch(UUID)
    world.go_on(100, world.follower, other)
    world.demand_protected()
    assert world.cloud.calls.count("evacuate") == 1


def test_two_managers_try_in_vain_no_more_often_than_one(world: World) -> None:
    """One makes the standby server, the other one finds that Nova could not."""
    world.cloud.room["b"] = world.cloud.room["c"] = 0
    world.cloud.boot()
    managers = [world.follower, world.manager()]
    for _ in range(200):  # Nova notifies both of all that they do
        world.go_on(3, *managers, stride=3.0)
        for manager in managers:
            manager.touch(UUID)
    assert 3 < world.cloud.calls.count("create") < 15


def test_who_stood_still_in_a_turn_changes_nothing_afterwards(world: World) -> None:
    note = world.notes.keep(UUID)
    assert world.notes.take(UUID, note.turn, "one")
    mine = replace(note, turn=note.turn + 1)
    assert world.notes.take(UUID, mine.turn, "two")
    assert not world.notes.write(UUID, mine.turn, step="evacuate")
    assert not world.notes.drop(UUID, mine.turn)
    found = world.notes.note(UUID)
    assert found is not None and (found.step, found.holder) == ("", "two")


def test_hosts_of_the_cloud_are_those_of_the_test() -> None:
    assert HOSTS == ("a", "b", "c")
