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

"""Disks in a round: the first copy of a disk that is written, logs, and failures in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from nova_pmt import exception
from nova_pmt.replication.protocol import Type
from tests.unit.fakes.disk import SECTOR
from tests.unit.fakes.world import BLOCK, DISK_WINDOW, World, small_slabs

PAGES = 60
DATA = (Type.BLOCK, Type.LOG)


@pytest.fixture(autouse=True)
def slabs() -> Iterator[None]:
    with small_slabs(16):
        yield


def quiet(**members: object) -> World:
    """A world in which only the test does something."""
    return World(PAGES, 5, **members)  # type: ignore[arg-type]


def kinds(world: World) -> list[Type]:
    """Frames of disks in the order in which they came in."""
    return [header.type for header in world.standby.frames if header.type in DATA]


# -- everything at once -----------------------------------------------------------------


def test_disks_are_right_at_every_commit_whatever_comes_in_between() -> None:
    """And it is looked at whether what may come in between did: else this proves nothing."""
    ahead = cut = rewritten = discards = 0
    for seed in range(12):
        world = World(PAGES, 5, seed=seed, chaos=0.1, late_commits=seed % 2 == 0)
        world.guest.write(range(PAGES // 2))
        world.copy_disks()
        rewritten += sum(len(disk._log) for disk in world.disks)
        world.checkpointer.synchronise()
        for _ in range(6):
            world.write_disks()
            world.round(passes=1)
            for _ in range(world.rng.randrange(20)):
                world.progress()
            world.check()
        world.settle()
        world.check()
        order = kinds(world)
        ahead += Type.LOG in order[: len(order) - order[::-1].index(Type.BLOCK)]
        logs = [header for header in world.standby.frames if header.type is Type.LOG]
        cut += sum(bool(header.length % SECTOR) for header in logs)
        discards += world.discards
        assert world.checkpointer.committed >= 6
        assert world.checkpointer.statistics.log_bytes_total > 0
    assert ahead >= 6, "logs are hardly ever sent while blocks are copied"
    assert rewritten >= 100_000, "the guest hardly writes while it is copied"
    assert cut >= 100, "entries are hardly ever cut"
    assert discards >= 20


# -- the first copy ---------------------------------------------------------------------


def copying(world: World, between: Callable[[], None]) -> None:
    """First synchronisation, in which something happens between a block's reading and sending."""

    def blocks() -> Iterator[tuple[int, int, memoryview]]:
        for block in World.blocks(world):
            between()
            yield block

    world.blocks = blocks  # type: ignore[method-assign]
    world.synchronise()
    world.check()


def test_a_log_that_overtakes_an_older_block_would_be_found_out() -> None:
    """The order that must not be: this world and its check notice it."""
    world = quiet()

    def overtake() -> None:
        if not len(world.disks[0]._log):
            world.disks[0].write(0, 1)
            world.checkpointer.send_logs_ahead()

    with pytest.raises(AssertionError, match="disk 0 is not what it was at pause 1"):
        copying(world, overtake)


def test_what_is_written_after_its_block_was_read_follows_it() -> None:
    world = quiet()
    copying(world, lambda: world.disks[0].write(0, 2))
    assert set(kinds(world)) == set(DATA)


def test_a_disk_at_rest_is_copied_once_and_its_guest_is_stopped_once() -> None:
    world = quiet()
    progress: list[tuple[int, int]] = []
    world.copy_disks(lambda done, total: progress.append((done, total)))
    assert "hold guest" not in world.faults.calls
    world.checkpointer.synchronise()
    world.round()
    world.settle()
    world.check()
    assert kinds(world) == [Type.BLOCK] * len(progress)
    total = sum(len(disk.data) for disk in world.disks)
    assert progress[-1] == (total, total)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(progress))
    assert world.faults.calls.count("hold guest") == 1  # for what the logs may have at the end


