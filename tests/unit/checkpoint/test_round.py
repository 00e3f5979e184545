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

"""Rounds step by step: order, failures at every step, synchronisation, spilling, deferral."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nova_pmt import exception
from nova_pmt.checkpoint.cache import SlabCache
from nova_pmt.checkpoint.loop import Loop
from nova_pmt.checkpoint.round import MAX_DEFERRALS, Checkpointer
from nova_pmt.checkpoint.strategies.base import StrategyOptions
from nova_pmt.checkpoint.strategies.pmt import PmtStrategy
from nova_pmt.replication.protocol import Type
from tests.unit.fakes.guest import FakeExecution, FakeMemory, Guest, pause_of
from tests.unit.fakes.world import World, small_slabs

PAGES = 120


class InjectedError(Exception):
    """Not one of ours: the code must not depend on the kind."""


@pytest.fixture(autouse=True)
def slabs() -> Iterator[None]:
    with small_slabs(16):
        yield


@pytest.fixture
def world() -> World:
    made = World(PAGES, 10)
    made.guest.write(range(60))
    made.synchronise()
    return made


# -- the order of a round ---------------------------------------------------------------


def test_pause_holds_the_wire_and_saves_before_it_resumes(world: World) -> None:
    world.guest.write(range(5))
    world.faults.calls.clear()
    world.round(passes=1)
    assert world.faults.calls == [
        "scan",  # the pass
        "copy",
        "hold",
        "pause",
        "scan",
        "cut",  # the network first: it is in the pause for the shortest time
        "disk.cut",
        "disk.cut",
        "saved",
        "resume",
        "go_on",
        "device_state",
        "send_pages",
        "send_commit",
    ]


def test_a_page_is_copied_into_its_own_slot_again(world: World) -> None:
    world.guest.write(range(10))
    world.checkpointer.copy_pass()
    world.guest.write(range(5, 15))
    world.checkpointer.copy_pass()
    assert world.cache.used_slabs == 1
    pause = world.round(passes=0)
    world.settle()
    world.check()
    assert sorted(np.concatenate(world.sender.numbers[2]).tolist()) == list(range(15))
    assert pause_of(world.standby.receiver.device_state) == pause


def test_nothing_written_is_a_checkpoint_without_pages(world: World) -> None:
    world.round()
    world.settle()
    assert world.checkpointer.committed == 2
    assert world.records[-1].pages == 0


def test_passes_leave_little_to_the_pause() -> None:
    world = World(PAGES, 10)
    world.synchronise()
    world.guest.write(range(50))
    world.round(passes=1)
    world.settle()
    assert (world.records[-1].pages, world.records[-1].pause_pages) == (50, 0)
    world.guest.write(range(50))
    world.round(passes=0)
    world.settle()
    assert (world.records[-1].pages, world.records[-1].pause_pages) == (50, 50)


def test_output_is_let_out_only_by_its_own_commit(world: World) -> None:
    world.late_commits = True
    world.round()
    world.round()
    while world.progress():
        pass
    world.checkpointer.pump()
    assert world.standby.acknowledged == [1, 2, 3]  # there already; the answers are under way
    assert world.output.released == [1]
    world.tell_commit()
    world.checkpointer.pump()
    assert world.output.released == [1, 2]
    world.settle()
    assert world.output.released == [1, 2, 3]


@pytest.mark.parametrize("epoch", [1, 3, 99])
def test_a_commit_out_of_turn_is_an_error_of_the_peer(world: World, epoch: int) -> None:
    world.late_commits = True
    world.round()
    world.round()
    with pytest.raises(exception.PeerError):
        world.checkpointer.commit(epoch)
    assert world.output.released == [1]


def test_records_tell_where_the_time_of_a_pause_went() -> None:
    now = [100.0]
    costs = {"pause": 0.001, "saved": 0.003, "resume": 0.0005}

    def passes(name: str) -> None:
        now[0] += costs[name]

    guest = Guest(20)
    execution = FakeExecution(guest)
    execution.clock_step = passes
    world = World(20, 2)
    records = []
    checkpointer = Checkpointer(
        FakeMemory(guest),
        execution,
        world.sender,
        SlabCache(0),
        on_round=records.append,
        clock=lambda: now[0],
    )
    checkpoint = checkpointer.capture()
    assert checkpoint is not None
    checkpointer.transfer(checkpoint)
    now[0] += 0.020
    checkpointer.commit(1)
    (record,) = records
    assert record.pause_us == pytest.approx(4500)
    assert record.stop_us == pytest.approx(1000)
    assert record.save_us == pytest.approx(3000)
    assert record.cont_us == pytest.approx(500)
    assert record.commit_us == pytest.approx(20_000)
    assert record.started_s == 100.0
    assert record.device_bytes == 18


def test_waiting_without_a_world_ends_by_the_clock() -> None:
    checkpointer = Checkpointer(
        FakeMemory(Guest(4)), FakeExecution(Guest(4)), World(4, 1).sender, SlabCache(0)
    )
    checkpointer.pump(0.01)
    heard: queue.SimpleQueue[int] = queue.SimpleQueue()
    checkpointer.post(lambda: heard.put(1))
    checkpointer.post(lambda: heard.put(2))
    checkpointer.pump(5.0)
    assert [heard.get(False), heard.get(False)] == [1, 2]


# -- failures ---------------------------------------------------------------------------


def calls_of(scenario: Callable[[World], object]) -> list[str]:
    """What the scenario calls when nothing fails."""
    world = prepared()
    start = len(world.faults.calls)
    scenario(world)
    return world.faults.calls[start:]


def prepared() -> World:
    world = World(PAGES, 10, chaos=0.05, seed=7, disk_sectors=(8,))
    world.guest.write(range(60))
    world.synchronise()
    world.guest.write(range(30, 100))
    return world


def one_round(world: World) -> None:
    world.checkpointer.copy_pass()
    world.guest.write(range(40, 60))
    world.round(passes=1)


def round_that_is_deferred(world: World) -> None:
    """The cache has no room in the pause, again and again, until it insists."""
    world.guest.meddle = None
    for _ in range(MAX_DEFERRALS + 1):
        world.guest.write(range(PAGES))
        checkpoint = world.checkpointer.capture()
    assert checkpoint is not None
    world.checkpointer.transfer(checkpoint)


def switchover(world: World) -> None:
    loop = Loop(world.checkpointer, world.execution, PmtStrategy(StrategyOptions()))
    loop.final_round(5.0)


def round_of_kemari(world: World) -> None:
    world.checkpointer.capture_and_commit()


def round_of_kemari_that_does_not_fit(world: World) -> None:
    """The guest stays paused while what does not fit goes through the cache in parts."""
    world.guest.meddle = None
    world.guest.write(range(PAGES))
    world.checkpointer.capture_and_commit()


SCENARIOS = [
    one_round,
    round_that_is_deferred,
    switchover,
    round_of_kemari,
    round_of_kemari_that_does_not_fit,
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_no_failure_at_any_step_leaves_the_guest_paused(
    scenario: Callable[[World], object], after: bool
) -> None:
    names = calls_of(scenario)
    assert {"pause", "scan", "saved", "copy", "send_pages", "send_commit"} <= set(names)
    for at, name in enumerate(names):
        world = prepared()
        world.faults.at = len(world.faults.calls) + at
        world.faults.after = after
        world.faults.error = InjectedError(name)
        try:
            scenario(world)
        except InjectedError:
            pass
        else:
            pytest.fail(f"the failure of {name} was swallowed")
        assert not world.guest.paused, f"paused after {name} failed"
        if name not in ("hold", "go_on"):
            assert not world.link.held, f"link held after {name} failed"
        world.check_image()


def test_a_guest_that_does_not_take_cont_is_told_twice(world: World) -> None:
    resumes = 0
    real = world.execution.resume

    def resume() -> None:
        nonlocal resumes
        resumes += 1
        if resumes == 1:
            raise exception.GuestError("no answer", code="QMP_TIMEOUT")
        real()

    world.execution.resume = resume  # type: ignore[method-assign]
    with pytest.raises(exception.GuestError, match="no answer"):
        world.checkpointer.capture()
    assert resumes == 2 and not world.guest.paused and not world.link.held


def test_qemu_gone_is_told_although_cont_fails_too(world: World) -> None:
    def gone() -> None:
        raise exception.GuestGone("QEMU has ended")

    world.execution.saved = gone  # type: ignore[method-assign]
    world.execution.resume = gone  # type: ignore[method-assign]
    with pytest.raises(exception.GuestGone):
        world.checkpointer.capture()
    assert not world.link.held


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not yet"])
def test_an_order_in_a_pause_of_kemari_lets_the_guest_run(world: World, committed: bool) -> None:
    """It is handled behind the commit, or instead of it; either way the round counts once."""
    rounds, epoch = len(world.records), world.checkpointer.epoch
    world.guest.write(range(30))
    if committed:
        real = world.checkpointer.commit

        def commit(number: int) -> None:
            real(number)
            raise OrderedError

        world.checkpointer.commit = commit  # type: ignore[method-assign]
    else:
        world.checkpointer.post(order)
    with pytest.raises(OrderedError):
        world.checkpointer.capture_and_commit()
    world.checkpointer.__dict__.pop("commit", None)
    assert not world.guest.paused
    assert not world.checkpointer.standing
    switchover(world)
    world.settle()
    assert [record.epoch for record in world.records[rounds:]] == [epoch, epoch + 1]
    world.check_image()


# -- orders that come in between --------------------------------------------------------


class OrderedError(Exception):
    """As the worker posts them."""


def order() -> None:
    raise OrderedError


def test_an_order_in_a_waiting_pass_loses_no_page(world: World) -> None:
    """A switchover is ordered while a pass waits for room: the final round has every page."""
    world.guest.write(range(PAGES))
    world.checkpointer.post(order)
    with pytest.raises(OrderedError):
        world.checkpointer.copy_pass()
    switchover(world)
    world.settle()
    assert world.checkpointer.in_flight == 0
    world.execution.resume()
    world.check()


def test_switchover_is_refused_before_the_first_commit() -> None:
    """The first synchronisation was cut short: the standby's memory is not whole."""
    world = World(PAGES, 10)
    world.guest.write(range(PAGES))
    world.checkpointer.post(order)
    with pytest.raises(OrderedError):
        world.checkpointer.synchronise()
    with pytest.raises(exception.NotReady):
        switchover(world)
    assert not world.guest.paused


