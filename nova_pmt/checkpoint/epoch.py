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

"""The pages of one epoch in the cache: each page once, its newest copy.

A page that was copied in an earlier pass and written again is copied once more into
the *same* slot, so that nothing is sent twice and the cache holds no stale copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nova_pmt.checkpoint.cache import SLAB_PAGES, SlabCache
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, GuestMemory, PageNumbers, Pages

#: Pages that are copied again go through this buffer, since their slots are scattered.
SCRATCH_PAGES = 512


class PageTable:
    """Which slot holds which page, and the buffers that copying needs; made once for a guest."""

    def __init__(self, page_count: int) -> None:
        self.slot_of: npt.NDArray[np.int32] = np.full(page_count, -1, np.int32)
        self.scratch: Pages = np.zeros((SCRATCH_PAGES, PAGE_SIZE), np.uint8)


class EpochPages:
    """What epoch ``number`` has in the cache so far.

    :param numbers: (limit,) buffer that holds the page number of each slot of the cache.
    """

    def __init__(
        self,
        number: int,
        cache: SlabCache,
        table: PageTable,
        numbers: PageNumbers,
    ) -> None:
        self.number = number
        self.slabs: list[int] = []
        self.page_count = 0
        self._cache = cache
        self._table = table
        self._numbers = numbers
        self._room = 0  # free slots in the last slab

    def add(self, memory: GuestMemory, pages: PageNumbers) -> int:
        """Copy pages into the cache, as far as backed slabs reach.

        Allocates no cache memory: fit for a pause.

        :returns: how many of ``pages``, from the front, are in the cache now.
        """
        if not len(pages):
            return 0
        slot_of = self._table.slot_of
        slots = slot_of[pages]
        known = slots >= 0
        if known.any():
            return self._add_mixed(memory, pages, slots, known)
        return self._add_fresh(memory, pages)

    def _add_mixed(
        self,
        memory: GuestMemory,
        pages: PageNumbers,
        slots: npt.NDArray[np.int32],
        known: npt.NDArray[np.bool_],
    ) -> int:
        again, places = pages[known], slots[known]
        scratch = self._table.scratch
        for at in range(0, len(again), SCRATCH_PAGES):
            part = again[at : at + SCRATCH_PAGES]
            memory.copy(part, scratch[: len(part)])
            self._cache.pages[places[at : at + SCRATCH_PAGES]] = scratch[: len(part)]
        fresh = np.flatnonzero(~known)
        added = self._add_fresh(memory, pages[fresh])
        return len(pages) if added == len(fresh) else int(fresh[added])

    def _add_fresh(self, memory: GuestMemory, pages: PageNumbers) -> int:
        added, count = 0, len(pages)
        while added < count:
            if self._room == 0:
                slab = self._cache.take()
                if slab is None:
                    break
                self.slabs.append(slab)
                self._room = SLAB_PAGES
            slot = (self.slabs[-1] + 1) * SLAB_PAGES - self._room
            take = min(self._room, count - added)
            part = pages[added : added + take]
            memory.copy(part, self._cache.pages[slot : slot + take])
            self._numbers[slot : slot + take] = part
            self._table.slot_of[part] = np.arange(slot, slot + take, dtype=np.int32)
            self._room -= take
            added += take
        self.page_count += added
        return added

    def chunks(self) -> list[tuple[PageNumbers, Pages]]:
        """Page numbers and contents, slab by slab: views into the cache."""
        found = []
        for index, slab in enumerate(self.slabs):
            used = SLAB_PAGES - (self._room if index == len(self.slabs) - 1 else 0)
            first = slab * SLAB_PAGES
            found.append(
                (self._numbers[first : first + used], self._cache.pages[first : first + used])
            )
        return found

    def detach(self) -> list[int]:
        """End of the epoch: forget where its pages are. The slabs stay until given back.

        :returns: the slabs.
        """
        for numbers, _ in self.chunks():
            self._table.slot_of[numbers] = -1
        slabs, self.slabs, self._room = self.slabs, [], 0
        return slabs