def test_blocks_are_read_no_faster_than_they_are_sent() -> None:
    world = quiet(disk_sectors=(600,))
    under_way = most = 0
    real = world.sender.send_block

    def send_block(disk, offset, data, sent):  # type: ignore[no-untyped-def]
        nonlocal under_way, most

        def done() -> None:
            nonlocal under_way
            under_way -= len(data)
            sent()

        under_way += len(data)
        most = max(most, under_way)
        real(disk, offset, data, done)

    world.sender.send_block = send_block  # type: ignore[method-assign]
    world.synchronise()
    world.check()
    assert DISK_WINDOW - BLOCK < most <= DISK_WINDOW + BLOCK


def test_logs_are_read_no_faster_than_they_are_sent() -> None:
    world = quiet()
    world.copy_disks()
    for _ in range(20):
        world.disks[1].write(0, 30)
    world.checkpointer.send_logs_ahead()
    waiting = sum(len(frame._data) for frame in world.link._queue)  # type: ignore[attr-defined]
    assert waiting <= DISK_WINDOW + BLOCK


def test_the_first_copy_keeps_to_its_rate_and_relieves_the_logs_meanwhile() -> None:
    world = quiet(disk_sectors=(100,))
    now = 0.0
    world.checkpointer._clock = lambda: now
    real = world.wait

    def wait(timeout_s: float) -> None:
        nonlocal now
        if timeout_s < 1.0 and not world.guest.paused:  # for the rate, not for room
            now += timeout_s
            world.disks[0].write(0, 4)
            world.link.step()
        else:
            real(timeout_s)

    world.wait = wait  # type: ignore[method-assign]
    world.disks[0].logging = True
    world.checkpointer.copy_disks(world, bytes_per_s=10_000)
    assert now == pytest.approx(100 * SECTOR / 10_000, rel=0.02)
    assert world.faults.calls.count("hold guest") > 3
    assert world.disks[0].pressure < 0.25
    world.wait = real  # type: ignore[method-assign]
    world.checkpointer.synchronise()
    world.round()
    world.settle()
    world.check()


def test_logs_are_relieved_while_memory_is_copied() -> None:
    world = quiet()
    world.guest.write(range(PAGES))
    world.copy_disks()
    stops = world.faults.calls.count("hold guest")
    most = 0.0

    def write(_done: int, _total: int) -> None:
        nonlocal most
        world.disks[1].write(0, 28)
        most = max(most, world.disks[1].pressure)

    world.checkpointer.synchronise(write)
    assert world.faults.calls.count("hold guest") - stops >= 3
    assert most < 0.5
    world.round()
    world.settle()
    world.check()


def test_logs_keep_to_their_limit_though_the_guest_writes_faster_than_the_wire() -> None:
    """What they hold is memory of the host: the guest has to wait for the wire."""
    world = quiet(disk_sectors=(40,))
    world.guest.write(range(PAGES))
    (disk,) = world.disks
    real = world.wait

    def wait(timeout_s: float) -> None:
        if not world.guest.paused:
            disk.write(0, 20)
        assert disk.pressure <= 1.2, "the log grows without end"
        real(timeout_s)

    world.wait = wait  # type: ignore[method-assign]
    world.copy_disks()
    world.checkpointer.synchronise()


def test_a_disk_that_is_only_read_is_copied_and_has_no_log() -> None:
    world = World(PAGES, 5, chaos=0.1, seed=3, disk_sectors=(24, 60), readonly=(0,))
    world.synchronise()
    for _ in range(5):
        world.write_disk()
        world.round()
        world.settle()
        world.check()
    disks = {header.value >> 56 for header in world.standby.frames if header.type is Type.LOG}
    assert disks == {1}


def test_without_disks_the_guest_is_stopped_for_checkpoints_only() -> None:
    world = quiet(disk_sectors=())
    world.synchronise()
    assert "hold guest" not in world.faults.calls
    world.check()