def test_switchover_leaves_the_guest_paused_and_everything_committed(world: World) -> None:
    world.guest.write(range(70))
    switchover(world)
    assert world.guest.paused
    assert world.checkpointer.committed == world.execution.pauses == 2
    world.execution.resume()
    world.check()


def test_switchover_without_an_answer_lets_the_guest_run_on(world: World) -> None:
    ticks = iter(range(1000))
    loop = Loop(
        world.checkpointer,
        world.execution,
        PmtStrategy(StrategyOptions()),
        clock=lambda: float(next(ticks)),
    )
    world.link.broken = True
    with pytest.raises(exception.PeerLost):
        loop.final_round(5.0)
    assert not world.guest.paused


def test_link_loss_in_a_pause_that_waits_lets_the_guest_run_on(world: World) -> None:
    """The cache is full of what is in flight, and the pause insists."""

    def lost() -> None:
        raise exception.PeerLost("gone")

    world.late_commits = True
    world.guest.write(range(PAGES))
    world.checkpointer.post(lost)
    with pytest.raises(exception.PeerLost):
        world.checkpointer.capture(resume=False)
    assert not world.guest.paused and not world.link.held


# -- a cache that is too small ----------------------------------------------------------


def test_a_pause_that_finds_no_room_is_given_up_and_tried_again(world: World) -> None:
    world.guest.write(range(PAGES))
    world.faults.calls.clear()
    assert world.checkpointer.capture() is None
    assert "cut" not in world.faults.calls
    assert not world.guest.paused
    assert world.checkpointer.statistics.deferred == 1
    world.round()
    world.settle()
    world.check()
    assert world.checkpointer.committed == 2


