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

"""The log that QEMU's ``blklogwrites`` keeps of a disk's writes, read entry by entry.

Source: ``block/blklogwrites.c`` of QEMU (and ``drivers/md/dm-log-writes.c`` of Linux, whose format
it is). After a super block of one sector, which is not for us, comes for each request a header
of one sector (little endian, the rest of it zeros)

=======  ==================================================================
u64      first sector of the disk
u64      number of sectors
u64      flags: flush 1, FUA 2, discard 4, mark 8
u64      length of inline data; QEMU has none
=======  ==================================================================

and then its data, sector by sector; a discard and a flush have none, and a flush has no sectors
either. All of this is the same in QEMU 6.2 to 10. QEMU writes no marks, and no FUA flag (it asks
for a flush instead); a request is logged after it was done, also when it failed. A request to
write zeros has the zeros in the log: each of its bytes takes one of the log's file.

A known fault: before QEMU 7.2.9, 8.1.5, 8.2.1 and 9.0 (commit
a9c8ea95470c27a8a02062b67f9fa6940e828ab6, "block/blklogwrites: Fix a bug when logging "write
zeroes" operations") the sectors for the data of a request to write zeros were taken only after its
header was written, so that what other requests logged meanwhile lies between. Read as it should
be, such a log has as many sectors too many as were taken for data although they were headers or
other requests' data; nothing can take these up but data that look like headers. So:

- A whole segment (from one moment without requests to another, as when the guest is stopped) with
  this fault never ends at a boundary without an error, unless the guest itself writes sectors
  that look like headers. The error may come as late as with the last sector: whoever cannot undo
  applies a segment only when it was read to its end and :meth:`LogParser.finish` agreed.
- It is not guessed where the data are. A sector of a guest's data that looks like a header (two
  small numbers, then zeros) is too common to tell what is what, and a wrong guess would be a disk
  that differs in silence. The pair synchronises again instead.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import numpy as np

from nova_pmt import exception
from nova_pmt.guest.disk.spec import SECTOR

_HEADER = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_CURE = (
    "Nothing: protection resumes by itself with a new synchronisation. When it happens again, "
    "update QEMU: before 7.2.9, 8.1.5 and 8.2.1 it logs requests to write zeros wrongly."
)


class Kind(enum.Enum):
    """What a request did."""

    WRITE = "write"
    DISCARD = "discard"
    FLUSH = "flush"


class Entry(NamedTuple):
    """A request of the guest, or a part of one (a tuple: there are very many of them).

    :param offset: on the disk, in bytes; 0 of a flush.
    :param length: in bytes; 0 of a flush.
    :param data: of a write; a view of what was fed, so it is good as long as that is unchanged.
    :param zero: a write whose data are all zeros.
    :param fua: a write that was to be on the disk when it was answered.
    """

    kind: Kind
    offset: int
    length: int
    data: memoryview | None = None
    zero: bool = False
    fua: bool = False


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zeros."""
    if not len(data):
        return True
    # The ends decide nearly always; numpy stops at the first byte that is not zero.
    if data[0] or data[-1]:
        return False
    return not np.frombuffer(data, np.bool_).any()


class LogParser:
    """Reads a log from whatever pieces come, from the sector behind the super block on.

    Holds less than one sector itself: a write whose data are in several pieces becomes several
    entries, which together are the write.

    :param disk_size: in bytes; what reaches beyond it is an error.
    :param sector: ``log-sector-size`` of the log, in bytes.
    """

    def __init__(self, disk_size: int, sector: int = SECTOR) -> None:
        if sector < _HEADER.size or sector & (sector - 1):
            raise ValueError(f"no log has sectors of {sector} bytes")
        self._sector = sector
        self._sectors = -(-disk_size // sector)
        self._padding = bytes(sector - _HEADER.size)
        self._rest = b""  # of the last piece: a part of a sector
        self._at = 0  # of the write that is being read: where the next of its data go
        self._left = 0  # and how many bytes of it are to come
        self._fua = False
        #: Requests that were seen so far.
        self.requests = 0

    @property
    def at_boundary(self) -> bool:
        """Whether no request is half read."""
        return not self._left and not self._rest

    def finish(self) -> None:
        """What was fed so far was a whole segment.

        :raises nova_pmt.exception.DiskLogError: it ends within a request.
        """
        if not self.at_boundary:
            raise exception.DiskLogError(
                f"the write log ends within request {self.requests}", cure=_CURE
            )

    def feed(self, chunk: bytes | bytearray | memoryview) -> list[Entry]:
        """The next bytes of the log, any number of them.

        :returns: the entries that they end or continue, in order.
        :raises nova_pmt.exception.DiskLogError: they are none of a log of this disk; feed no more.
        """
        view = memoryview(chunk).cast("B")
        entries: list[Entry] = []
        if self._rest:
            missing = self._sector - len(self._rest)
            self._rest += view[:missing]
            if len(self._rest) < self._sector:
                return entries
            self._read(memoryview(self._rest), entries)
            self._rest = b""
            view = view[missing:]
        whole = len(view) // self._sector * self._sector
        self._read(view[:whole], entries)
        self._rest = bytes(view[whole:])
        return entries

    def _read(self, view: memoryview, entries: list[Entry]) -> None:
        """Read whole sectors."""
        at, end, sector = 0, len(view), self._sector
        while at < end:
            if not self._left:
                self._header(view, at, entries)
                at += sector
                continue
            length = min(self._left, end - at)
            data = view[at : at + length]
            entries.append(Entry(Kind.WRITE, self._at, length, data, is_zero(data), self._fua))
            self._at += length
            self._left -= length
            at += length

    def _header(self, view: memoryview, at: int, entries: list[Entry]) -> None:
        self.requests += 1
        sector = self._sector
        first, count, flags, inline = _HEADER.unpack_from(view, at)
        if inline or view[at + _HEADER.size : at + sector].tobytes() != self._padding:
            raise self._error("has a header that is none")
        if flags == _FLUSH:
            if first or count:
                raise self._error("is a flush of sectors")
            entries.append(Entry(Kind.FLUSH, 0, 0))
            return
        if flags not in (0, _FUA, _DISCARD):
            raise self._error(f"has flags {flags:#x}")
        if not count:
            raise self._error("has no sectors")
        if first + count > self._sectors:
            raise self._error(
                f"is at sector {first}+{count}, but the disk has {self._sectors} sectors"
            )
        if flags == _DISCARD:
            entries.append(Entry(Kind.DISCARD, first * sector, count * sector))
            return
        self._at, self._left = first * sector, count * sector
        self._fua = flags == _FUA

    def _error(self, what: str) -> exception.DiskLogError:
        return exception.DiskLogError(
            f"request {self.requests} of the write log {what}", cure=_CURE
        )
