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

"""Numbers of the rounds: a ring of the last ones, totals, and a summary for people.

Written between pauses only. Times are in microseconds, sizes in pages or bytes.
"""

from __future__ import annotations

import bisect
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

#: Rounds that percentiles are taken over: the last 100 s at 50 ms.
RING = 2048
#: Upper ends of the classes of histograms.
SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2,
    0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
PAGES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0)


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    :param started_s: CLOCK_MONOTONIC at the start of the pause, in seconds.
    :param pause_us: from the request to stop until the guest runs again.
    :param stop_us: until the guest has stopped.
    :param scan_us: scanning memory, while QEMU saves the devices.
    :param copy_us: copying what the pre-copy passes left.
    :param save_us: waiting, after that, until the devices are saved.
    :param wait_us: waiting, after that, for the standby's commit: 0 where the guest runs meanwhile.
    :param cont_us: until the guest runs again.
    :param pages: pages of the checkpoint.
    :param pause_pages: pages that were copied in the pause.
    :param commit_us: until the standby said "committed", from the end of the pause, or from the
        end of the save where the pause lasts until then.
    :param device_bytes: size of the device state.
    :param log_bytes: size of the disks' write logs.
    :param output_us: for how long the epoch's oldest output was held; 0 when there was none.
    """

    epoch: int
    started_s: float
    pause_us: float
    stop_us: float
    scan_us: float
    copy_us: float
    save_us: float
    cont_us: float
    pages: int
    pause_pages: int
    commit_us: float
    device_bytes: int
    log_bytes: int = 0
    output_us: float = 0.0
    wait_us: float = 0.0


_COLUMNS = {field.name: index for index, field in enumerate(fields(RoundRecord))}


def percentiles(values: npt.NDArray[np.float64], scale: float = 1.0) -> dict[str, float]:
    """p50, p99, max and mean; zeros where there are no values."""
    if not len(values):
        return {"p50": 0.0, "p99": 0.0, "max": 0.0, "mean": 0.0}
    scaled = values * scale
    return {
        "p50": round(float(np.percentile(scaled, 50)), 3),
        "p99": round(float(np.percentile(scaled, 99)), 3),
        "max": round(float(scaled.max()), 3),
        "mean": round(float(scaled.mean()), 3),
    }


class Histogram:
    """Counts values by size, for as long as the primary lives.

    :param bounds: upper ends of all classes but the last, ascending.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def to_dict(self) -> dict[str, Any]:
        """``bounds``, ``counts`` (one more than bounds, not cumulated) and ``sum``."""
        return {
            "bounds": list(self._bounds),
            "counts": list(self._counts),
            "sum": round(self._sum, 6),
        }


class Statistics:
    """Collects the records of one primary."""

    def __init__(self) -> None:
        self._ring: npt.NDArray[np.float64] = np.zeros((RING, len(_COLUMNS)), np.float64)
        self.rounds = 0
        self.deferred = 0
        self.throttled_rounds = 0
        self.output_rounds = 0
        self.pages_total = 0
        self.log_bytes_total = 0
        self._last: RoundRecord | None = None
        self._pause = Histogram(SECONDS)
        self._commit = Histogram(SECONDS)
        self._output_delay = Histogram(SECONDS)
        self._pages = Histogram(PAGES)

    def add(self, record: RoundRecord) -> None:
        """A round was committed."""
        self._ring[self.rounds % RING] = astuple(record)
        self.rounds += 1
        self.pages_total += record.pages
        self.log_bytes_total += record.log_bytes
        self._last = record
        self._pause.add(record.pause_us * 1e-6)
        self._commit.add(record.commit_us * 1e-6)
        self._pages.add(record.pages)
        if record.output_us > 0:
            self._output_delay.add(record.output_us * 1e-6)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """One figure of the last rounds, unordered."""
        rows = min(self.rounds, RING)
        values: npt.NDArray[np.float64] = self._ring[:rows, _COLUMNS[name]].copy()
        return values

    def summary(self) -> dict[str, Any]:
        """The part of ``status`` that comes from the rounds; times in milliseconds."""
        pause = percentiles(self.column("pause_us"), 1e-3)
        pages = self.column("pages")
        last = self._last
        delays = self.column("output_us")
        pause["last"] = round(last.pause_us / 1e3, 3) if last else 0.0
        return {
            "rounds": self.rounds,
            "deferred": self.deferred,
            "throttled_rounds": self.throttled_rounds,
            # rounds that began because there was output
            "output_rounds": self.output_rounds,
            "pause_ms": pause,
            "pause_steps_ms": {
                name: percentiles(self.column(f"{name}_us"), 1e-3)["p50"]
                for name in ("stop", "scan", "copy", "save", "wait", "cont")
            },
            "pages": {
                "p50": float(np.percentile(pages, 50)) if len(pages) else 0.0,
                "last": last.pages if last else 0,
                "max": float(pages.max()) if len(pages) else 0.0,
                "in_pause_p50": percentiles(self.column("pause_pages"))["p50"],
                "total": self.pages_total,
            },
            "commit_ms": percentiles(self.column("commit_us"), 1e-3),
            # rounds in which nothing was held have no delay
            "output_delay_ms": percentiles(delays[delays > 0], 1e-3),
            "log_bytes_total": self.log_bytes_total,
            "histograms": {
                "pause_seconds": self._pause.to_dict(),
                "commit_seconds": self._commit.to_dict(),
                "output_delay_seconds": self._output_delay.to_dict(),
                "pages": self._pages.to_dict(),
            },
        }
