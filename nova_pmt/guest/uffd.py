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

"""Dirty-page tracking with an asynchronous write-protect userfaultfd and PAGEMAP_SCAN.

The userfaultfd is created *inside* QEMU (:mod:`nova_pmt.guest.injection`) since
one can only be registered on memory of the process that made it. In asynchronous
mode (``UFFD_FEATURE_WP_ASYNC``, Linux 6.7) no fault ever reaches user space: the
kernel clears the protection of a written page by itself, and PAGEMAP_SCAN, from
outside, returns the written pages and protects them again in one atomic step.

Not seen by it: writes through another process's mapping (vhost-user) or past the
CPU's page tables (VFIO). :mod:`nova_pmt.guest.checks` refuses those.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import queue
import struct
import threading
from collections import deque

import numpy as np

from nova_pmt import exception
from nova_pmt.guest import pagemap
from nova_pmt.guest.injection import ForeignCalls
from nova_pmt.guest.layout import PAGE_SIZE, Layout
from nova_pmt.guest.pagemap import PageNumbers, RangeScanner
from nova_pmt.guest.tracker import SCAN_THREAD, MemoryTracker

SYS_CLOSE, SYS_IOCTL, SYS_USERFAULTFD = 3, 16, 323
UFFD_USER_MODE_ONLY = 1
UFFD_API = 0xAA
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
UFFDIO_REGISTER_MODE_WP = 2
#: PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC
FEATURES = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15
#: A thread more pays from about here on: one thread scans this much in 0.4 ms.
BYTES_PER_THREAD = 512 << 20
MAX_THREADS = 8
#: Memory is cut into so many parts per thread, and each thread takes the next part that is left:
#: one that was woken late, since QEMU saves its devices at the same time, takes fewer.
PARTS_PER_THREAD = 6


class UffdTracker(MemoryTracker):
    """See the module's text.

    :param pid: QEMU's process id.
    :param layout: the blocks to track.
    :param threads: how many threads scan; 0 chooses by the guest's size and the CPUs.
    """

    def __init__(self, pid: int, layout: Layout, threads: int = 0) -> None:
        self._pid = pid
        self._layout = layout
        wanted = max(1, round(layout.memory_bytes / BYTES_PER_THREAD))
        self._threads = threads or min(wanted, MAX_THREADS, os.cpu_count() or 1)
        self._foreign_fd: int | None = None
        self._pagemap = -1
        self._parts: list[RangeScanner] = []
        self._left: deque[RangeScanner] = deque()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._helpers = 0
        self._answers: queue.SimpleQueue[list[PageNumbers] | BaseException] = queue.SimpleQueue()
        count = layout.page_count
        self._numbers: PageNumbers = np.zeros(count, np.int64)
        self._counter: PageNumbers = np.arange(count, dtype=np.int64)

    @property
    def thread_count(self) -> int:
        """How many threads scan."""
        return self._threads

    @classmethod
    def check(cls) -> None:
        if not pagemap.supported():
            raise exception.UnsupportedKernel(f"kernel {os.uname().release} has no PAGEMAP_SCAN")
        fd = _libc_userfaultfd()
        try:
            features = _offered_features(fd)
        finally:
            os.close(fd)
        missing = FEATURES & ~features
        if missing:
            raise exception.UnsupportedKernel(
                f"kernel {os.uname().release} lacks userfaultfd features {missing:#x}"
            )

    def attach(self) -> None:
        self._pagemap = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._make_scanners()
            if self._armed():
                # A worker that died left it armed: the protection is the kernel's, take it over.
                descriptors = _userfaultfds(self._pid)
                self._foreign_fd = descriptors[0] if len(descriptors) == 1 else None
            else:
                self._arm()
            self.scan()
        except BaseException:
            self.detach()
            raise

    def _make_scanners(self) -> None:
        """Cut the blocks into parts, and start the threads that help to scan them."""
        parts = self._threads * PARTS_PER_THREAD if self._threads > 1 else 1
        share = -(-self._layout.page_count // parts)
        for block in self._layout.blocks:
            for at in range(0, block.pages, share):
                start = block.address + at * PAGE_SIZE
                end = start + min(share, block.pages - at) * PAGE_SIZE
                self._parts.append(RangeScanner(self._pagemap, start, end, block.first_page + at))
        self._helpers = min(self._threads, len(self._parts)) - 1
        for _ in range(self._helpers):
            threading.Thread(target=self._help, name=SCAN_THREAD, daemon=True).start()

    def _help(self) -> None:
        while self._wake.get():
            while (part := self._next_part()) is not None:
                self._answers.put(_scan_part(part))

    def _next_part(self) -> RangeScanner | None:
        try:
            return self._left.popleft()
        except IndexError:
            return None

    def _armed(self) -> bool:
        """Whether all blocks are under asynchronous write protection already."""
        try:
            for part in self._parts:
                part.probe()
        except OSError as error:
            if error.errno == errno.EPERM:
                return False
            raise
        return True

    def _arm(self) -> None:
        with ForeignCalls(self._pid) as foreign:
            try:
                fd, _ = foreign.call(
                    SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY
                )
            except OSError as error:
                raise exception.InjectionRefused(
                    f"QEMU {self._pid} may not use userfaultfd: {error.strerror}"
                ) from error
            try:
                api = struct.pack("QQQ", UFFD_API, FEATURES, 0)
                foreign.call(SYS_IOCTL, fd, UFFDIO_API, None, buffer=api)
                for block in self._layout.blocks:
                    register = struct.pack(
                        "QQQQ", block.address, block.length, UFFDIO_REGISTER_MODE_WP, 0
                    )
                    foreign.call(SYS_IOCTL, fd, UFFDIO_REGISTER, None, buffer=register)
            except OSError as error:
                with contextlib.suppress(OSError):
                    foreign.call(SYS_CLOSE, fd)
                raise exception.InjectionRefused(
                    f"userfaultfd cannot be registered on QEMU {self._pid}: {error.strerror}"
                ) from error
            self._foreign_fd = fd

    def scan(self) -> PageNumbers:
        self._left.extend(self._parts)
        for _ in range(self._helpers):
            self._wake.put(True)
        answers: list[list[PageNumbers] | BaseException] = []
        while (part := self._next_part()) is not None:
            answers.append(_scan_part(part))
        while len(answers) < len(self._parts):
            answers.append(self._answers.get())
        ranges: list[PageNumbers] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            ranges += answer
        return pagemap.expand(ranges, self._numbers, self._counter)

    def detach(self) -> None:
        if self._foreign_fd is not None:
            try:
                with ForeignCalls(self._pid) as foreign:
                    for block in self._layout.blocks:
                        area = struct.pack("QQ", block.address, block.length)
                        # What is not mapped any more must not hinder the rest; closing ends it all.
                        with contextlib.suppress(OSError):
                            foreign.call(
                                SYS_IOCTL, self._foreign_fd, UFFDIO_UNREGISTER, None, buffer=area
                            )
                    foreign.call(SYS_CLOSE, self._foreign_fd)
            except (exception.InjectionRefused, OSError):
                if os.path.exists(f"/proc/{self._pid}"):
                    raise
            finally:
                self._foreign_fd = None
        self.close()

    def close(self) -> None:
        for _ in range(self._helpers):
            self._wake.put(False)
        self._helpers = 0
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1


def _scan_part(part: RangeScanner) -> list[PageNumbers] | BaseException:
    """What was written, or what went wrong: raised by the thread that wanted to know."""
    try:
        return part.written()
    except BaseException as error:  # noqa: BLE001
        return error


def _userfaultfds(pid: int) -> list[int]:
    """File descriptors of a process that are userfaultfds."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if "userfaultfd" in os.readlink(f"/proc/{pid}/fd/{name}"):
                found.append(int(name))
    return found


def _libc_userfaultfd() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    if fd < 0:
        raise exception.UnsupportedKernel(
            f"userfaultfd is not to be had here: {os.strerror(ctypes.get_errno())}"
        )
    return int(fd)


def _offered_features(fd: int) -> int:
    argument = bytearray(struct.pack("QQQ", UFFD_API, 0, 0))
    fcntl.ioctl(fd, UFFDIO_API, argument)
    return int(struct.unpack("QQQ", argument)[1])
