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

"""A disk of the fake guest, with its write log, and the standby's image of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.disk.writelog import Entry
from nova_pmt.standby.journal import Journal
from tests.unit.fakes.guest import Faults, Guest

SECTOR = 512


class FakeDisk:
    """Implements :class:`nova_pmt.checkpoint.interfaces.WriteLog` over a real log in memory."""

    def __init__(self, guest: Guest, sectors: int, faults: Faults | None = None) -> None:
        self.data = bytearray(sectors * SECTOR)
        self.snapshots: dict[int, bytes] = {}
        self.logging = False
        self.broken = ""
        self.limit = 1 << 20
        self._guest = guest
        self._faults = faults or Faults()
        self._log = bytearray()
        self._cut = 0
        self._released = 0
        self._segments: dict[int, tuple[int, int]] = {}
        self._serial = 0

    def write(self, sector: int, count: int, *, discard: bool = False) -> None:
        """The guest writes whole sectors, each time with other contents."""
        assert not self._guest.paused, "a paused guest does not write"
        self._serial += 1
        content = b"" if discard else struct.pack("<Q", self._serial) * 64 * count
        start = sector * SECTOR
        self.data[start : start + count * SECTOR] = content or bytes(count * SECTOR)
        if self.logging:
            header = struct.pack("<QQQQ", sector, count, 4 if discard else 0, 0)
            self._log += header.ljust(SECTOR, b"\0") + content

    def pause(self, number: int) -> None:
        """The guest was stopped: what its disk holds then."""
        self.snapshots[number] = bytes(self.data)

    def cut(self, epoch: int) -> None:
        self._faults.enter("disk.cut")
        assert self._guest.paused, "of a guest that runs the log's end is not known"
        self._segments[epoch] = (self._cut, len(self._log))
        self._cut = len(self._log)
        self._faults.leave()

    def segments(self, epoch: int) -> Iterator[memoryview]:
        assert not self._guest.paused, "logs are not read in a pause"
        start, end = self._segments[epoch]
        for at in range(start, end, 1000):  # entries are cut anywhere
            yield memoryview(bytes(self._log[at : min(end, at + 1000)]))

    def release(self, epoch: int) -> float | None:
        start, end = self._segments.pop(epoch)
        assert start == self._released, "released out of order"
        self._released = end
        return None

    @property
    def pressure(self) -> float:
        return (len(self._log) - self._released) / self.limit


class Images:
    """The standby's images, in memory."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.data = [bytearray(size) for size in sizes]

    def copy(self, disk: int, offset: int, data: memoryview) -> None:
        self.data[disk][offset : offset + len(data)] = data

    def apply(self, disk: int, entries: Sequence[Entry]) -> None:
        for entry in entries:
            end = entry.offset + entry.length
            self.data[disk][entry.offset : end] = (
                entry.data if entry.data is not None else bytes(entry.length)
            )


def journal(sizes: Sequence[int]) -> tuple[Journal, Images]:
    """The real journal over images in memory."""
    images = Images(sizes)
    specs = [DiskSpec(f"vd{n}", "raw", f"/vd{n}", size) for n, size in enumerate(sizes)]
    return Journal(images, specs), images  # type: ignore[arg-type]
