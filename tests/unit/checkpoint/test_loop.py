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

import pytest

from nova_pmt import exception
from nova_pmt.checkpoint.loop import PAUSED_POLL_S, Loop
from nova_pmt.checkpoint.strategies.base import StrategyOptions
from nova_pmt.checkpoint.strategies.pmt import PmtStrategy
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
    """

    def __init__(self, bytes_per_s: float = 1e9, *, depth: int = 2, cache_slabs: int = 64) -> None:
        self.now = 0.0
        self.bytes_per_s = bytes_per_s
        self.credit = 0.0
        self.depth = depth
        self.at: list[tuple[float, Callable[[], None]]] = []
        super().__init__(400, 10, cache_slabs=cache_slabs)
        self.execution.clock_step = self.pass_time
        self.strategy = PmtStrategy(StrategyOptions(interval_ms=INTERVAL_S * 1e3, passes=2))
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
