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

"""PMT-Checkpointing: rounds at an interval, fixed or chosen to hold a wanted pause.

In target mode the interval follows the pause by an integral controller on the logarithm::

    log interval  <-  log interval + GAIN * log(target / pause)

clamped to a quarter and four times ``interval_ms``. One step changes the interval by at most
a quarter, pauses within 5 % of the target change nothing, and a pause far out of line (one hiccup
of the host) counts no more than twice the target: so it neither hunts nor jumps.
"""

from __future__ import annotations

import math

from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.checkpoint.strategies.base import Strategy, StrategyOptions

GAIN = 0.2
DEAD_BAND = 0.05
RANGE = 4.0


class PmtStrategy(Strategy):
    """See the module's text."""

    def __init__(self, options: StrategyOptions) -> None:
        super().__init__(options)
        self._interval_ms = options.interval_ms

    @property
    def interval_s(self) -> float:
        return self._interval_ms / 1e3

    def observe(self, record: RoundRecord) -> None:
        target_us = self.options.max_pause_ms * 1e3
        if target_us <= 0:
            return
        ratio = target_us / max(record.pause_us, 1.0)
        if abs(ratio - 1.0) <= DEAD_BAND:
            return
        step = math.exp(GAIN * math.log(min(2.0, max(0.5, ratio))))
        low, high = self.options.interval_ms / RANGE, self.options.interval_ms * RANGE
        self._interval_ms = min(high, max(low, self._interval_ms * step))
