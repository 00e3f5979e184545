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

"""What is measured, one call each: the whole pause, the plain one, the floor, the memcpy.

All go through the product's own objects; each returns milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nova_pmt.bench.guest import BenchGuest
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages
from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.lab.floor import PREPARED_S

#: The clock of the product's own records.
_clock = time.perf_counter
#: A guest dirties no more than this between two measurements.
COPY_PAGES = 1 << 16


@dataclass
class Sample:
    """One measurement.

    :param ms: what it took.
    :param record: of the round, where there was one.
    """

    ms: float
    record: RoundRecord | None = None


class Variants:
    """Measures a guest.

    :param passes: pre-copy passes of the whole pause.
    :param interval_s: time that the guest runs before each measurement, passes included.
    """

    def __init__(self, guest: BenchGuest, *, passes: int, interval_s: float) -> None:
        self._guest = guest
        self._passes = passes
        self._interval_s = interval_s
        self._passes_s = 0.0
        self._warm: Pages = np.ones((COPY_PAGES, PAGE_SIZE), np.uint8)
        self._numbers: PageNumbers = np.zeros(0, np.int64)
        self.table: dict[str, Callable[[], Sample]] = {
            "pause": self.pause,
            "plain": self.plain,
            "floor": self.floor,
            "memcpy": self.memcpy,
        }

    def settle(self, lead_s: float = 0.0) -> None:
        """Start a new interval with nothing dirty, and let the guest run through it."""
        self._guest.memory.scan()
        due = _clock() + self._interval_s - lead_s
        while (left := due - _clock()) > 0:
            self._guest.checkpointer.pump(left)
        self._guest.execution.running()  # as the loop does before each round
        self._guest.execution.prepare()

    def _round(self, passes: int) -> Sample:
        guest, checkpointer = self._guest, self._guest.checkpointer
        checkpoint = None
        while checkpoint is None:
            for _ in range(passes):
                checkpointer.copy_pass()
            checkpointer.prepare()
            checkpoint = checkpointer.capture()
            if checkpoint is None:
                checkpointer.copy_pass()
        checkpointer.transfer(checkpoint)
        checkpointer.pump()
        record = guest.last
        assert record is not None
        assert record.epoch == checkpoint.epoch
        return Sample(record.pause_us / 1e3, record)

    def pause(self) -> Sample:
        """A round as the product does it: passes, then the pause; only the pause counts."""
        self.settle(self._passes_s)
        begin = _clock()
        sample = self._round(self._passes)
        spent = _clock() - begin - sample.ms / 1e3
        self._passes_s += 0.2 * (spent - self._passes_s)
        self._numbers = np.sort(np.concatenate(self._guest.sink.last_pages or [self._numbers]))
        return sample

    def plain(self) -> Sample:
        """A round without passes: all that is dirty is copied in the pause."""
        self.settle()
        return self._round(0)

    def floor(self) -> Sample:
        """Stop, save the devices, go on: nothing is scanned, nothing copied."""
        self.settle()
        execution = self._guest.execution
        time.sleep(PREPARED_S)
        start = _clock()
        execution.pause()
        execution.saved()
        execution.resume()
        end = _clock()
        execution.device_state()  # as after a pause
        return Sample((end - start) * 1e3)

    def memcpy(self) -> Sample:
        """Copy the pages of the last whole pause into warm memory; the guest runs."""
        pages = self._numbers[:COPY_PAGES]
        out = self._warm[: len(pages)]
        start = _clock()
        self._guest.memory.copy(pages, out)
        return Sample((_clock() - start) * 1e3)
