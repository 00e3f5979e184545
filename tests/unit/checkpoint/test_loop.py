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

"""When the loop pauses the guest, and when it holds back; on a clock that only the test moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.checkpoint.loop import PAUSED_POLL_S, PRESSURE_POLL_S, Loop
from nova_pmt.checkpoint.strategies.base import Strategy, StrategyOptions
from nova_pmt.checkpoint.strategies.kemari import KemariStrategy
from nova_pmt.checkpoint.strategies.pmt import PmtStrategy
from tests.unit.fakes.disk import SECTOR
from tests.unit.fakes.guest import FakeOutput
from tests.unit.fakes.world import World, small_slabs

INTERVAL_S = 0.050
#: Seconds that each of stop, save and cont takes.
STEP_S = 0.001


@pytest.fixture(autouse=True)
def slabs() -> Iterator[None]:
    with small_slabs(16):
        yield


class TimedWorld(World):
    """A world in which time goes by while somebody waits, and the wire has a speed.

    :param bytes_per_s: of the wire.
    :param options: of the strategy.
    """

    def __init__(
        self,
        bytes_per_s: float = 1e9,
        *,
        depth: int = 2,
        cache_slabs: int = 64,
        strategy: type[Strategy] = PmtStrategy,
        **options: float,
    ) -> None:
        self.now = 0.0
        self.bytes_per_s = bytes_per_s
        self.credit = 0.0
        self.depth = depth
        self.at: list[tuple[float, Callable[[], None]]] = []
        super().__init__(400, 10, cache_slabs=cache_slabs)
        self.execution.clock_step = self.pass_time
        given: dict[str, Any] = {"interval_ms": INTERVAL_S * 1e3, "passes": 2, **options}
        self.strategy = strategy(StrategyOptions(**given))
        for disk in self.disks:
            disk.clock = lambda: self.now
        self.loop = Loop(
            self.checkpointer,
            self.execution,
            self.strategy,
            depth=depth,
            clock=lambda: self.now,
        )
        self.checkpointer._clock = lambda: self.now
        self.flying_at_pause: list[int] = []
        self.throttled_at: list[float] = []

    def pass_time(self, name: str) -> None:
        if name == "pause":
            self.flying_at_pause.append(self.checkpointer.in_flight)
        self.now += STEP_S

    def wait(self, timeout_s: float) -> None:
        passed = min(timeout_s, 0.001)
        self.now += passed
        # A wire without a speed limit keeps no credit from the time it was idle.
        self.credit = min(self.credit + passed * self.bytes_per_s, 100_000_000)
        while self.credit > 0 and self.link.step(20_000):
            self.credit -= 20_000
        if self.credit > 0:
            self.credit = 0
        while self.link.settle() or self.tell_commit():
            pass
        if self.checkpointer.throttled:
            self.throttled_at.append(self.now)
        for due, action in [event for event in self.at if event[0] <= self.now]:
            self.at.remove((due, action))
            action()

    def synchronise(self, progress: Callable[[int, int], None] | None = None) -> None:
        self.copy_disks()
        self.loop.synchronise(progress)

    def run_for(self, seconds: float) -> None:
        self.at.append((self.now + seconds, lambda: self.checkpointer.post(self.loop.end)))
        self.loop.run()

    def load(self, every_s: float, pages: range) -> None:
        """From now on the guest writes these pages again and again."""

        self.loaded = True

        def write() -> None:
            if not self.guest.paused:
                self.guest.write(pages)
            if self.loaded:
                self.at.append((self.now + every_s, write))

        write()

    def unload(self) -> None:
        """The guest rests from now on."""
        self.loaded = False

    def starts(self) -> list[float]:
        return [record.started_s for record in self.records]


def test_first_synchronisation_ends_with_its_commit() -> None:
    world = TimedWorld()
    world.guest.write(range(300))
    world.synchronise()
    assert world.checkpointer.committed == 1
    world.check()


def test_pauses_start_at_the_interval() -> None:
    world = TimedWorld()
    world.synchronise()
    world.load(0.01, range(30))
    world.run_for(2.0)
    starts = world.starts()[1:]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert len(gaps) > 30
    assert all(gap == pytest.approx(INTERVAL_S, abs=0.003) for gap in gaps)
    assert not world.throttled_at
    assert world.checkpointer.statistics.throttled_rounds == 0
    world.settle()
    world.check()


def test_time_of_passes_is_taken_off_the_wait() -> None:
    world = TimedWorld()
    world.synchronise()
    scan = world.memory.scan

    def slow_scan():  # type: ignore[no-untyped-def]
        world.now += 0.005
        return scan()

    world.memory.scan = slow_scan  # type: ignore[method-assign]
    world.run_for(4.0)
    starts = world.starts()[40:]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(gap == pytest.approx(INTERVAL_S, abs=0.004) for gap in gaps)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_slow_wire_holds_the_next_pause_but_not_the_guest(depth: int) -> None:
    world = TimedWorld(2_000_000, depth=depth, cache_slabs=100)  # 300 pages take 0.6 s
    world.synchronise()
    world.throttled_at.clear()
    world.load(0.01, range(300))
    world.run_for(6.0)
    assert len(world.records) < 15  # twenty times a second without the hold
    assert max(world.flying_at_pause) == depth - 1
    assert world.throttled_at
    assert world.checkpointer.statistics.throttled_rounds >= 3
    assert all(record.pause_us < 10_000 for record in world.records)
    world.settle()
    world.check()


def test_the_throttle_is_let_go_when_the_load_ends() -> None:
    world = TimedWorld(2_000_000)
    world.synchronise()
    world.load(0.01, range(300))
    world.at.append((3.0, world.unload))
    world.at.append((10.0, lambda: world.checkpointer.post(world.loop.end)))
    world.loop.run()
    assert not world.checkpointer.throttled
    last = world.starts()[-5:]
    gaps = [b - a for a, b in itertools.pairwise(last)]
    assert all(gap == pytest.approx(INTERVAL_S, abs=0.003) for gap in gaps)


def test_a_full_cache_holds_the_next_pause() -> None:
    """One checkpoint fills the cache: its commit must come first, whatever the depth."""
    world = TimedWorld(2_000_000, depth=8, cache_slabs=8)
    world.synchronise()
    world.load(0.01, range(100))
    world.run_for(4.0)
    assert max(world.flying_at_pause) <= 1
    assert world.checkpointer.statistics.throttled_rounds >= 3
    assert world.cache.peak_slabs <= 8
    world.settle()
    world.check()


def test_a_guest_that_its_operator_paused_stays_paused() -> None:
    world = TimedWorld()
    world.synchronise()
    world.run_for(0.3)
    rounds = world.execution.pauses
    world.execution.paused_by_operator = True
    world.loop = Loop(world.checkpointer, world.execution, world.strategy, clock=lambda: world.now)
    world.at.append((world.now + 10 * PAUSED_POLL_S, lambda: None))
    looks = len(world.faults.calls)
    world.run_for(0.5)
    assert world.execution.pauses == rounds
    assert world.loop.guest_running is False
    assert set(world.faults.calls[looks:]) == {"running"}
    world.execution.paused_by_operator = False
    world.loop = Loop(world.checkpointer, world.execution, world.strategy, clock=lambda: world.now)
    world.run_for(0.3)
    assert world.loop.guest_running is True
    assert world.execution.pauses > rounds


def test_end_is_obeyed_while_the_wire_stands_still() -> None:
    world = TimedWorld()
    world.synchronise()
    world.link.broken = True
    world.run_for(1.0)
    assert world.checkpointer.in_flight == 2


def test_a_lost_peer_ends_the_loop_with_its_error() -> None:
    world = TimedWorld()
    world.synchronise()

    def lost() -> None:
        raise exception.PeerLost("silent")

    world.at.append((0.4, lambda: world.checkpointer.post(lost)))
    with pytest.raises(exception.PeerLost):
        world.loop.run()
    assert not world.guest.paused


def test_garbage_is_collected_between_rounds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    collections = []
    world = TimedWorld()
    monkeypatch.setattr(
        "nova_pmt.checkpoint.loop.gc.collect", lambda _gen: collections.append(world.guest.paused)
    )
    world.synchronise()
    world.run_for(INTERVAL_S * 140)
    assert collections == [False, False]


# -- output that fills up ---------------------------------------------------------------


def protected(**members: float) -> TimedWorld:
    """A world after its first synchronisation, whose wire can be stopped."""
    world = TimedWorld(**members)  # type: ignore[arg-type]
    world.synchronise()
    world.faults.calls.clear()
    return world


def fill(world: TimedWorld, after_s: float, pressure: float) -> None:
    """Some time from now network output fills up; a commit empties it."""

    def empty(_epoch: int) -> None:
        world.output.pressure = 0.0

    world.output.on_release = empty
    world.at.append((world.now + after_s, lambda: setattr(world.output, "pressure", pressure)))


def back_to_the_interval(starts: list[float]) -> None:
    """Until the early round's commit is there a few more may follow; then the interval counts."""
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    short = [gap for gap in gaps if gap < INTERVAL_S - 0.003]
    assert len(short) <= 2
    assert len(gaps) - len(short) >= 2


