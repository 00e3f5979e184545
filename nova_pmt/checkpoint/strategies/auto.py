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

"""``auto``: idle like Kemari, under load like PMT, and packets wait no longer than it pays.

The transfer is PMT's: the guest runs meanwhile. When a round starts is chosen anew after each.

*With output* an epoch ends ``wait`` ms after its first packet. A short wait costs rounds: each
stops the guest for ``pause`` ms, and sends pages again that the next epoch writes, too. A long one
costs delay. With ``gap`` ms from the pause of an epoch with output to the next packet it takes
``T = gap + wait`` ms to the next such pause, which has about ``spread * sqrt(T)`` pages (a working
set is revisited: between a constant, and in proportion to T). What a wait costs, in ms of delay,
is then::

    J(T) = T + PAUSE_WEIGHT * pause / T + PAGE_WEIGHT * spread / sqrt(T)

where one per cent of the guest's time, or 10 Mbit/s, counts as much as 1 ms of delay. J is convex;
the wait is its minimum less the gap, from 0 to ``interval_ms``.

It cannot hunt where packets do not come by the wait's own clock: the gap ends before the wait
begins, the pause hardly depends on it, and if pages really grow as ``T ** e``, 0 <= e <= 1, then
``spread`` is measured in proportion to ``T ** (e - 1/2)``, so that the next minimum goes at most as
``T ** (1/3)`` or ``T ** (-1/3)`` of this: a contraction. What is measured is smoothed, the wait
changes by a quarter a round at most, and not at all for less than a tenth. (Of a sender with a
period P, gap and wait add up to a multiple of P. If the best T lies between two of those the wait
may go round about the lower one; J is flat there.)

*Without output* each epoch is twice as long as the last, up to ``epoch_limit_ms``, or to that in
which ``EPOCH_PAGES`` pages, or as many bytes of disk logs, are written at the rate of the last: a
packet must not have to wait for more than those to cross the network. (A guest that was idle and
begins to write may have one epoch with more.)
"""

from __future__ import annotations

from math import sqrt

from nova_pmt.checkpoint.interfaces import PAGE_SIZE
from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.checkpoint.strategies.base import Strategy, StrategyOptions

#: One per cent of the time paused counts as 1 ms of delay (milliseconds over milliseconds).
PAUSE_WEIGHT = 100.0
#: 10 Mbit/s count as 1 ms of delay: a page is 32,768 bits, over milliseconds.
PAGE_WEIGHT = 32_768 / 1e-3 / 10e6
#: Most pages that an epoch without output may grow to.
EPOCH_PAGES = 4096
#: Weight of the newest round in what is smoothed: the last ten or so count.
NEWEST = 0.1
STEP = 1.25
DEAD_BAND = 0.1
#: Below this a wait is none, and steps begin from it.
LEAST_WAIT_MS = 0.5


class AutoStrategy(Strategy):
    """See the module's text."""

    def __init__(self, options: StrategyOptions) -> None:
        super().__init__(options)
        self._wait_ms = 0.0
        self._interval_ms = options.interval_ms
        self._longest_ms = max(options.epoch_limit_ms, options.interval_ms)
        self._pause_ms: float | None = None
        self._gap_ms: float | None = None
        self._spread: float | None = None
        self._last_start_s = 0.0
        self._quiet_ms = 0.0

    @property
    def interval_s(self) -> float:
        return self._interval_ms / 1e3

    @property
    def output_wait_s(self) -> float | None:
        return self._wait_ms / 1e3

    def observe(self, record: RoundRecord) -> None:
        length_ms = (record.started_s - self._last_start_s) * 1e3
        first, self._last_start_s = not self._last_start_s, record.started_s
        if first or length_ms <= 0:
            return  # checkpoint 1 is the first synchronisation's
        spread = record.pages / sqrt(length_ms)
        self._spread = _smooth(self._spread, spread)
        self._pause_ms = _smooth(self._pause_ms, record.pause_us / 1e3)
        if record.output_us > 0:
            released_ms = (record.pause_us + record.commit_us) / 1e3
            gap_ms = self._quiet_ms + length_ms + released_ms - record.output_us / 1e3
            self._quiet_ms = 0.0
            best = best_length_ms(self._pause_ms, self._spread)
            # A longer gap says no more than this one: that nothing is to wait. It must not count
            # for hours when many packets come.
            gap_ms = min(max(0.0, gap_ms), best)
            self._gap_ms = _smooth(self._gap_ms, gap_ms)
            self._interval_ms = self.options.interval_ms
            self._go_to(min(max(0.0, best - self._gap_ms), self.options.interval_ms))
        else:
            self._quiet_ms += length_ms
            self._interval_ms = min(
                2.0 * self._interval_ms,
                max(self.options.interval_ms, self._longest(record, length_ms, spread)),
            )

    def _longest(self, record: RoundRecord, length_ms: float, spread: float) -> float:
        """The longest that an epoch without output may be now; a guest that begins to write is
        seen at once, and one that ends after a while."""
        longest = self._longest_ms
        spread = max(spread, self._spread or 0.0)
        if spread * sqrt(longest) > EPOCH_PAGES:
            longest = (EPOCH_PAGES / spread) ** 2
        if record.log_bytes:
            longest = min(longest, length_ms * EPOCH_PAGES * PAGE_SIZE / record.log_bytes)
        return longest

    def _go_to(self, best_ms: float) -> None:
        now = max(self._wait_ms, LEAST_WAIT_MS)
        if abs(best_ms - now) <= DEAD_BAND * now:
            return
        stepped = min(max(best_ms, now / STEP), now * STEP)
        self._wait_ms = stepped if stepped > LEAST_WAIT_MS else 0.0


def best_length_ms(pause_ms: float, spread: float) -> float:
    """Where J is least: J'(T) = 1 - PAUSE_WEIGHT * pause / T**2 - PAGE_WEIGHT * spread / 2 /
    T**1.5 rises with T, so halving the range finds its zero."""
    low, high = 1e-3, 1e5
    for _ in range(50):
        middle = sqrt(low * high)
        slope = PAUSE_WEIGHT * pause_ms / middle**2 + PAGE_WEIGHT * spread / 2 / middle**1.5
        low, high = (middle, high) if slope > 1 else (low, middle)
    return low


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + NEWEST * (new - old)
