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

"""Where processor time goes while something is measured: the guest, QEMU, the two workers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def _times(pid: int) -> dict[str, float]:
    """Seconds of a process's threads: those that emulate the guest, and all others."""
    found = {"vcpus": 0.0, "others": 0.0}
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue  # a thread that has just ended
        numbers = rest.split()
        key = "vcpus" if name.startswith("CPU ") else "others"
        found[key] += (int(numbers[11]) + int(numbers[12])) / _TICKS
    return found


class Usage:
    """Processor time from its making on.

    :param processes: name to pid.
    """

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = dict(processes)
        self._start = time.perf_counter()
        self._before = {name: _times(pid) for name, pid in self._processes.items()}

    def cores(self) -> dict[str, float]:
        """Cores that each used until now; ``NAME vcpus`` for those that emulate a guest."""
        elapsed, found = time.perf_counter() - self._start, {}
        for name, pid in self._processes.items():
            for key, value in _times(pid).items():
                used = (value - self._before[name][key]) / elapsed
                if key == "others":
                    found[name] = round(used, 2)
                elif used > 0:
                    found[f"{name} {key}"] = round(used, 2)
        return found
