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

"""The interval: fixed, or steered to hold a wanted pause."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.checkpoint.strategies.base import Strategy, StrategyOptions
from nova_pmt.checkpoint.strategies.pmt import RANGE, PmtStrategy
from nova_pmt.plugins import load_class


def record(pause_us: float) -> RoundRecord:
    return RoundRecord(1, 0.0, pause_us, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def simulate(
    strategy: Strategy, base_ms: float, per_ms: float, noise: float, rounds: int, seed: int = 0
) -> list[tuple[float, float]]:
    """Rounds of a guest whose pause is ``base + per_ms * interval``, with noise and hiccups."""
    rng = random.Random(seed)
    seen = []
    for _ in range(rounds):
        interval_ms = strategy.interval_s * 1e3
        pause_ms = (base_ms + per_ms * interval_ms) * rng.uniform(1 - noise, 1 + noise)
        if noise and rng.random() < 0.01:
            pause_ms *= 10  # the host was busy
        seen.append((interval_ms, pause_ms))
        strategy.observe(record(pause_ms * 1e3))
    return seen


def test_it_is_the_plug_in_of_that_name() -> None:
    assert load_class("nova_pmt.strategies", "pmt", Strategy) is PmtStrategy


def test_defaults_are_those_of_the_configuration() -> None:
    strategy = PmtStrategy(StrategyOptions())
    assert (strategy.interval_s, strategy.passes) == (0.05, 2)


@given(st.lists(st.floats(0, 1e7), max_size=20))
def test_without_a_target_nothing_changes_the_interval(pauses: list[float]) -> None:
    strategy = PmtStrategy(StrategyOptions(interval_ms=80))
    for pause in pauses:
        strategy.observe(record(pause))
    assert strategy.interval_s == 0.08


@pytest.mark.parametrize(
    ("base_ms", "per_ms", "target_ms"), [(1.0, 0.05, 3.0), (2.0, 0.1, 10.0), (0.5, 0.02, 2.5)]
)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_target_is_reached_and_held(
    base_ms: float, per_ms: float, target_ms: float, noise: float
) -> None:
    strategy = PmtStrategy(StrategyOptions(interval_ms=60, max_pause_ms=target_ms))
    seen = simulate(strategy, base_ms, per_ms, noise, 600)
    settled = seen[200:]
    assert statistics.median(pause for _, pause in settled) == pytest.approx(target_ms, rel=0.15)
    wanted = (target_ms - base_ms) / per_ms
    for interval, _ in settled:
        assert wanted * 0.5 < interval < wanted * 1.6


def test_it_does_not_hunt() -> None:
    """Without noise it comes to rest: no round changes the interval any more."""
    strategy = PmtStrategy(StrategyOptions(interval_ms=50, max_pause_ms=4.0))
    intervals = [interval for interval, _ in simulate(strategy, 1.0, 0.05, 0.0, 300)]
    assert len(set(intervals[100:])) == 1
    # and on its way there it never turns back
    steps = [b - a for a, b in itertools.pairwise(intervals) if a != b]
    assert all(step > 0 for step in steps) or all(step < 0 for step in steps)


def test_it_follows_a_load_that_changes() -> None:
    strategy = PmtStrategy(StrategyOptions(interval_ms=50, max_pause_ms=4.0))
    quiet = simulate(strategy, 1.0, 0.02, 0.1, 200)[-1][0]
    busy = simulate(strategy, 1.0, 0.2, 0.1, 200)[-1][0]
    again = simulate(strategy, 1.0, 0.02, 0.1, 200)[-1][0]
    assert busy < quiet / 3
    assert again == pytest.approx(quiet, rel=0.4)


def test_one_hiccup_moves_it_by_little() -> None:
    strategy = PmtStrategy(StrategyOptions(interval_ms=50, max_pause_ms=4.0))
    strategy.observe(record(2_000_000))
    assert 0.04 < strategy.interval_s < 0.05


@given(
    st.lists(st.floats(0, 1e9), max_size=60),
    st.floats(5, 1000),
    st.floats(0.1, 100),
)
def test_interval_stays_within_its_bounds(
    pauses: list[float], interval_ms: float, target_ms: float
) -> None:
    strategy = PmtStrategy(StrategyOptions(interval_ms=interval_ms, max_pause_ms=target_ms))
    for pause in pauses:
        before = strategy.interval_s
        strategy.observe(record(pause))
        assert 0.8 <= strategy.interval_s / before <= 1.25
        assert interval_ms / RANGE * 0.999 <= strategy.interval_s * 1e3
        assert strategy.interval_s * 1e3 <= interval_ms * RANGE * 1.001