def test_after_some_deferrals_the_pause_lasts_until_all_is_through(world: World) -> None:
    for _ in range(MAX_DEFERRALS):
        world.guest.write(range(PAGES))
        assert world.checkpointer.capture() is None
    world.guest.write(range(PAGES))
    checkpoint = world.checkpointer.capture()
    assert checkpoint is not None
    assert not world.guest.paused and not world.link.held
    world.checkpointer.transfer(checkpoint)
    world.settle()
    world.check()
    # and the next time it is patient again
    world.guest.write(range(PAGES))
    assert world.checkpointer.capture() is None


def test_a_pause_that_waits_for_room_stays_one_though_output_presses(world: World) -> None:
    """The guest is stopped already: it is neither stopped again, nor let run before the end."""
    for _ in range(MAX_DEFERRALS):
        world.guest.write(range(PAGES))
        assert world.checkpointer.capture() is None
    world.guest.write(range(PAGES))
    world.output.pressure = 0.95
    world.output.broken = "who asks reads the monitor, where the answer to the save is to come"
    world.faults.calls.clear()
    checkpoint = world.checkpointer.capture()
    assert checkpoint is not None
    world.output.broken = ""
    assert not {"hold guest", "running"} & set(world.faults.calls)
    assert world.faults.calls.count("resume") == 1
    world.checkpointer.transfer(checkpoint)
    world.settle()
    world.check()


