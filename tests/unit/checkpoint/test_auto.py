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


"""The strategy ``auto`` on simulated traces: where it goes, and that it stays there."""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import dataclass, field
from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.checkpoint.strategies import auto
from nova_pmt.checkpoint.strategies.auto import AutoStrategy, best_length_ms
from nova_pmt.checkpoint.strategies.base import Strategy, StrategyOptions
from nova_pmt.plugins import load_class

COMMIT_MS = 2.0


@dataclass
class Guest:
    """A guest as the strategy sees it. Milliseconds.

    :param gap: from the pause that followed on a packet to the next one; None: there is none.
    :param pages: written in an epoch of 1 ms; they grow with its length to the power of ``grows``.
    :param noise: of pause, pages and gap: uniform, this part up and down.
    """

    gap: float | None = 1.0
    pause: float = 5.0
    pages: float = 30.0
    grows: float = 0.5
    noise: float = 0.0
    log_bytes_per_ms: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def vary(self, value: float) -> float:
        return value * self.rng.uniform(1 - self.noise, 1 + self.noise)


@dataclass(frozen=True)
class Round:
    length_ms: float
    wait_ms: float
    interval_ms: float
    pages: int


class Run:
    """Rounds of one strategy, as the loop does them; each is observed before the next."""

    def __init__(self, **options: float) -> None:
        self.strategy = AutoStrategy(StrategyOptions(**options))  # type: ignore[arg-type]
        self._now_s = 1.0
        self._epoch = 1
        self._packet_ms: float | None = None
        self._tell(1000, 5.0, 0.0)

    def _tell(self, pages: int, pause_ms: float, held_ms: float, log_bytes: float = 0) -> None:
        record = RoundRecord(
            self._epoch, self._now_s, pause_ms * 1e3, 0, 0, 0, 0, 0, pages, 0, COMMIT_MS * 1e3, 0,
            log_bytes=round(log_bytes), output_us=held_ms * 1e3,
        )  # fmt: skip
        self._epoch += 1
        self.strategy.observe(record)

    def go(self, guest: Guest, rounds: int) -> list[Round]:
        seen = []
        for _ in range(rounds):
            interval_ms = self.strategy.interval_s * 1e3
            assert self.strategy.output_wait_s is not None
            wait_ms = self.strategy.output_wait_s * 1e3
            gap = self._packet_ms
            if guest.gap is None:
                gap = None
            elif gap is None:
                gap = guest.vary(guest.gap)
            length = interval_ms if gap is None else min(interval_ms, gap + wait_ms)
            pause = guest.vary(guest.pause)
            held = 0.0
            if gap is not None and gap <= length:
                held = length - gap + pause + COMMIT_MS
            self._packet_ms = None if gap is None or held else gap - length
            pages = round(guest.vary(guest.pages * length**guest.grows))
            self._now_s += length / 1e3
            self._tell(pages, pause, held, guest.log_bytes_per_ms * length)
            seen.append(Round(length, wait_ms, interval_ms, pages))
        return seen


def waits(rounds: list[Round]) -> list[float]:
    return [one.wait_ms for one in rounds]


def reversals(values: list[float]) -> int:
    """How often they turn from rising to falling, or back."""
    moves = [b - a for a, b in itertools.pairwise(values) if a != b]
    return sum(a * b < 0 for a, b in itertools.pairwise(moves))


def test_it_is_the_plug_in_of_that_name() -> None:
    assert load_class("nova_pmt.strategies", "auto", Strategy) is AutoStrategy


@given(st.floats(0.1, 100), st.floats(0.0, 5000))
def test_the_length_it_looks_for_costs_least(pause_ms: float, spread: float) -> None:
    def cost(length: float) -> float:
        return (
            length
            + auto.PAUSE_WEIGHT * pause_ms / length
            + auto.PAGE_WEIGHT * spread / sqrt(length)
        )

    best = best_length_ms(pause_ms, spread)
    assert cost(best) <= min(cost(best * 1.01), cost(best / 1.01))


