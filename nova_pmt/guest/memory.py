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

"""Reading the RAM of a running guest: mapped where it is shared, copied by the kernel where not.

Shared memory (memfd or file) is mapped read-only into this process through
``/proc/PID/map_files``, whatever has become of its name. Private anonymous memory
is read with ``process_vm_readv``, 1,024 pages a call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from nova_pmt import exception
from nova_pmt.guest import process
from nova_pmt.guest.layout import PAGE_SIZE, Layout, TrackedBlock
from nova_pmt.guest.pagemap import PAGE_SHIFT, PageNumbers, RangeScanner, expand
from nova_pmt.guest.tracker import MemoryTracker

Pages = npt.NDArray[np.uint8]
IOV_MAX = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class BlockReader(ABC):
    """Reads one RAM block."""

    def __init__(self, block: TrackedBlock) -> None:
        self.block = block

    @abstractmethod
    def copy(self, pages: PageNumbers, out: Pages) -> None:
        """Copy pages (numbers within the block) into ``out``, shape (len(pages), 4096)."""

    @abstractmethod
    def populated(self) -> list[PageNumbers]:
        """Ranges of pages (numbers within the block) that may hold other than zeros."""

    @abstractmethod
    def close(self) -> None:
        """Unmap, close."""


class SharedReader(BlockReader):
    """A block that QEMU has mapped from one file."""

    def __init__(self, block: TrackedBlock, pid: int, mapping: process.Mapping) -> None:
        super().__init__(block)
        self._offset = mapping.offset + block.address - mapping.start
        self._fd = os.open(f"/proc/{pid}/map_files/{mapping.link}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(
                self._fd, block.length, mmap.MAP_SHARED, mmap.PROT_READ, offset=self._offset
            )
        except BaseException:
            os.close(self._fd)
            raise
        self._pages: Pages = np.frombuffer(self._map, np.uint8).reshape(-1, PAGE_SIZE)

    def copy(self, pages: PageNumbers, out: Pages) -> None:
        # mode='clip' lets numpy write straight into out; 'raise' would buffer everything once.
        np.take(self._pages, pages, axis=0, out=out, mode="clip")

    def populated(self) -> list[PageNumbers]:
        # Not the page tables of QEMU: on a standby that took over, most pages were written by
        # its worker and QEMU has not touched them yet.
        found, at, end = [], self._offset, self._offset + self.block.length
        while at < end:
            try:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            hole = min(os.lseek(self._fd, at, os.SEEK_HOLE), end)
            if at < end:
                first = (at - self._offset) >> PAGE_SHIFT
                last = (hole - self._offset + PAGE_SIZE - 1) >> PAGE_SHIFT
                found.append(np.array([[first, last]], np.int64))
            at = hole
        return found

    def close(self) -> None:
        self._pages = np.zeros((0, PAGE_SIZE), np.uint8)
        # A view that someone still holds keeps the mapping; it goes with the process then.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._fd)


class PrivateReader(BlockReader):
    """A block in private anonymous memory of QEMU."""

    def __init__(self, block: TrackedBlock, pid: int) -> None:
        super().__init__(block)
        self._pid = pid
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._remote: npt.NDArray[np.uint64] = np.full((IOV_MAX, 2), PAGE_SIZE, np.uint64)
        self._local: npt.NDArray[np.uint64] = np.zeros((1, 2), np.uint64)

    def copy(self, pages: PageNumbers, out: Pages) -> None:
        for at in range(0, len(pages), IOV_MAX):
            part = pages[at : at + IOV_MAX]
            count = len(part)
            addresses = self._remote[:count, 0]
            np.multiply(part, PAGE_SIZE, out=addresses, casting="unsafe")
            addresses += np.uint64(self.block.address)
            self._local[0, 0] = out.ctypes.data + at * PAGE_SIZE
            self._local[0, 1] = count * PAGE_SIZE
            done = _libc.process_vm_readv(
                self._pid, self._local.ctypes.data, 1, self._remote.ctypes.data, count, 0
            )
            if done != count * PAGE_SIZE:
                number = ctypes.get_errno() if done < 0 else errno.EFAULT
                if number == errno.ESRCH:
                    raise exception.GuestGone(f"QEMU {self._pid} has ended")
                raise exception.GuestError(
                    f"memory of QEMU {self._pid} cannot be read: {os.strerror(number)}"
                )

    def populated(self) -> list[PageNumbers]:
        address = self.block.address
        return RangeScanner(self._pagemap, address, address + self.block.length, 0).populated()

    def close(self) -> None:
        os.close(self._pagemap)


def make_reader(block: TrackedBlock, pid: int) -> BlockReader:
    """The reader that fits how QEMU has this block mapped."""
    found = process.covering(pid, block.address, block.length)
    if len(found) == 1 and found[0].shared and found[0].inode:
        return SharedReader(block, pid, found[0])
    if any(mapping.shared for mapping in found):
        raise exception.UnsupportedMemory(
            f"RAM block '{block.name}' is pieced together from {len(found)} shared mappings"
        )
    return PrivateReader(block, pid)


class TrackedMemory:
    """The memory of one guest as the algorithm sees it.

    Implements :class:`nova_pmt.checkpoint.interfaces.GuestMemory`.

    :param layout: the guest's tracked blocks.
    :param pid: QEMU's process id.
    :param tracker: tells which pages were written; already attached.
    """

    def __init__(self, layout: Layout, pid: int, tracker: MemoryTracker) -> None:
        self.layout = layout
        self.page_count = layout.page_count
        self._tracker = tracker
        self._readers: list[BlockReader] = []
        try:
            for block in layout.blocks:
                self._readers.append(make_reader(block, pid))
        except BaseException:
            self.close()
            raise
        self._ends: PageNumbers = np.array(
            [block.first_page + block.pages for block in layout.blocks], np.int64
        )

    def scan(self) -> PageNumbers:
        return self._tracker.scan()

    def populated(self) -> PageNumbers:
        parts = []
        for reader in self._readers:
            for ranges in reader.populated():
                parts.append(ranges + reader.block.first_page)
        total = sum(int((part[:, 1] - part[:, 0]).sum()) for part in parts)
        out: PageNumbers = np.zeros(total, np.int64)
        return expand(parts, out, np.arange(self.page_count, dtype=np.int64))

    def copy(self, pages: PageNumbers, out: Pages) -> None:
        if len(self._readers) == 1 or len(pages) == 0 or pages.max() < self._ends[0]:
            self._readers[0].copy(pages, out)
            return
        owners = np.searchsorted(self._ends, pages, side="right")
        for index, reader in enumerate(self._readers):
            mine = np.flatnonzero(owners == index)
            if len(mine):
                gathered = np.empty((len(mine), PAGE_SIZE), np.uint8)
                reader.copy(pages[mine] - reader.block.first_page, gathered)
                out[mine] = gathered

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        self._readers = []