@pytest.mark.parametrize("pressure", [0.5, 0.89])
def test_output_that_fills_up_starts_a_round_early(pressure: float) -> None:
    world = protected()
    begin = world.now
    fill(world, 0.010, pressure)
    world.run_for(0.200)
    first, *others = world.starts()[1:]
    assert first - begin == pytest.approx(0.010 + PRESSURE_POLL_S, abs=PRESSURE_POLL_S)
    back_to_the_interval(others)
    assert "hold guest" not in world.faults.calls


def test_output_below_the_mark_waits_for_the_interval() -> None:
    world = protected()
    begin = world.now
    fill(world, 0.005, 0.49)
    world.run_for(0.200)
    assert world.starts()[1] - begin == pytest.approx(INTERVAL_S, abs=0.003)


def test_a_disk_log_that_fills_up_starts_a_round_early() -> None:
    world = protected()
    begin = world.now
    disk = world.disks[0]
    disk.limit = 40 << 10
    world.at.append((world.now + 0.010, lambda: [disk.write(0, 24) for _ in range(2)]))
    world.run_for(0.200)
    first, *others = world.starts()[1:]
    assert first - begin < 0.010 + 2 * PRESSURE_POLL_S
    back_to_the_interval(others)
    assert world.records[1].log_bytes == 2 * 25 * 512
    assert disk.pressure == 0


