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

"""The level that takes least time in all is found, and found again when things change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nova_pmt.codecs.choice import COUNTED_BYTES, Choice

MIB = 1 << 20
LEVELS = (-5, -1, 1, 3, 6)
#: Seconds for a byte on 100 Mbit/s, 1 Gbit/s, 10 Gbit/s.
SLOW, USUAL, FAST = 8e-8, 8e-9, 8e-10


@dataclass
class Machine:
    """What levels take, and leave, and a clock that goes on with it."""

    spent: list[float] = field(default_factory=lambda: [1e-9, 2e-9, 3e-9, 8e-9, 3e-8])
    left: list[float] = field(default_factory=lambda: [0.6, 0.45, 0.3, 0.2, 0.18])
    now: float = 0.0
    used: list[int | None] = field(default_factory=list)

    def send(self, choice: Choice, s_per_byte: float, size: int = MIB) -> None:
        level = choice.level(s_per_byte)
        self.used.append(level)
        left = 1.0
        if level is not None:
            arm = LEVELS.index(level)
            spent, left = self.spent[arm] * size, self.left[arm]
            self.now += spent
            choice.count(level, size, spent, int(left * size))
        self.now += left * size * max(s_per_byte, 1e-10)

    def run(self, choice: Choice, s_per_byte: float, frames: int) -> list[int | None]:
        self.used.clear()
        for _ in range(frames):
            self.send(choice, s_per_byte)
        return list(self.used)

    def best(self, s_per_byte: float) -> int | None:
        price = max(s_per_byte, 2e-9)
        costs = {None: price} | {
            level: spent + left * price
            for level, spent, left in zip(LEVELS, self.spent, self.left, strict=True)
        }
        return min(costs, key=costs.__getitem__)


def choice(machine: Machine) -> Choice:
    return Choice(LEVELS, lambda: machine.now)


@pytest.mark.parametrize(
    ("s_per_byte", "expected"), [(SLOW, 3), (USUAL, 1), (FAST, None), (0.0, None)]
)
def test_the_slower_the_network_the_harder_it_tries(
    s_per_byte: float, expected: int | None
) -> None:
    machine = Machine()
    made = choice(machine)
    machine.run(made, s_per_byte, 200)
    assert machine.best(s_per_byte) == expected
    assert made.best == expected
    later = machine.run(made, s_per_byte, 400)
    assert later.count(expected) > 0.9 * len(later)


def test_what_does_not_get_smaller_is_not_compressed() -> None:
    machine = Machine(left=[1.0] * 5)
    made = choice(machine)
    machine.run(made, USUAL, 100)
    later = machine.run(made, USUAL, 2000)  # for some 17 seconds
    assert made.best is None
    assert 0 < len(later) - later.count(None) < 10


def test_a_processor_that_is_busy_compresses_less() -> None:
    machine = Machine()
    made = choice(machine)
    machine.run(made, SLOW, 200)
    assert made.best == 3
    machine.spent = [one * 30 for one in machine.spent]
    machine.run(made, SLOW, 2000)
    assert made.best == machine.best(SLOW) == -5


def test_other_contents_are_noticed() -> None:
    machine = Machine(left=[1.0] * 5)
    made = choice(machine)
    machine.run(made, USUAL, 3000)
    machine.left = [0.6, 0.45, 0.3, 0.2, 0.18]
    machine.run(made, USUAL, 10_000)  # less than two minutes
    assert made.best == 1
    machine.left = [1.0] * 5
    machine.run(made, USUAL, 200)
    assert made.best is None


def test_small_pieces_tell_nothing_and_are_not_tried_upon_for_ever() -> None:
    machine = Machine()
    made = choice(machine)
    for _ in range(500):
        machine.send(made, SLOW, COUNTED_BYTES - 1)
    assert made.best is None and made.left == 1.0
    assert machine.used.count(None) > 100
    machine.now += 60.0
    for _ in range(3):
        machine.send(made, SLOW, COUNTED_BYTES)
    assert made.best == -5 and made.left == pytest.approx(0.6, rel=1e-3)


def test_one_interruption_turns_no_level_down() -> None:
    machine = Machine()
    made = choice(machine)
    level = made.level(USUAL)
    assert level == -5
    made.count(level, MIB, 0.05, int(0.6 * MIB))  # 50 ms where one is usual
    machine.run(made, USUAL, 50)
    assert made.best == machine.best(USUAL)


def test_levels_that_are_about_as_good_do_not_take_turns() -> None:
    machine = Machine(spent=[1e-9, 2e-9, 1e-7, 1e-7, 1e-7], left=[0.5, 0.374, 0.37, 0.37, 0.37])
    made = choice(machine)
    machine.run(made, USUAL, 100)
    first = made.best
    for number in range(1000):
        machine.spent[0] = 1e-9 * (0.95 + 0.1 * (number % 2))
        machine.send(made, USUAL)
        assert made.best == first


def test_hope_is_no_measurement() -> None:
    """A level that compresses well and takes too long is tried now and then, and not taken."""
    machine = Machine(spent=[1e-7] * 5, left=[0.05] * 5)
    made = choice(machine)
    machine.run(made, SLOW, 60)
    start = machine.now
    used = machine.run(made, SLOW, 2000)
    assert used.count(None) > 0.97 * len(used)
    assert machine.now - start < 1.03 * 2000 * MIB * SLOW


costs = st.lists(st.floats(1e-10, 1e-7), min_size=5, max_size=5).map(sorted)
shares = st.lists(st.floats(0.05, 1.0), min_size=5, max_size=5).map(
    lambda found: sorted(found, reverse=True)
)


@given(costs, shares, st.sampled_from([SLOW, USUAL, FAST]))
@example([1e-7] * 5, [0.05] * 5, SLOW)
def test_it_never_settles_on_something_worse_than_nothing(
    spent: list[float], left: list[float], s_per_byte: float
) -> None:
    machine = Machine(spent, left)
    made = choice(machine)
    machine.run(made, s_per_byte, 60)
    price = max(s_per_byte, 2e-9)
    cost: Callable[[int], float] = lambda arm: spent[arm] + left[arm] * price  # noqa: E731
    found = price if made.best is None else cost(LEVELS.index(made.best))
    assert found <= price * 1.001
