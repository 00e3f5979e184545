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

"""What Nova, users and operators do that a manager must not fall for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.manager.db.api import PairRow
from nova_pmt.manager.db.engine import Engine
from nova_pmt.openstack import policy
from nova_pmt.openstack.failover import EVACUATES_S
from nova_pmt.openstack.follow import MAX_BACKOFF_S
from tests.unit.openstack.cloud import UUID
from tests.unit.openstack.test_follow import World


@pytest.fixture
def world(engine: Engine) -> World:
    """A server on a that is protected, with its standby on b."""
    made = World(engine)
    made.cloud.boot()
    made.go_on(10)
    made.demand_protected()
    made.cloud.calls.clear()
    return made


def pair(world: World) -> PairRow:
    found = world.database.pair(UUID)
    assert found is not None
    return found


# -- a failover -------------------------------------------------------------------------


def test_a_task_that_ended_with_the_old_host_holds_nobody_up(world: World) -> None:
    world.cloud.change(task_state="image_uploading")
    assert world.cloud.fail_over()
    world.go_on(60)
    world.demand_protected()


def test_a_standby_that_won_and_does_not_run_yet_is_not_evacuated_to(world: World) -> None:
    assert world.database.claim(UUID, pair(world).generation, "standby")
    world.cloud.dead.add("a")
    world.cloud.runs.pop(UUID)
    world.go_on(60)
    assert world.cloud.bound[UUID] == "b", "its packets do not wait for that"
    assert not {"force_down", "evacuate"} & set(world.cloud.calls)
    note = world.notes.note(UUID)
    assert note is not None and "is going on" in note.reason


def test_who_says_that_it_runs_and_is_wrong_is_not_evacuated_to(world: World) -> None:
    assert world.cloud.fail_over()
    world.cloud.runs.pop(UUID)
    world.go_on(60)
    assert "evacuate" not in world.cloud.calls
    world.cloud.runs[UUID] = "b"
    world.go_on(60)
    world.demand_protected()


def test_a_server_that_nova_saw_end_is_not_powered_off_where_it_runs(world: World) -> None:
    world.cloud.change(status="SHUTOFF")
    assert world.cloud.fail_over(dies=False)
    world.go_on(60)
    world.demand_protected()


def test_an_old_host_that_somebody_let_up_too_early_is_forced_down_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    evacuate = world.cloud.evacuate

    def let_up(uuid: str, host: str) -> None:
        monkeypatch.undo()
        world.cloud.forced.discard("a")
        evacuate(uuid, host)

    monkeypatch.setattr(world.cloud, "evacuate", let_up)
    assert world.cloud.fail_over(dies=False)
    world.go_on(60)
    world.demand_protected()
    assert world.cloud.forced == set()


def test_no_room_is_not_asked_for_again_and_again(world: World) -> None:
    world.cloud.room["b"] = 0
    assert world.cloud.fail_over()
    world.go_on(120)
    assert 2 <= world.cloud.calls.count("evacuate") <= 10


def test_a_standby_of_which_no_manager_took_note_gives_its_room_back(world: World) -> None:
    note = world.notes.note(UUID)
    assert note is not None
    assert world.notes.write(UUID, note.turn, standby="")  # the answer got lost
    world.cloud.room["b"] = 1
    assert world.cloud.fail_over()
    world.go_on(60)
    world.demand_protected()


def test_a_failover_that_overtakes_another_is_told_of_instead(world: World) -> None:
    cloud = world.cloud
    cloud.room["b"] = 0  # Nova does not get to it
    assert cloud.fail_over()
    world.go_on(10)
    standby = next(one for one in cloud.servers_.values() if one.uuid != UUID)
    cloud.protect("b", UUID, "c")
    assert cloud.fail_over()
    world.go_on(30)
    assert cloud.servers_[UUID].host == cloud.bound[UUID] == "c"
    assert standby.uuid not in cloud.servers_
    for host in ("a", "b"):
        cloud.room[host] = 2
        cloud.come_back(host)
    world.go_on(2 * MAX_BACKOFF_S)
    world.demand_protected()
    assert cloud.forced == set()


def test_a_server_that_is_moved_after_its_failover_stays_where_it_was_moved(world: World) -> None:
    cloud = world.cloud
    cloud.room = {"a": 3, "b": 3, "c": 0}
    assert cloud.fail_over()  # and there is no host for a new standby
    world.go_on(30)
    assert (cloud.servers_[UUID].host, pair(world).state) == ("b", "standby_active")
    cloud.come_back("a")
    cloud.room["c"] = 3
    world.go_on(4)
    cloud.stop()
    for standby in [one.uuid for one in cloud.servers_.values() if one.uuid != UUID]:
        cloud.delete(standby)
    cloud.change(host="a")
    cloud.allocations[UUID] = {"a"}
    cloud.runs[UUID] = cloud.bound[UUID] = "a"
    world.go_on(MAX_BACKOFF_S)
    world.demand_protected()
    assert cloud.servers_[UUID].host == "a"


def test_what_nova_and_the_arbiter_disagree_on_is_left_to_an_operator(world: World) -> None:
    world.cloud.change(host="c")
    assert world.cloud.fail_over()
    world.go_on(60)
    assert not {"rebind", "force_down", "evacuate"} & set(world.cloud.calls)
    note = world.notes.note(UUID)
    assert note is not None and "an operator has to decide" in note.reason


def test_a_server_that_is_deleted_while_it_fails_over_leaves_nothing(world: World) -> None:
    world.cloud.room["b"] = 0
    assert world.cloud.fail_over()
    world.go_on(10)
    world.cloud.remove()
    world.cloud.come_back("a")
    world.go_on(120)
    assert (world.cloud.servers_, world.cloud.forced, world.notes.notes()) == ({}, set(), [])
    assert pair(world).state == "unprotected", "nobody protects the guest of a deleted server"


def test_an_evacuation_that_nobody_goes_on_with_is_asked_for_again(world: World) -> None:
    """nova-compute was killed in the middle: Nova leaves the record at ``rebuilding``."""
    world.cloud.room["b"] = 0
    assert world.cloud.fail_over()
    world.go_on(10)
    world.cloud.change(status="ACTIVE", host="a", fault="", task_state="rebuilding")
    note = world.notes.note(UUID)
    assert note is not None
    world.notes.write(UUID, note.turn, step="await")
    world.cloud.room["b"] = 2
    world.go_on(EVACUATES_S - 20)
    assert world.cloud.servers_[UUID].task_state == "rebuilding"
    world.go_on(300)
    world.demand_protected()


def test_a_standby_server_that_somebody_deleted_is_made_again(world: World) -> None:
    """Meanwhile the agent of its server is at it, and so says that it is in a pair already."""
    (deleted,) = world.cloud.standbys(UUID)
    world.cloud.delete(deleted.uuid)
    world.database.transition(UUID, pair(world).generation, "primary_alone", host="a")
    world.follower.touch(UUID)
    world.go_on(30)
    (made,) = world.cloud.standbys(UUID)
    assert made.uuid != deleted.uuid  # its agent goes on from there


def stays_where_it_was(world: World) -> list[str]:
    """From now on Nova ends an evacuation's task, and does not write the new host; the hosts that
    it is asked to evacuate to."""
    evacuate: Callable[[str, str], None] = world.cloud.evacuate
    asked: list[str] = []

    def without_writing(uuid: str, host: str) -> None:
        evacuate(uuid, host)
        world.cloud.change(host="a")
        asked.append(host)

    world.cloud.evacuate = without_writing
    return asked


def test_nova_ends_its_task_before_it_writes_the_new_host(world: World) -> None:
    asked = stays_where_it_was(world)
    assert world.cloud.fail_over()
    world.go_on(3)
    note = world.notes.note(UUID)
    assert note is not None
    assert (note.step, note.attempts) == ("await", 0)
    world.cloud.change(host="b")
    world.go_on(60)
    world.demand_protected()
    assert asked == ["b"]


def test_each_attempt_has_its_own_time_to_be_written(world: World) -> None:
    asked = stays_where_it_was(world)
    assert world.cloud.fail_over()
    while len(asked) < 2:
        world.go_on(2)
    world.go_on(2)
    note = world.notes.note(UUID)
    assert note is not None
    assert (note.step, note.attempts) == ("await", 1)


def test_a_host_that_is_forced_down_anew_is_not_forgotten(world: World) -> None:
    """A failover begins while its host is let up after the one before."""
    cloud = world.cloud
    cloud.forced.add("a")
    world.notes.force("a", "service-a")
    let_up = cloud.force_down

    def force_down(service: str, down: bool) -> None:
        let_up(service, down)
        if not down:
            let_up(service, True)  # by the other failover

    cloud.force_down = force_down
    world.settling.sweep(frozenset({"a"}))
    assert "a" in world.notes.forced()


def test_packets_do_not_wait_for_a_turn(world: World) -> None:
    assert world.database.claim(UUID, pair(world).generation, "standby")
    world.follower.claimed(UUID)
    assert world.cloud.bound[UUID] == "b"
    assert world.cloud.calls == ["rebind"]


def test_a_claim_that_neutron_does_not_hear_of_harms_nobody(world: World) -> None:
    assert world.database.claim(UUID, pair(world).generation, "standby")
    world.cloud.trouble = (0, "fail")
    world.follower.claimed(UUID)
    world.cloud.runs[UUID] = world.cloud.waits.pop(UUID)
    world.database.transition(UUID, pair(world).generation, "standby_active", host="b")
    world.go_on(60)
    world.demand_protected()


def test_a_failover_does_not_wait_for_a_manager_that_is_at_the_old_guest(world: World) -> None:
    note = world.notes.note(UUID)
    assert note is not None
    assert world.notes.take(UUID, note.turn, "a-manager-that-waits-for-a-dead-host")
    assert world.cloud.fail_over()
    world.follower.touch(UUID)
    world.go_on(4)
    assert world.cloud.servers_[UUID].host == "b"


# -- wishes that change -----------------------------------------------------------------


def test_another_mode_is_another_pair(world: World) -> None:
    world.cloud.change(metadata={policy.PROPERTY: "kemari"})
    world.follower.touch(UUID)
    world.go_on(20)
    world.demand_protected()
    assert pair(world).strategy == "kemari"


def test_a_server_of_another_size_gets_a_standby_of_that_size(world: World) -> None:
    world.cloud.change(flavor="large")
    world.follower.touch(UUID)
    world.go_on(20)
    world.demand_protected()
    (standby,) = [one for one in world.cloud.servers_.values() if one.uuid != UUID]
    assert standby.flavor == "large"


@pytest.mark.parametrize("status", ["SHUTOFF", "SUSPENDED", "PAUSED"])
def test_a_server_that_stands_still_keeps_its_standbys_room_and_is_left_alone(
    world: World, status: str
) -> None:
    world.cloud._end(UUID)
    world.cloud.change(status=status)
    world.follower.touch(UUID)
    world.go_on(50)
    assert len(world.standbys()) == 1
    assert world.cloud.calls.count("server") < 10, "it is not looked at all the time"
    world.cloud.change(status="ACTIVE")
    world.follower.touch(UUID)
    world.go_on(10)
    world.demand_protected()


@pytest.mark.parametrize("status", ["SHELVED_OFFLOADED", "RESCUE"])
def test_a_server_that_is_away_has_no_standby(world: World, status: str) -> None:
    world.cloud._end(UUID)
    world.cloud.change(status=status)
    world.follower.touch(UUID)
    world.go_on(20)
    assert world.standbys() == []


def test_a_standby_that_nova_cannot_delete_now_does_not_keep_another_from_being_made(
    world: World,
) -> None:
    (standby,) = [one.uuid for one in world.cloud.servers_.values() if one.uuid != UUID]
    world.cloud.change(standby, task_state="deleting")
    world.cloud._end(UUID)
    world.cloud.room["b"] = 0
    world.follower.touch(UUID)
    world.go_on(20)
    assert world.cloud.waits[UUID] == "c"


def test_news_of_standbys_that_fail_does_not_make_more_of_them(world: World) -> None:
    """Nova tells of each that was made in vain; each time the server is looked at."""
    world.cloud._end(UUID)
    world.cloud.room = {"a": 1, "b": 0, "c": 0}
    (standby,) = [one.uuid for one in world.cloud.servers_.values() if one.uuid != UUID]
    world.cloud.delete(standby)
    world.cloud.calls.clear()
    for _ in range(100):
        world.follower.touch(UUID)
        world.go_on(2)
    assert world.cloud.calls.count("create") < 10
    told = [event for event in world.database.events(uuid=UUID) if event.new == "refused"]
    assert len(told) == 1, "the same reason is told once"


# -- whose wish -------------------------------------------------------------------------


def test_a_pair_that_an_operator_made_by_hand_is_left_alone(engine: Engine) -> None:
    world = World(engine)
    world.cloud.boot(metadata={})
    world.cloud.protect("a", UUID, "b")
    world.follower.touch(UUID)
    world.go_on(100)
    assert pair(world).state == "protected"
    assert world.follower.owned() == frozenset()
    assert world.cloud.fail_over()
    world.go_on(30)
    assert world.cloud.servers_[UUID].host == "b", "Nova has to know all the same"
    assert pair(world).state == "standby_active"


def test_a_standbys_mark_gets_nobody_out_of_what_a_flavor_demands(engine: Engine) -> None:
    world = World(engine)
    world.cloud.boot(metadata={policy.STANDBY: UUID}, extra_specs={policy.MODE: "pmt"})
    world.go_on(20)
    world.demand_protected()


def test_what_users_write_is_not_asked_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(engine)
    asked: list[str] = []
    monkeypatch.setattr(world.cloud, "server", asked.append)
    world.cloud.boot(metadata={policy.STANDBY: "../os-services"})
    world.go_on(10)
    assert set(asked) <= {UUID}


def test_a_property_that_does_not_count_is_told_once(engine: Engine) -> None:
    world = World(engine)
    said: list[tuple[Any, ...]] = []
    world.follower._announce = lambda *what: said.append(what)
    world.cloud.boot(extra_specs={policy.MODE: "off"})
    world.go_on(300)
    assert [(what, uuid) for what, uuid, _ in said] == [("unprotected", UUID)]
    assert "ft:mode=off" in said[0][2]
    (event,) = world.database.events(uuid=UUID)
    assert event.kind == "nova" and "ft:mode=off" in event.reason
    world.cloud.change(metadata={})
    world.go_on(70)
    assert world.notes.notes() == []


def test_what_is_done_is_in_the_audit_trail(world: World) -> None:
    assert world.cloud.fail_over()
    world.go_on(30)
    done = [event.new for event in world.database.events(uuid=UUID) if event.kind == "nova"]
    assert done == [
        "create", "protect",
        "rebind", "force_down", "free", "evacuate", "await", "delete",
        "create", "protect",
    ]  # fmt: skip


def test_an_agent_that_is_busy_with_the_pair_is_not_asked_all_the_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(engine)
    orders = []

    def protect(*arguments: Any) -> None:
        orders.append(arguments)
        raise exception.AlreadyProtected(UUID)

    monkeypatch.setattr(world.cloud, "protect", protect)
    world.cloud.boot()
    world.go_on(120)
    assert 2 <= len(orders) < 10