def congested(pressure: float) -> TimedWorld:
    """Two checkpoints are under way, and the wire stands still."""
    world = protected()
    world.link.broken = True
    world.run_for(4 * INTERVAL_S)
    assert world.checkpointer.in_flight == 2
    world.loop = Loop(world.checkpointer, world.execution, world.strategy, clock=lambda: world.now)
    world.faults.calls.clear()
    fill(world, 0.0, pressure)
    return world


def repair(world: TimedWorld) -> None:
    world.link.broken = False


def test_full_output_stops_the_guest_until_a_commit_makes_room() -> None:
    world = congested(0.9)
    stopped: list[tuple[float, bool]] = []
    for at in (0.2, 0.5):
        world.at.append((world.now + at, lambda: stopped.append((world.now, world.guest.paused))))
    world.at.append((world.now + 0.6, lambda: repair(world)))
    rounds, throttled = world.execution.pauses, world.checkpointer.statistics.throttled_rounds
    world.run_for(1.0)
    assert [paused for _, paused in stopped] == [True, True]
    assert world.faults.calls.count("hold guest") == 1
    assert not world.guest.paused
    assert world.execution.pauses > rounds + 5  # and on it goes
    assert world.checkpointer.statistics.throttled_rounds == throttled + 1
    world.settle()
    world.check()


def test_a_guest_that_was_stopped_runs_on_as_soon_as_there_is_room() -> None:
    """A buffer may get room by itself; the wait for the wire goes on."""
    world = congested(0.95)
    seen: list[bool] = []
    for number, pressure in enumerate((0.89, 0.51, 0.49, 0.89, 0.9, 0.0)):
        at = world.now + 0.1 * (number + 1)
        world.at.append((at, lambda to=pressure: setattr(world.output, "pressure", to)))
        world.at.append((at + 0.05, lambda: seen.append(world.guest.paused)))
    world.run_for(1.0)
    assert seen == [True, True, False, False, True, False]
    assert world.checkpointer.in_flight == 2


def test_output_that_is_not_full_lets_the_guest_run_while_the_wire_stands_still() -> None:
    world = congested(0.89)
    world.at.append((world.now + 0.6, lambda: repair(world)))
    world.run_for(1.0)
    assert "hold guest" not in world.faults.calls
    world.settle()
    world.check()


