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

"""PAGEMAP_SCAN on memory of our own: nothing is missed, and nothing is walked twice."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from nova_pmt import exception
from nova_pmt.guest import pagemap, uffd

PAGES = 65536


class Memory:
    """A shared mapping under asynchronous write protection, as a guest's RAM is."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, PAGES * 4096)
        self._view = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        self.address = ctypes.addressof(self._view)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.bytes[::4096] = 1
        self._uffd = uffd._libc_userfaultfd()
        fcntl.ioctl(
            self._uffd, uffd.UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, uffd.FEATURES, 0))
        )
        area = struct.pack("QQQQ", self.address, PAGES * 4096, uffd.UFFDIO_REGISTER_MODE_WP, 0)
        fcntl.ioctl(self._uffd, uffd.UFFDIO_REGISTER, bytearray(area))
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.scanner = pagemap.RangeScanner(
            self._pagemap, self.address, self.address + PAGES * 4096, 0
        )

    def scan(self) -> list[int]:
        out, counter = np.zeros(PAGES, np.int64), np.arange(PAGES)
        return sorted(pagemap.expand(self.scanner.written(), out, counter).tolist())

    def close(self) -> None:
        os.close(self._uffd)
        os.close(self._pagemap)


@pytest.fixture
def memory() -> Iterator[Memory]:
    try:
        uffd.UffdTracker.check()
    except exception.UnsupportedKernel as error:
        pytest.skip(str(error))
    made = Memory()
    made.scan()
    yield made
    made.close()


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 5000, 16383, 16384, 16385, 30000])
def test_each_written_page_is_found_once(memory: Memory, count: int) -> None:
    """Also where the kernel's buffer (512 ranges) or ours (16,384) was full on the way."""
    pages = list(range(1, 2 * count, 2))
    memory.bytes[np.array(pages, np.int64) * 4096] += 1
    assert memory.scan() == pages
    assert memory.scan() == []


def test_pages_behind_where_walk_end_stays_are_found(memory: Memory) -> None:
    """After 512 ranges walk_end no longer tells how far the walk came."""
    pages = [*range(1, 1400, 2), PAGES // 2, PAGES - 1]
    memory.bytes[np.array(pages, np.int64) * 4096] += 1
    assert memory.scan() == pages


def test_nothing_is_walked_twice(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.bytes[np.arange(1, 4000, 2) * 4096] += 1
    calls = []
    ioctl = fcntl.ioctl

    def counted(*arguments: object) -> int:
        calls.append(1)
        return ioctl(*arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(pagemap.fcntl, "ioctl", counted)
    assert len(memory.scan()) == 2000
    assert len(calls) == 1