def test_a_guest_that_its_operator_paused_is_copied_and_stays_paused() -> None:
    world = quiet()
    world.execution.paused_by_operator = True
    world.guest.paused = True
    world.disks[1].limit = 1  # pressed from the first byte on
    world.copy_disks()
    world.checkpointer.send_logs_ahead()
    assert world.guest.paused
    assert not {"resume", "hold guest"} & set(world.faults.calls)


def test_a_broken_log_ends_the_first_copy() -> None:
    world = quiet()
    world.disks[1].broken = "no space left"
    with pytest.raises(exception.GuestError, match="no space left") as caught:
        world.copy_disks()
    assert caught.value.code == "OUTPUT_BUFFER_BROKEN"


class InjectedError(Exception):
    """Not one of ours."""


def first_synchronisation(at: int | None = None, after: bool = False) -> World:
    world = World(20, 5, seed=11, disk_sectors=(24,))
    world.guest.write(range(20))
    if at is not None:
        world.faults.at = len(world.faults.calls) + at
        world.faults.after = after
        world.faults.error = InjectedError(str(at))
    real = World.blocks(world)

    def blocks() -> Iterator[tuple[int, int, memoryview]]:
        for block in real:
            yield block
            world.disks[0].write(0, 8)

    world.blocks = blocks  # type: ignore[method-assign]
    try:
        world.synchronise()
    except InjectedError:
        assert at is not None
    else:
        assert at is None, f"the failure of {world.faults.calls[at]} was swallowed"
    return world


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_no_failure_in_the_first_synchronisation_leaves_the_guest_paused(after: bool) -> None:
    names = first_synchronisation().faults.calls
    assert {"send_block", "hold guest", "disk.cut", "segment", "send_log", "disk.release"} < set(
        names
    )
    stopped = []
    for at, name in enumerate(names[: names.index("pause")]):
        world = first_synchronisation(at, after)
        if world.guest.paused or (world.link.held and name != "hold"):
            stopped.append(name)
    assert not stopped, "the guest stays stopped when these fail"


# -- rounds -----------------------------------------------------------------------------


def test_a_round_counts_what_its_logs_had() -> None:
    world = quiet()
    world.synchronise()
    total = world.checkpointer.statistics.log_bytes_total
    world.disks[0].write(3, 2)
    world.disks[1].write(3, 5, discard=True)
    world.round()
    world.settle()
    assert world.records[-1].log_bytes == (1 + 2) * SECTOR + SECTOR
    assert world.checkpointer.statistics.log_bytes_total == total + 4 * SECTOR
    assert world.checkpointer.statistics.summary()["log_bytes_total"] == total + 4 * SECTOR


def test_a_log_is_freed_only_by_its_own_commit() -> None:
    world = quiet(late_commits=True)
    world.synchronise()
    for _ in range(2):
        world.disks[0].write(0, 1)
        world.round()
    while world.progress():
        pass
    world.checkpointer.pump()
    assert world.standby.acknowledged == [1, 2, 3]  # there already; the answers are under way
    assert list(world.disks[0].waiting) == [2, 3]
    world.tell_commit()
    world.checkpointer.pump()
    assert list(world.disks[0].waiting) == [3]


def test_a_commit_out_of_turn_frees_no_log() -> None:
    world = quiet(late_commits=True)
    world.synchronise()
    world.round()
    world.round()
    with pytest.raises(exception.PeerError):
        world.checkpointer.commit(3)
    assert list(world.disks[0].waiting) == [2, 3]


def test_logs_go_out_between_the_pages_and_the_commit_of_their_checkpoint() -> None:
    world = quiet()
    world.synchronise()
    world.standby.frames.clear()
    world.guest.write(range(3))
    world.disks[0].write(0, 3)
    world.round()
    world.settle()
    assert [(h.type, h.epoch) for h in world.standby.frames] == [
        (Type.PAGES, 2), (Type.LOG, 2), (Type.LOG, 2), (Type.LOG, 2), (Type.COMMIT, 2)
    ]  # fmt: skip
    world.check()