@pytest.mark.parametrize("last", [exception.PeerLost("silent"), KeyError("x"), None], ids=repr)
def test_a_guest_that_was_stopped_runs_on_whatever_ends_the_wait(last: Exception | None) -> None:
    world = congested(0.95)
    seen: list[bool] = []

    def ends() -> None:
        seen.append(world.guest.paused)
        if last is None:
            world.loop.end()
        else:
            raise last

    world.at.append((world.now + 0.3, lambda: world.checkpointer.post(ends)))
    if last is None:
        world.loop.run()
    else:
        with pytest.raises(type(last)):
            world.loop.run()
    assert seen == [True]
    assert not world.guest.paused


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_stop_that_fails_leaves_the_guest_running(after: bool) -> None:
    world = congested(0.95)
    looks = world.faults.calls.index("running") if "running" in world.faults.calls else 0
    world.faults.at = looks + 1  # running, then stop
    world.faults.after = after
    world.faults.error = exception.GuestError("no answer", code="QMP_TIMEOUT")
    with pytest.raises(exception.GuestError, match="no answer"):
        world.run_for(1.0)
    assert world.faults.calls[world.faults.at] == "hold guest"
    assert not world.guest.paused


def test_a_guest_that_does_not_take_cont_after_its_stop_is_told_twice() -> None:
    """As in a pause: a guest that stays stopped is the worst that can be."""
    world = congested(0.95)
    world.at.append((world.now + 0.3, lambda: repair(world)))
    real = world.execution.resume
    failures = iter([exception.GuestError("no answer", code="QMP_TIMEOUT")])

    def resume() -> None:
        for failure in failures:
            raise failure
        real()

    world.execution.resume = resume  # type: ignore[method-assign]
    with pytest.raises(exception.GuestError, match="no answer"):
        world.run_for(1.0)
    assert not world.guest.paused


def test_a_guest_that_its_operator_paused_is_neither_stopped_nor_let_run() -> None:
    world = congested(0.95)
    world.execution.paused_by_operator = True
    world.at.append((world.now + 0.3, lambda: repair(world)))
    world.run_for(0.6)
    assert not {"hold guest", "resume"} & set(world.faults.calls)


def broken(world: TimedWorld, after_s: float = 0.0) -> None:
    world.at.append((world.now + after_s, lambda: setattr(world.output, "broken", "EPIPE")))


def ends_as_broken(world: TimedWorld) -> None:
    with pytest.raises(exception.GuestError, match="EPIPE") as caught:
        world.run_for(2.0)
    assert caught.value.code == "OUTPUT_BUFFER_BROKEN"
    assert caught.value.cure
    assert not world.guest.paused


def test_a_broken_buffer_ends_protection_within_one_interval() -> None:
    world = protected()
    broken(world, 0.31)
    begin = world.now
    ends_as_broken(world)
    assert world.now - begin < 0.31 + 2 * PRESSURE_POLL_S


def test_a_broken_buffer_ends_protection_while_the_wire_stands_still() -> None:
    world = congested(0.95)
    broken(world, 0.31)
    ends_as_broken(world)


def test_a_broken_buffer_ends_protection_of_a_guest_that_stands_still() -> None:
    """A request that failed in its log stops the guest."""
    world = protected()
    world.execution.paused_by_operator = True
    broken(world, 0.31)
    ends_as_broken(world)


def test_a_broken_disk_log_ends_protection() -> None:
    world = protected()
    world.at.append((world.now + 0.1, lambda: setattr(world.disks[1], "broken", "EPIPE: log")))
    ends_as_broken(world)


def test_a_broken_buffer_ends_protection_though_rounds_take_longer_than_the_interval() -> None:
    """Then nobody waits between rounds; and nothing leaves the guest any more."""
    world = protected()
    scan = world.memory.scan

    def slow_scan():  # type: ignore[no-untyped-def]
        world.now += INTERVAL_S
        world.link.step(1 << 20)
        while world.link.settle() or world.tell_commit():
            pass
        for due, action in [event for event in world.at if event[0] <= world.now]:
            world.at.remove((due, action))
            action()
        return scan()

    world.memory.scan = slow_scan  # type: ignore[method-assign]
    broken(world, 1.0)
    ends_as_broken(world)


def test_logs_keep_to_their_limit_while_a_pass_waits_for_room() -> None:
    """The cache is full of what is under way, and the guest writes on its disk all the time."""
    world = TimedWorld(2_000_000, depth=2, cache_slabs=6)
    world.synchronise()
    disk = world.disks[1]
    disk.limit = 200 << 10
    most = 0.0

    def write() -> None:
        nonlocal most
        if not world.guest.paused:
            disk.write(0, 40)
        most = max(most, disk.pressure)
        world.at.append((world.now + 0.002, write))

    world.load(0.01, range(300))
    write()
    world.run_for(4.0)
    assert most <= 1.2


