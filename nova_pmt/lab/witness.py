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

"""A witness from outside: watches the guest's counter in a standby's memory file.

The file is the standby's image: between the last commit and the activation it holds the
counter of the last committed checkpoint, and from the activation on the counter as the guest
counts on. A value that is ever smaller than one before is a tick of a committed checkpoint from
which the standby did not continue.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nova_pmt.exception import LabError
from nova_pmt.guest import process
from nova_pmt.lab.host import LabHost

MAGIC = b"PMT-LAB-COUNTER\0"
PAGE = 4096
_FIELDS = struct.Struct("<QQ")  # counter, boot id; at offset 16
EVERY_S = 0.002
#: A counter that stands still for so long, in seconds, may have been moved.
MOVED_S = 1.0


@dataclass(frozen=True)
class Sample:
    """The counter as it was seen; ``at`` is CLOCK_MONOTONIC in seconds."""

    at: float
    counter: int


def _memory_file(host: LabHost, uuid: str) -> Path:
    """The memory file of a domain's QEMU, through its mappings."""
    needle = uuid.encode()
    for entry in os.listdir("/proc"):
        try:
            inside = entry.isdigit() and os.path.samefile(
                f"/proc/{entry}/ns/pid", f"/proc/{host.init_pid}/ns/pid"
            )
            if not inside or needle not in Path(f"/proc/{entry}/cmdline").read_bytes():
                continue
            pid = int(entry)
            if not process.is_qemu(pid):
                continue
            for mapping in process.mappings(pid):
                if mapping.shared and mapping.path.endswith("pc.ram"):
                    return Path(f"/proc/{pid}/map_files/{mapping.link}")
        except OSError:
            continue
    raise LabError(f"{host.name} has no memory file of domain {uuid}")


class Witness:
    """Samples the counter every 2 ms from ``with`` to its end.

    :param host: the standby's host; its waiting domain must be there.
    """

    def __init__(self, host: LabHost, uuid: str) -> None:
        with open(_memory_file(host, uuid), "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._at = -1
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)
        self.samples: list[Sample] = []

    def _places(self) -> list[int]:
        """Where memory looks like the counter's page."""
        found, at = [], self._map.find(MAGIC)
        while at >= 0:
            if at % PAGE == 0 and _FIELDS.unpack_from(self._map, at + 16)[1]:
                found.append(at)
            at = self._map.find(MAGIC, at + 1)
        return found

    def _value(self, at: int) -> int:
        return int(_FIELDS.unpack_from(self._map, at + 16)[0])

    def _find(self) -> int:
        """The counter's page. The guest's kernel may move it (compaction), and what it leaves
        behind looks the same, but counts no more."""
        before = {at: self._value(at) for at in self._places()}
        if len(before) > 1:
            self._end.wait(0.1)
        return max(before, key=lambda at: (self._value(at) != before[at], before[at]), default=-1)

    def _watch(self) -> None:
        changed = time.monotonic()
        while not self._end.wait(EVERY_S):
            if self._at < 0 or time.monotonic() - changed > MOVED_S:
                self._at, changed = self._find(), time.monotonic()
                if self._at < 0:
                    self._end.wait(0.2)
                continue
            value = self._value(self._at)
            if not self.samples or self.samples[-1].counter != value:
                changed = time.monotonic()
                self.samples.append(Sample(changed, value))

    def wait_found(self, timeout_s: float = 20.0) -> None:
        """Return once the counter is being watched.

        :raises LabError: it was not found.
        """
        deadline = time.monotonic() + timeout_s
        while not self.samples:
            if time.monotonic() > deadline:
                raise LabError(f"no counter in the standby's memory after {timeout_s:.0f} s")
            time.sleep(EVERY_S)

    def lost_ticks(self) -> int:
        """Ticks of committed checkpoints that the counter fell back behind; 0 is right."""
        highest = lost = 0
        for sample in self.samples:
            lost = max(lost, highest - sample.counter)
            highest = max(highest, sample.counter)
        return lost

    def first_after(self, at: float, timeout_s: float = 10.0) -> Sample | None:
        """The first change of the counter after a moment; waited for, since a guest that was
        just resumed may be slow to count, and so may we be to look."""
        deadline = time.monotonic() + timeout_s
        while True:
            for sample in list(self.samples):
                if sample.at > at:
                    return sample
            if time.monotonic() > deadline:
                return None
            time.sleep(EVERY_S)

    def last_before(self, at: float) -> Sample | None:
        """The counter at a moment."""
        return next((sample for sample in reversed(self.samples) if sample.at <= at), None)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        self._map.close()
