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

"""The cache: slabs of warm memory that hold checkpoints until they are committed.

The whole limit is one reserved range of addresses, so a page's place is one number
(its *slot*) and numpy gathers straight into it. A slab is *backed* when its memory is
really there (pre-faulted with MADV_POPULATE_WRITE while the guest runs), and costs nothing
when not (MADV_DONTNEED). In a pause only backed slabs are handed out: no page fault.

The size follows a decayed maximum of what recent checkpoints needed: it grows at once, and
shrinks to under a quarter after a burst within 30 quiet rounds (0.85 ** 10 is below 0.2).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Iterable

import numpy as np

from nova_pmt.checkpoint.interfaces import PAGE_SIZE, Pages

#: 1 MiB: small enough to follow the state closely, large enough that a slab is one send.
SLAB_PAGES = 256
SLAB_BYTES = SLAB_PAGES * PAGE_SIZE
MADV_POPULATE_WRITE = 23
MAP_NORESERVE = 0x4000  # asm-generic/mman-common.h; not in Python's mmap before 3.12
DECAY = 0.85
#: Kept ready above what recent checkpoints needed.
HEADROOM = 1.25
SPARE_SLABS = 2


class SlabCache:
    """See the module's text. Used by one thread only.

    :param limit_bytes: hard limit; rounded down to whole slabs, at least four.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_slabs = max(4, limit_bytes // SLAB_BYTES)
        self._map = mmap.mmap(
            -1,
            self.limit_slabs * SLAB_BYTES,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE,
        )
        with contextlib.suppress(OSError):  # a kernel without huge pages
            # One would back two slabs, and be freed only when both are free and memory is short.
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.pages: Pages = np.frombuffer(self._map, np.uint8).reshape(-1, PAGE_SIZE)
        self._free: list[int] = []  # backed, last used first: its lines may still be in the CPU's
        self._bare = list(range(self.limit_slabs - 1, -1, -1))
        self._peak_need = 0.0
        self.peak_slabs = 0

    @property
    def backed_slabs(self) -> int:
        """Slabs whose memory is really there."""
        return self.limit_slabs - len(self._bare)

    @property
    def used_slabs(self) -> int:
        """Slabs that hold pages."""
        return self.backed_slabs - len(self._free)

    @property
    def free_slabs(self) -> int:
        """Backed slabs that hold nothing."""
        return len(self._free)

    @property
    def available_slabs(self) -> int:
        """Slabs that could still be used, backed or not."""
        return len(self._free) + len(self._bare)

    @property
    def target_slabs(self) -> int:
        """The size that recent checkpoints ask for."""
        wanted = int(self._peak_need * HEADROOM) + SPARE_SLABS
        return min(self.limit_slabs, wanted)

    def take(self) -> int | None:
        """A backed slab, or None. Neither allocates nor faults."""
        return self._free.pop() if self._free else None

    def grow(self, slabs: int) -> int:
        """Back up to ``slabs`` more slabs. Not to be called in a pause.

        :returns: how many there are more; fewer at the limit or when the host has no memory.
        """
        grown = 0
        while grown < slabs and self._bare:
            slab = self._bare[-1]
            try:
                self._map.madvise(MADV_POPULATE_WRITE, slab * SLAB_BYTES, SLAB_BYTES)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOMEM, errno.EFAULT):
                    raise
                if error.errno != errno.EINVAL:
                    break
                self.pages[slab * SLAB_PAGES : (slab + 1) * SLAB_PAGES, 0] = 0  # before Linux 5.14
            self._free.append(self._bare.pop())
            grown += 1
        self.peak_slabs = max(self.peak_slabs, self.backed_slabs)
        return grown

    def give_back(self, slabs: Iterable[int]) -> None:
        """Return slabs that were taken."""
        self._free.extend(slabs)

    def adapt(self, needed_slabs: int) -> None:
        """Follow the state: one round needed this many slabs (its own and those in flight)."""
        self._peak_need = max(float(needed_slabs), self._peak_need * DECAY)
        target = self.target_slabs
        if target > self.backed_slabs:
            self.grow(target - self.backed_slabs)
        while self._free and self.backed_slabs > target:
            slab = self._free.pop(0)
            self._map.madvise(mmap.MADV_DONTNEED, slab * SLAB_BYTES, SLAB_BYTES)
            self._bare.append(slab)

    def close(self) -> None:
        """Free everything."""
        self.pages = np.zeros((0, PAGE_SIZE), np.uint8)
        self._free, self._bare = [], []
        self.limit_slabs = 0
        try:
            self._map.close()
        except BufferError:
            return  # a sender still looks at it; it goes with the process
