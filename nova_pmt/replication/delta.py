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

"""What changed, in words of 8 bytes: for pages, and the device state, that hardly changed.

Most programs change a few words of a page and not all 4,096 bytes, and an idle guest rewrites the
same thirty pages again and again. The primary keeps what it sent of hot pages, in bounded memory;
the standby has it in its image. Both ends of a delta are checked by the checkpoint's checksum,
which covers whole pages and the whole device state.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages
from nova_pmt.codecs.choice import SENDING_S_PER_BYTE

WORD_BYTES = 8
PAGE_WORDS = PAGE_SIZE // WORD_BYTES
#: Bytes for each page (number, count) and for each word (value, place) of a delta.
PAGE_BYTES, CHANGE_BYTES = 8 + 2, 8 + 2
#: The same of a device state, whose places need more bits.
STATE_CHANGE_BYTES = 8 + 4
#: A delta is worth it up to this share of the whole.
WORTH = 0.5
#: So many pages say whether deltas pay.
JUDGED_PAGES = 1024
#: For how long nothing is tried after deltas did not pay.
FIRST_REST_S, LONGEST_REST_S = 0.5, 60.0
#: Copies are kept for so long before deltas are tried again.
WARM_S = 3.0

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[Any]


class Base:
    """The primary's copies of pages as the standby's image will have them at the next commit.

    A page has one place, by its number, which it shares with others: what is written more often
    stays longer, and nothing has to be searched.

    :param page_count: of the guest.
    :param limit_pages: most that is kept.
    """

    def __init__(self, page_count: int, limit_pages: int) -> None:
        self.limit_pages = max(1, min(page_count, limit_pages))
        self._owner: PageNumbers = np.full(self.limit_pages, -1, np.int64)
        self._backed: npt.NDArray[np.bool_] = np.zeros(self.limit_pages, np.bool_)
        # Backed by memory as pages come: page by page, and not by huge ones.
        memory = mmap.mmap(-1, self.limit_pages * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._pages: Pages = np.frombuffer(memory, np.uint8).reshape(-1, PAGE_SIZE)

    def forget(self, numbers: PageNumbers) -> None:
        """These are sent whole, and not for the last time in their epoch, or not kept."""
        places = numbers % self.limit_pages
        self._owner[places[self._owner[places] == numbers]] = -1

    def known(self, numbers: PageNumbers) -> npt.NDArray[np.bool_]:
        """Which of these have a copy here."""
        found: npt.NDArray[np.bool_] = self._owner[numbers % self.limit_pages] == numbers
        return found

    def keep(self, numbers: PageNumbers, data: Pages) -> None:
        """These are sent for the last time in their epoch: what the next delta starts from."""
        places = numbers % self.limit_pages
        self._owner[places] = numbers
        self._backed[places] = True
        kept = self._owner[places] == numbers  # of those that share a place, one
        if kept.all():
            self._pages[places] = data
        else:
            self._pages[places[kept]] = data[kept]

    @property
    def backed_pages(self) -> int:
        """For how many pages there is memory. Any thread."""
        return int(np.count_nonzero(self._backed))

    def encode(self, numbers: PageNumbers, data: Pages) -> tuple[npt.NDArray[np.bool_], bytes]:
        """The changes of pages that are all known.

        Layout: numbers (int64), changed words (uint64) of one page after the other, changes of
        each page (uint16), place of each word in its page (uint16); all little endian.

        :returns: which of the pages are worth a delta, and the delta of those.
        """
        new = np.ascontiguousarray(data).view(np.uint64)
        changed = self._pages[numbers % self.limit_pages].view(np.uint64) != new
        counts = np.count_nonzero(changed, axis=1)
        worth: npt.NDArray[np.bool_] = PAGE_BYTES + counts * CHANGE_BYTES <= WORTH * PAGE_SIZE
        if not worth.all():
            numbers, new, changed, counts = (
                numbers[worth],
                new[worth],
                changed[worth],
                counts[worth],
            )
        places = np.flatnonzero(changed)
        return worth, b"".join(
            (
                numbers.astype("<i8", copy=False).tobytes(),
                new.reshape(-1)[places].astype("<u8", copy=False).tobytes(),
                counts.astype("<u2").tobytes(),
                (places % PAGE_WORDS).astype("<u2").tobytes(),
            )
        )


class Gate:
    """Whether deltas of many pages are tried: not where they cost more time than they save.

    Judged by the pages of which there are copies. When it did not pay nothing is tried for a time
    that doubles from one trial to the next; copies are kept on, or, where it is long, from a while
    before its end.

    :param clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = self._rest_s = 0.0
        self._pages = 0
        self._spent_s = self._saved_s = 0.0

    @property
    def tries(self) -> bool:
        """Deltas are to be made."""
        return self._clock() >= self._until

    @property
    def keeps(self) -> bool:
        """Copies are to be kept."""
        return self._until - self._clock() <= WARM_S

    def count(self, pages: int, spent_s: float, saved_bytes: int, s_per_byte: float) -> None:
        """So many pages, of which there were copies, were tried.

        :param s_per_byte: what sending a byte takes.
        """
        self._pages += pages
        self._spent_s += spent_s
        self._saved_s += saved_bytes * max(s_per_byte, SENDING_S_PER_BYTE)
        if self._pages < JUDGED_PAGES:
            return
        if self._spent_s > self._saved_s:
            self._rest_s = min(max(FIRST_REST_S, 2 * self._rest_s), LONGEST_REST_S)
            self._until = self._clock() + self._rest_s
        else:
            self._rest_s = 0.0
        self._pages, self._spent_s, self._saved_s = 0, 0.0, 0.0