@pytest.mark.parametrize("grows", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("pause", [0.5, 5.0, 20.0])
@pytest.mark.parametrize("pages", [0.0, 10.0, 300.0])
def test_without_noise_it_comes_to_rest(grows: float, pause: float, pages: float) -> None:
    guest = Guest(grows=grows, pause=pause, pages=pages)
    run = Run(interval_ms=1000)
    seen = waits(run.go(guest, 200))
    assert len(set(seen[100:])) == 1
    assert reversals(seen) <= 1  # once too far at most


@pytest.mark.parametrize("grows", [0.0, 0.5, 1.0])
def test_under_noise_it_stays_near_the_best(grows: float) -> None:
    run = Run(interval_ms=1000)
    seen = run.go(Guest(grows=grows, noise=0.5), 1000)[200:]
    values = waits(seen)
    assert statistics.pstdev(values) < 0.12 * statistics.mean(values)
    moved = sum(a != b for a, b in itertools.pairwise(values))
    assert moved < len(values) / 10
    assert reversals(values) < len(values) / 20


def test_where_it_rests_is_the_best_of_all_waits() -> None:
    """By the cost that is stated, with pages that really grow as the model says."""
    guest = Guest(gap=2.0, pause=6.0, pages=40.0)
    run = Run(interval_ms=1000)
    rested = run.go(guest, 300)[-1].wait_ms

    def cost(wait: float) -> float:
        length = 2.0 + wait
        pages = 40.0 * sqrt(length)
        return wait + auto.PAUSE_WEIGHT * 6.0 / length + auto.PAGE_WEIGHT * pages / length

    assert cost(rested) < 1.02 * min(cost(wait / 10) for wait in range(3000))


def test_another_load_moves_it_and_it_rests_again() -> None:
    run = Run(interval_ms=1000)
    light, heavy = Guest(pause=2.0, pages=5.0), Guest(pause=20.0, pages=500.0)
    first = waits(run.go(light, 200))
    second = waits(run.go(heavy, 200))
    third = waits(run.go(light, 200))
    assert second[-1] > 2 * first[-1]
    assert third[-1] == pytest.approx(first[-1], rel=0.25)
    assert all(len(set(part[100:])) == 1 for part in (first, second, third))
    assert reversals(first + second + third) <= 4


def test_one_hiccup_of_the_host_does_little() -> None:
    run = Run(interval_ms=1000)
    before = run.go(Guest(), 200)[-1].wait_ms
    after = waits(run.go(Guest(pause=500.0), 1) + run.go(Guest(), 40))
    assert max(after) < 3 * before
    assert after[-1] < 1.5 * before


def test_packets_that_come_seldom_do_not_wait() -> None:
    run = Run(interval_ms=50)
    loaded = run.go(Guest(gap=0.5, pause=10.0), 100)[-1].wait_ms
    seldom = waits(run.go(Guest(gap=1000.0), 300))
    assert loaded > 20
    assert seldom[-1] == 0.0


def test_a_packet_never_waits_longer_than_the_interval() -> None:
    run = Run(interval_ms=20)
    assert max(waits(run.go(Guest(pause=50.0, pages=5000.0), 100))) <= 20


def test_without_output_epochs_become_long_and_with_it_short_again() -> None:
    run = Run(interval_ms=50, epoch_limit_ms=10_000)
    quiet = [one.interval_ms for one in run.go(Guest(gap=None, pages=1.0), 20)]
    assert all(b == min(2 * a, 10_000) for a, b in itertools.pairwise(quiet))
    assert quiet[-1] == 10_000
    assert run.go(Guest(gap=5.0), 2)[1].interval_ms == 50


def test_without_output_epochs_do_not_outgrow_what_can_be_sent() -> None:
    run = Run(interval_ms=50, epoch_limit_ms=10_000)
    seen = run.go(Guest(gap=None, pages=200.0, noise=0.1), 60)[30:]
    assert max(one.pages for one in seen) < 1.3 * auto.EPOCH_PAGES
    assert statistics.mean(one.pages for one in seen) > 0.5 * auto.EPOCH_PAGES


def test_nor_what_their_disk_logs_take() -> None:
    """Packets wait for logs as for pages."""
    run = Run(interval_ms=50, epoch_limit_ms=10_000)
    seen = run.go(Guest(gap=None, pages=1.0, log_bytes_per_ms=50_000), 30)[10:]
    most = auto.EPOCH_PAGES * 4096
    assert max(50_000 * one.length_ms for one in seen) <= 1.01 * most


def test_a_guest_that_begins_to_write_is_seen_at_once() -> None:
    run = Run(interval_ms=50, epoch_limit_ms=10_000)
    run.go(Guest(gap=None, pages=1.0), 30)
    first, *others = run.go(Guest(gap=None, pages=400.0), 10)
    assert first.length_ms == 10_000
    assert max(one.pages for one in others) < 1.3 * auto.EPOCH_PAGES


@pytest.mark.parametrize("period", [3.0, 10.0, 16.0, 25.0, 40.0])
def test_of_a_periodic_sender_it_costs_little_more_than_the_best(period: float) -> None:
    """The gap depends on the wait then, and the wait may go round."""
    run, clock, costs = Run(interval_ms=200), 0.0, []
    guest = Guest(pause=5.0, pages=30.0)

    def cost(length: float) -> float:
        pages = auto.PAGE_WEIGHT * 30.0 / sqrt(length)
        return length + auto.PAUSE_WEIGHT * 5.0 / length + pages

    for _ in range(600):
        guest.gap = period - clock % period
        (one,) = run.go(guest, 1)
        clock += one.length_ms
        costs.append(cost(one.length_ms))
    best = min(cost(number / 10) for number in range(10, 5000))
    # No wait at all makes a period long.
    assert statistics.mean(costs[200:]) < 1.1 * max(best, cost(period) if period > 25 else best)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(0, 2000)),
            st.floats(0, 1000),
            st.floats(0, 1e5),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_whatever_it_sees_it_stays_within_its_bounds(
    loads: list[tuple[float | None, float, float, float]],
) -> None:
    run = Run(interval_ms=50, epoch_limit_ms=5_000)
    for gap, pause, pages, grows in loads:
        for one in run.go(Guest(gap=gap, pause=pause, pages=pages, grows=grows), 3):
            assert 0 <= one.wait_ms <= 50
            assert 50 <= one.interval_ms <= 5_000
