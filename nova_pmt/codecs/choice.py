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

"""How hard to compress: what takes least time in all, compressing and sending together.

The time that compressing took is the clock's and not the processor's, so a machine that has none
left compresses less. That nothing is compressed is one of the choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

#: What sending a byte costs at least, in seconds: TLS and the kernel take 2 ms for a megabyte.
SENDING_S_PER_BYTE = 2e-9
#: Smaller pieces say more of the call than of the level.
COUNTED_BYTES = 16 << 10
#: For how long other levels than the best are not tried, after a trial changed nothing.
FIRST_REST_S, LONGEST_REST_S = 0.5, 60.0
#: How much one measurement of so many bytes counts against those before it.
_WEIGHT, _WHOLE_BYTES = 0.3, 256 << 10
#: So many tell of a level at first, the best of them: others may have been interrupted.
_FIRST = 2
#: What another level must gain to be taken.
_GAIN = 0.98
#: After so many pieces too small to tell of it, a trial is over.
_PATIENCE = 64
#: A level that took too long is taken for so much faster at each rest: others may have been at it.
_FORGIVEN = 0.9


class Choice:
    """The level for one kind of data, from what levels took and made of it so far.

    The best level's neighbours are tried now and then, more seldom the longer nothing comes of it.

    :param levels: fastest first.
    :param clock: seconds.
    """

    def __init__(self, levels: Sequence[int], clock: Callable[[], float] = time.monotonic) -> None:
        self._levels = tuple(levels)
        self._clock = clock
        # Of nothing, then of each level: seconds for a byte, and bytes left of one.
        self._spent = [0.0] + [-1.0] * len(levels)
        self._left = [1.0] * (len(levels) + 1)
        self._seen = [0] * (len(levels) + 1)
        # What a level that took too long is taken for when it is decided what to try; no more.
        self._hope = [1.0] * (len(levels) + 1)
        self._best = 0
        self._small = 0
        self._rest_s, self._due = FIRST_REST_S, 0.0
        self._trials: list[int] = []

    def level(self, s_per_byte: float) -> int | None:
        """For what is sent next; None: do not compress it.

        :param s_per_byte: what sending a byte takes.
        """
        price = max(s_per_byte, SENDING_S_PER_BYTE)
        self._settle(price)
        arm = self._trials[0] if self._trials else self._best
        return self._levels[arm - 1] if arm else None

    @property
    def best(self) -> int | None:
        """The level that is best so far; None: none. Any thread."""
        arm = self._best
        return self._levels[arm - 1] if arm else None

    @property
    def left(self) -> float:
        """What the best one leaves of a byte. Any thread."""
        return self._left[self._best]

    def count(self, level: int, size: int, spent_s: float, packed: int) -> None:
        """That level was used.

        :param size: bytes before, ``packed`` after.
        """
        arm = self._levels.index(level) + 1
        tried = bool(self._trials) and self._trials[0] == arm
        if size < COUNTED_BYTES:
            self._small += tried
            if self._small >= _PATIENCE:
                self._end_trial()
            return
        self._hope[arm] = 1.0
        spent, left = spent_s / size, packed / size
        self._seen[arm] += 1
        if self._seen[arm] == 1:
            self._spent[arm], self._left[arm] = spent, left
        elif self._seen[arm] <= _FIRST:
            self._spent[arm] = min(self._spent[arm], spent)
            self._left[arm] += (left - self._left[arm]) / 2
        else:
            weight = _WEIGHT * min(1.0, size / _WHOLE_BYTES)
            self._spent[arm] += (spent - self._spent[arm]) * weight
            self._left[arm] += (left - self._left[arm]) * weight
        if tried and self._seen[arm] >= _FIRST:
            self._end_trial()

    def _end_trial(self) -> None:
        del self._trials[0]
        self._small = 0

    def _cost(self, arm: int, price: float) -> float:
        if self._spent[arm] < 0:
            return float("inf")
        return self._spent[arm] + self._left[arm] * price

    def _settle(self, price: float) -> None:
        """Find the best one anew, and what is to be tried."""
        if self._trials:
            return
        best = min(range(len(self._spent)), key=lambda arm: self._cost(arm, price))
        changed = self._cost(best, price) < _GAIN * self._cost(self._best, price)
        if changed:
            self._best, self._rest_s = best, FIRST_REST_S
        elif self._clock() < self._due:
            return
        self._due = self._clock() + self._rest_s
        self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)
        limit = self._cost(self._best, price)
        for arm in (self._best - 1, self._best + 1):
            if not 0 < arm < len(self._spent):
                continue
            if self._spent[arm] * self._hope[arm] >= limit:
                self._hope[arm] *= _FORGIVEN  # compressing alone takes longer than the best in all
            else:
                self._trials.append(arm)