def decode(payload: memoryview, count: int) -> tuple[PageNumbers, Places, Places, Words]:
    """Take a delta of ``count`` pages apart.

    :returns: page numbers; for each change the row of its page, its place, and the new word.
    :raises ValueError: it is none.
    """
    changes, rest = divmod(len(payload) - count * PAGE_BYTES, CHANGE_BYTES)
    if changes < 0 or rest:
        raise ValueError(f"a delta of {count} pages cannot have {len(payload)} bytes")
    at = count * 8
    numbers = np.frombuffer(payload, "<i8", count).astype(np.int64)
    words = np.frombuffer(payload, "<u8", changes, at)
    at += changes * 8
    counts = np.frombuffer(payload, "<u2", count, at)
    places = np.frombuffer(payload, "<u2", changes, at + count * 2)
    if int(counts.sum()) != changes or (changes and int(places.max()) >= PAGE_WORDS):
        raise ValueError("a delta whose parts do not fit")
    rows = np.repeat(np.arange(count), counts)
    return numbers, rows, places, words


def _padded(state: bytes) -> Words:
    return np.frombuffer(state + bytes(-len(state) % WORD_BYTES), "<u8")


def encode_state(old: bytes, new: bytes) -> bytes | None:
    """The changes of a device state; None when it is to be sent whole.

    Layout: changed words (uint64), place of each (uint32).
    """
    if len(old) != len(new):
        return None
    before, after = _padded(old), _padded(new)
    places = np.flatnonzero(before != after)
    if len(places) * STATE_CHANGE_BYTES > WORTH * len(new):
        return None
    return after[places].tobytes() + places.astype("<u4").tobytes()


def decode_state(old: bytes, payload: memoryview) -> bytes:
    """The device state that a delta makes of the last one.

    :raises ValueError: it is none.
    """
    changes, rest = divmod(len(payload), STATE_CHANGE_BYTES)
    if rest:
        raise ValueError(f"a delta of a device state cannot have {len(payload)} bytes")
    words = _padded(old).copy()
    places = np.frombuffer(payload, "<u4", changes, changes * WORD_BYTES)
    if changes and int(places.max()) >= len(words):
        raise ValueError("a delta beyond the end of the device state")
    words[places] = np.frombuffer(payload, "<u8", changes)
    return bytes(words.tobytes()[: len(old)])