def test_logs_keep_to_their_limit_until_the_first_commit() -> None:
    """Checkpoint 1 is under way, and no round can be taken before it is committed."""
    world = TimedWorld(2_000_000)
    disk = world.disks[1]
    disk.limit = 200 << 10
    most = 0.0

    def write() -> None:
        nonlocal most
        if not world.guest.paused:
            disk.write(0, 40)
        most = max(most, disk.pressure)
        world.at.append((world.now + 0.002, write))

    world.copy_disks()
    world.checkpointer.synchronise()
    world.guest.write(range(200))
    write()
    world.loop.synchronise()
    assert most <= 1.2


# -- how long output is held ------------------------------------------------------------


def test_the_delay_of_output_is_that_of_the_oldest_in_the_round() -> None:
    world = protected()
    world.output.held_s = 0.012
    other = FakeOutput(world.guest)
    other.held_s = 0.034
    other.cuts, other.released = list(world.output.cuts), list(world.output.released)
    world.checkpointer.arm((world.output, other))
    world.run_for(0.3)
    assert {record.output_us for record in world.records[1:]} == {34_000.0}
    world.settle()
    assert other.released == world.output.released


def test_rounds_without_output_have_no_delay() -> None:
    world = protected()
    world.run_for(0.2)
    delay = world.checkpointer.statistics.summary()["output_delay_ms"]
    assert delay == {"p50": 0.0, "p99": 0.0, "max": 0.0, "mean": 0.0}
    world.output.held_s = 0.010
    world.loop = Loop(world.checkpointer, world.execution, world.strategy, clock=lambda: world.now)
    world.run_for(0.2)
    delay = world.checkpointer.statistics.summary()["output_delay_ms"]
    assert delay == {"p50": 10.0, "p99": 10.0, "max": 10.0, "mean": 10.0}


# -- arming -----------------------------------------------------------------------------


def test_network_output_is_held_from_just_before_checkpoint_one() -> None:
    world = TimedWorld()
    world.guest.write(range(300))
    world.copy_disks()
    outputs: list[FakeOutput] = []

    def arm() -> list[FakeOutput]:
        assert not world.guest.paused and not world.link.held
        assert "pause" not in world.faults.calls
        # everything that takes time is over
        assert world.standby.frames and world.checkpointer._spilled_slabs == 0
        outputs.append(FakeOutput(world.guest))
        return outputs

    world.loop.synchronise(arm=arm)
    (output,) = outputs
    assert output.cuts == output.released == [1]
    assert world.output.cuts == []  # it is the armed ones that count
    assert list(world.disks[0].waiting) == []


def test_a_buffer_that_cannot_be_put_on_ends_the_synchronisation() -> None:
    world = TimedWorld()
    world.copy_disks()

    def arm() -> list[FakeOutput]:
        raise exception.GuestError("QEMU refused", code="QMP_ERROR")

    with pytest.raises(exception.GuestError, match="QEMU refused"):
        world.loop.synchronise(arm=arm)
    assert not world.guest.paused
    assert world.execution.pauses == 0


