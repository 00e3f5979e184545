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

"""A record of cuts and releases for tests: which bytes of a NIC's stream belong to which epoch."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from nova_pmt.checkpoint.interfaces import OutputBuffer
from nova_pmt.checkpoint.wrapped import Wrapped

#: Name of a file that lines are added to.
VARIABLE = "NOVA_PMT_TRACE"


class Trace:
    """Writes JSON lines; times are CLOCK_MONOTONIC in seconds."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="ascii", buffering=1)

    @classmethod
    def from_environment(cls) -> Trace | None:
        """The trace that was asked for."""
        path = os.environ.get(VARIABLE)
        return cls(path) if path else None

    def line(self, **members: Any) -> None:
        """Write one line, with the time."""
        self._file.write(json.dumps({"at": time.monotonic(), **members}) + "\n")

    def wrap(self, buffer: Any) -> OutputBuffer:
        """The buffer, with its cuts and releases written down."""
        return _Traced(buffer, self)

    def close(self) -> None:
        self._file.close()


class _Traced(Wrapped):
    """Writes down what is let out."""

    def __init__(self, buffer: Any, trace: Trace) -> None:
        super().__init__(buffer)
        self._trace = trace
        self._ends: dict[int, int | None] = {}

    def cut(self, epoch: int) -> None:
        super().cut(epoch)
        self._ends[epoch] = getattr(self._buffer, "last_cut", None)

    def release(self, epoch: int) -> float | None:
        nic = self._buffer.nic.alias
        self._trace.line(event="release", epoch=epoch, nic=nic, end=self._ends.pop(epoch))
        return super().release(epoch)