def test_a_pass_larger_than_the_cache_is_sent_in_parts(world: World) -> None:
    world.guest.write(range(PAGES))
    before = world.sender.spilled
    world.checkpointer.copy_pass()
    assert world.sender.spilled > before
    assert world.cache.backed_slabs <= world.cache.limit_slabs == 4
    # pages of what was spilled, written again: the last copy counts
    world.guest.write(range(0, PAGES, 3))
    world.round(passes=1)
    world.settle()
    world.check()


def test_a_pass_waits_for_a_commit_when_everything_is_in_flight(world: World) -> None:
    world.late_commits = True
    world.guest.write(range(64))
    world.round(passes=1)
    assert world.cache.available_slabs == 0
    world.guest.write(range(20))
    world.checkpointer.copy_pass()
    assert world.checkpointer.throttled
    assert world.checkpointer.committed == 2


# -- the first synchronisation ----------------------------------------------------------


def synchronised(world: World) -> list[tuple[int, int]]:
    progress: list[tuple[int, int]] = []
    world.synchronise(lambda done, total: progress.append((done, total)))
    world.check()
    return progress


@pytest.mark.parametrize("chaos", [0.0, 0.02])
@pytest.mark.parametrize("late", [False, True])
def test_synchronisation_brings_a_guest_far_larger_than_the_cache(chaos: float, late: bool) -> None:
    world = World(1000, 50, chaos=chaos, seed=3, late_commits=late)
    world.guest.write(range(1000))
    progress = synchronised(world)
    assert world.checkpointer.committed == 1
    assert progress[-1] == (1000, 1000)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(progress))
    assert {total for _, total in progress} == {1000}
    assert world.cache.peak_slabs <= 4


def test_pages_of_zeros_are_not_sent() -> None:
    world = World(400, 20)
    world.guest.write(range(400), zeros=True)
    world.guest.write(range(100, 110))
    progress = synchronised(world)
    assert progress[-1] == (400, 400)
    assert world.checkpointer.sent_pages == 10
    sent = sum(header.value for header in world.standby.frames if header.type is Type.PAGES)
    assert sent == 10


def test_pages_never_touched_are_not_even_looked_at() -> None:
    world = World(1000, 20)
    world.guest.write(range(5))
    assert synchronised(world) == [(5, 5)]


def test_a_page_that_becomes_zero_again_is_sent_as_zero() -> None:
    world = World(PAGES, 10)
    world.guest.write(range(20))
    world.copy_disks()
    world.checkpointer.synchronise()
    world.guest.write(range(20), zeros=True)
    world.round()
    world.settle()
    world.check()
    assert not world.standby.image.contents()[:20].any()


def test_synchronisation_keeps_to_its_window_while_the_guest_writes() -> None:
    """Three slabs here, of a cache of forty: the rest is for rounds."""
    world = World(PAGES * 5, 10, cache_slabs=40)
    world.guest.write(range(PAGES * 5))
    seen = []
    real = world.wait

    def wait(timeout_s: float) -> None:
        seen.append(world.cache.used_slabs)
        if len(seen) % 2:
            world.guest.write(range(PAGES * 4))
        real(timeout_s)

    world.wait = wait  # type: ignore[method-assign]
    world.checkpointer.synchronise()
    assert seen and max(seen) <= 3


def test_synchronisation_ends_although_the_guest_never_rests() -> None:
    world = World(500, 10, chaos=0.3, seed=1)
    world.guest.write(range(500))
    synchronised(world)
    assert world.checkpointer.committed == 1


def test_an_empty_guest_is_synchronised_at_once() -> None:
    world = World(PAGES, 10)
    assert synchronised(world) == []
    assert world.checkpointer.committed == 1


# -- the cache follows the state --------------------------------------------------------


@pytest.mark.parametrize("passes", [0, 2])
def test_cache_is_small_again_thirty_rounds_after_a_burst(passes: int) -> None:
    world = World(2600, 10, cache_slabs=400, staging_slabs=400, disk_sectors=())
    world.synchronise()
    world.guest.write(range(2500))  # 157 slabs of 16 pages; as 40,000 pages are of real ones
    world.round(passes)
    world.settle()
    peak = world.cache.backed_slabs
    assert peak >= 157
    for number in range(30):
        world.guest.write(range(number, number + 20))
        world.round(passes)
        world.settle()
    assert world.cache.backed_slabs < peak / 4
    world.check()