@pytest.mark.parametrize(("pages", "scans"), [(50, 2), (51, 3)])
def test_a_pass_that_finds_little_is_the_last(
    pages: int, scans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nova_pmt.checkpoint.loop.FEW_PAGES", 50)
    world = TimedWorld()
    world.synchronise()
    world.memory.scan()
    seen = []
    scan = world.memory.scan
    monkeypatch.setattr(world.memory, "scan", lambda: seen.append(1) or scan())
    world.guest.write(range(pages))
    world.loop._round()
    assert len(seen) == scans, "with the one in the pause"
    world.settle()
    world.check()


# -- rounds that begin with output --------------------------------------------------------

LIMIT_S = 1.0


def kemari(**members: Any) -> TimedWorld:
    """A world after its first synchronisation, under Kemari."""
    world = TimedWorld(strategy=KemariStrategy, epoch_limit_ms=LIMIT_S * 1e3, **members)
    world.synchronise()
    world.faults.calls.clear()
    return world


def at(world: TimedWorld, after_s: float, action: Callable[[], None]) -> None:
    world.at.append((world.now + after_s, action))


def test_without_output_nothing_happens_until_the_limit() -> None:
    world = kemari()
    world.load(0.01, range(30))
    sent = world.checkpointer.sent_pages
    at(world, 0.9 * LIMIT_S, lambda: world.checkpointer.post(world.loop.end))
    world.loop.run()
    assert len(world.records) == 1
    assert world.checkpointer.sent_pages == sent
    world.loop = Loop(world.checkpointer, world.execution, world.strategy, clock=lambda: world.now)
    world.run_for(3.5 * LIMIT_S)
    gaps = [b - a for a, b in itertools.pairwise(world.starts()[1:])]
    assert gaps == [pytest.approx(LIMIT_S, abs=0.005)] * len(gaps)
    assert len(gaps) >= 2
    assert world.checkpointer.statistics.output_rounds == 0
    world.check()


def test_the_first_packet_starts_a_round_and_leaves_with_its_commit() -> None:
    world = kemari()
    sent_at, released = world.now + 0.1, []
    world.output.on_release = lambda epoch: released.append((epoch, world.now, world.guest.paused))
    at(world, 0.1, lambda: world.output.send(world.now))
    world.run_for(0.5)
    assert [record.started_s for record in world.records[1:]] == [pytest.approx(sent_at, abs=0.003)]
    (epoch, when, paused), *others = released
    assert (epoch, paused, others) == (2, True, [])
    assert when == pytest.approx(sent_at, abs=0.02)
    assert world.checkpointer.statistics.output_rounds == 1
    world.check()


def test_a_write_to_a_disk_starts_a_round() -> None:
    world = kemari()
    begin = world.now
    at(world, 0.2, lambda: world.disks[1].write(3, 4))
    world.run_for(0.6)
    assert world.starts()[1:] == [pytest.approx(begin + 0.2, abs=0.003)]
    assert world.records[1].log_bytes == 5 * SECTOR
    world.check()


def test_the_guest_stays_paused_until_the_standby_has_it() -> None:
    """300 pages take 0.6 s on this wire: the pause lasts as long, and says what of it was that."""
    world = kemari(bytes_per_s=2_000_000, cache_slabs=100)
    at(world, 0.1, lambda: [world.guest.write(range(300)), world.output.send(world.now)])
    world.run_for(2.0)
    first = world.records[1]
    assert first.pages == 300
    assert first.pause_us > 500_000
    assert first.wait_us == pytest.approx(first.commit_us)
    steps = ("stop", "scan", "copy", "save", "wait", "cont")
    assert sum(getattr(first, f"{step}_us") for step in steps) == pytest.approx(first.pause_us)
    assert not world.guest.paused
    world.check()


def test_a_paused_guest_needs_no_more_cache_than_there_is() -> None:
    world = kemari(cache_slabs=4)  # 64 pages
    at(world, 0.1, lambda: [world.guest.write(range(300)), world.output.send(world.now)])
    world.run_for(0.5)
    assert [record.pages for record in world.records[1:]] == [300]
    assert world.cache.peak_slabs <= 4
    world.check()


@pytest.mark.parametrize("resumes", [True, False], ids=["resumes", "no answer"])
def test_a_peer_that_is_lost_in_the_pause_lets_the_guest_run(resumes: bool) -> None:
    world = kemari()

    def lost() -> None:
        raise exception.PeerLost("silent")

    def broken() -> None:
        world.link.broken = True
        world.output.send(world.now)
        at(world, 0.2, lambda: world.checkpointer.post(lost))

    real, failures = world.execution.resume, iter(() if resumes else [exception.GuestError("no")])

    def resume() -> None:
        for failure in failures:
            raise failure
        real()

    world.execution.resume = resume  # type: ignore[method-assign]
    at(world, 0.1, broken)
    with pytest.raises(exception.PeerLost):
        world.loop.run()
    assert not world.guest.paused
    assert world.output.released == [1]  # nothing of what was not committed


def test_what_a_guest_puts_out_at_once_begins_the_next_round_at_once() -> None:
    world = kemari()

    def babble() -> None:
        if not world.guest.paused:
            world.output.send(world.now)
        at(world, 0.001, babble)

    babble()
    world.run_for(0.5)
    gaps = [b - a for a, b in itertools.pairwise(world.starts()[1:])]
    assert len(gaps) > 40
    assert max(gaps) < 0.012
    world.check()


def test_output_may_wait_before_it_starts_a_round() -> None:
    class Waits(PmtStrategy):
        output_wait_s = 0.02  # type: ignore[assignment]

    world = TimedWorld(strategy=Waits, interval_ms=500)
    world.synchronise()
    begin = world.now
    at(world, 0.1, lambda: world.disks[0].write(0, 1))  # no output to this one
    at(world, 0.2, lambda: world.output.send(world.now))
    world.run_for(0.4)
    assert world.starts()[1:] == [pytest.approx(begin + 0.22, abs=0.003)]
    world.settle()
    world.check()
