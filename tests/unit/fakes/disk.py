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
from collections.abc import Callable, Iterator, Sequence

from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.disk.writelog import Entry
from nova_pmt.standby.journal import Journal
from tests.unit.fakes.guest import Faults, Guest

SECTOR = 512
#: Bytes of a log that are handed on at once: no number of sectors.
PART = 1000


class FakeDisk:
    """Implements :class:`nova_pmt.checkpoint.interfaces.WriteLog` over a real log in memory.

    :param in_pause: whether a pause is going on that somebody waits for the end of.
    """

    def __init__(
        self,
        guest: Guest,
        sectors: int,
        faults: Faults | None = None,
        in_pause: Callable[[], bool] = lambda: False,
    ) -> None:
        self.data = bytearray(sectors * SECTOR)
        self.snapshots: dict[int, bytes] = {}
        self.logging = False
        self.broken = ""
        self.limit = 1 << 20
        self._in_pause = in_pause
        self._guest = guest
        self._faults = faults or Faults()
        self._log = bytearray()  # never shortened, so that offsets stay what they were
        self._cut = 0
        self._released = 0
        #: Cut and not released: first and last byte by number.
        self.waiting: dict[int, tuple[int, int]] = {}
        self._serial = 0
        self.clock: Callable[[], float] = lambda: 0.0
        self.waiting_since = 0.0
        self.on_output: Callable[[], None] | None = None

    def watch(self, on_output: Callable[[], None]) -> None:
        self.on_output = on_output

    def write(self, sector: int, count: int, *, discard: bool = False) -> None:
        """The guest writes whole sectors, each time with other contents."""
        assert not self._guest.paused, "a paused guest does not write"
        self._serial += 1
        content = b"" if discard else struct.pack("<Q", self._serial) * 64 * count
        start = sector * SECTOR
        self.data[start : start + count * SECTOR] = content or bytes(count * SECTOR)
        if self.logging:
            self._log += log_entry(sector, content, count=count, flags=4 if discard else 0)
            if self.on_output is not None and not self.waiting_since:
                self.waiting_since = self.clock()
                self.on_output()

    def pause(self, number: int) -> None:
        """The guest was stopped: what its disk holds then."""
        self.snapshots[number] = bytes(self.data)

    def cut(self, epoch: int) -> None:
        self._faults.enter("disk.cut")
        assert self._guest.paused, "of a guest that runs the log's end is not known"
        self.waiting[epoch] = (self._cut, len(self._log))
        self._cut = len(self._log)
        self.waiting_since = 0.0
        self._faults.leave()

    def segments(self, epoch: int) -> Iterator[memoryview]:
        start, end = self.waiting[epoch]
        for at in range(start, end, PART):  # entries are cut anywhere
            self._faults.enter("segment")
            assert not self._in_pause(), "logs are not read in a pause"
            self._faults.leave()
            yield memoryview(bytes(self._log[at : min(end, at + PART)]))

    def release(self, epoch: int) -> float | None:
        self._faults.enter("disk.release")
        start, end = self.waiting.pop(epoch)
        assert start == self._released, "released out of order"
        self._released = end
        self._faults.leave()
        return None

    @property
    def pressure(self) -> float:
        return (len(self._log) - self._released) / self.limit


class Images:
    """The standby's images, in memory; they begin with garbage, as files that were in use do."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.data = [bytearray(b"\xa5" * size) for size in sizes]
        self.writes = 0

    def copy(self, disk: int, offset: int, data: memoryview) -> None:
        self.writes += 1
        assert offset + len(data) <= len(self.data[disk])
        self.data[disk][offset : offset + len(data)] = data

    def apply(self, disk: int, entries: Sequence[Entry]) -> None:
        self.writes += 1
        for entry in entries:
            end = entry.offset + entry.length
            self.data[disk][entry.offset : end] = (
                entry.data if entry.data is not None else bytes(entry.length)
            )


def journal(sizes: Sequence[int], readonly: Sequence[int] = ()) -> tuple[Journal, Images]:
    """The real journal over images in memory.

    :param readonly: numbers of disks that are not written.
    """
    images = Images(sizes)
    specs = [
        DiskSpec(f"vd{n}", "raw", f"/vd{n}", size, n in readonly) for n, size in enumerate(sizes)
    ]
    return Journal(images, specs), images  # type: ignore[arg-type]


def log_entry(sector: int, content: bytes, *, count: int = 0, flags: int = 0) -> bytes:
    """An entry of a log as QEMU writes it.

    :param count: sectors, where the content does not tell.
    """
    header = struct.pack("<QQQQ", sector, count or len(content) // SECTOR, flags, 0)
    return header.ljust(SECTOR, b"\0") + content
