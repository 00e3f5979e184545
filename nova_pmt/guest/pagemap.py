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

"""PAGEMAP_SCAN: which pages of a process were written, re-protected in the same step.

Source: Linux ``Documentation/admin-guide/mm/pagemap.rst`` and
``include/uapi/linux/fs.h`` (6.7 and newer). The ioctl takes mmap_lock shared
and costs about 3.3 ns per mapped page, written or not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

import numpy as np
import numpy.typing as npt

PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING = 1
PM_SCAN_CHECK_WPASYNC = 2
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_SHIFT = 12
#: Ranges that one ioctl can return.
VECTOR_RANGES = 16384

PageNumbers = npt.NDArray[np.int64]


class ScanArguments(ctypes.Structure):
    """``struct pm_scan_arg``."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in [
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        ]
    ]


def supported() -> bool:
    """Whether this kernel has PAGEMAP_SCAN: asks it, about one page of our own."""
    args = ScanArguments(size=ctypes.sizeof(ScanArguments), return_mask=PAGE_IS_PRESENT)
    args.category_mask = PAGE_IS_PRESENT
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, PAGEMAP_SCAN, args)
    except OSError as error:
        return error.errno not in (errno.ENOTTY, errno.EINVAL)
    finally:
        os.close(fd)
    return True


class RangeScanner:
    """Scans one address range of one process. Everything it needs is allocated here, once.

    :param fd: an open ``/proc/PID/pagemap``; the caller keeps it open.
    :param start: first address; page aligned.
    :param end: address after the last.
    :param first_page: page number of ``start`` in the guest's numbering.
    """

    def __init__(self, fd: int, start: int, end: int, first_page: int) -> None:
        self._fd = fd
        self.start, self.end = start, end
        self._shift = first_page - (start >> PAGE_SHIFT)
        self._vector: npt.NDArray[np.uint64] = np.zeros((VECTOR_RANGES, 3), np.uint64)
        self._args = ScanArguments(size=ctypes.sizeof(ScanArguments))
        self._args.vec = self._vector.ctypes.data
        self._args.vec_len = VECTOR_RANGES

    def written(self) -> list[PageNumbers]:
        """Page ranges written since the last call, protected again.

        :returns: arrays of shape (n, 2): first page, page after the last.
        :raises OSError: EPERM when the range is not under asynchronous
            write protection.
        """
        self._args.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
        self._args.category_mask = PAGE_IS_WRITTEN
        self._args.category_anyof_mask = 0
        self._args.return_mask = PAGE_IS_WRITTEN
        return self._scan()

    def populated(self) -> list[PageNumbers]:
        """Page ranges that this process has in memory or swap. Nothing is protected."""
        self._args.flags = 0
        self._args.category_mask = 0
        self._args.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        self._args.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        return self._scan()

    def probe(self) -> None:
        """Fail as :meth:`written` would, but look at one page only and protect nothing.

        :raises OSError: EPERM when the range is not under asynchronous
            write protection.
        """
        args = ScanArguments.from_buffer_copy(self._args)
        args.flags = PM_SCAN_CHECK_WPASYNC
        args.category_mask = args.return_mask = PAGE_IS_WRITTEN
        args.start, args.end = self.start, self.start + (1 << PAGE_SHIFT)
        fcntl.ioctl(self._fd, PAGEMAP_SCAN, args)

    def _scan(self) -> list[PageNumbers]:
        found = []
        args = self._args
        args.start, args.end = self.start, self.end
        while args.start < self.end:
            count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, args)
            if count:
                ranges = (self._vector[:count, :2] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
                ranges += self._shift
                found.append(ranges)
            if count < VECTOR_RANGES:
                # The walk ends early for no other reason than a full vector (or an error).
                # But walk_end does not tell: once the kernel's own buffer of 512 ranges was
                # full it stays where that was (do_pagemap_scan: "walk_end isn't set when ret is
                # zero"); to go on from there would walk almost everything a second time.
                break
            args.start = args.walk_end
        return found


def expand(ranges: list[PageNumbers], out: PageNumbers, counter: PageNumbers) -> PageNumbers:
    """Turn ranges into single page numbers.

    :param ranges: arrays of shape (n, 2).
    :param out: buffer for the result, as long as the guest has pages.
    :param counter: ``arange`` of the same length.
    :returns: the filled part of ``out``, ascending within each range.
    """
    at = 0
    for part in ranges:
        if len(part) <= 64:  # few ranges: slices beat the vector code's set-up
            for first, last in part.tolist():
                out[at : at + last - first] = counter[first:last]
                at += last - first
            continue
        lengths = part[:, 1] - part[:, 0]
        total = int(lengths.sum())
        ends = np.cumsum(lengths)
        np.add(
            np.repeat(part[:, 0] - (ends - lengths), lengths),
            counter[:total],
            out=out[at : at + total],
        )
        at += total
    return out[:at]
