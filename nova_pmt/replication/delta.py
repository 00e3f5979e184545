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

An idle guest rewrites the same thirty pages again and again, and nearly nothing in them. The
primary keeps what it sent of such pages; the standby has it in its image. Both ends of a delta are
checked by the checkpoint's checksum, which covers whole pages and the whole device state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages

WORD_BYTES = 8
PAGE_WORDS = PAGE_SIZE // WORD_BYTES
#: Pages that the primary keeps: 8 MiB.
BASE_PAGES = 2048
#: Bytes for each page (number, count) and for each word (value, place) of a delta.
PAGE_BYTES, CHANGE_BYTES = 8 + 2, 8 + 2
#: The same of a device state, whose places need more bits.
STATE_CHANGE_BYTES = 8 + 4
#: A delta is worth it up to this share of the whole.
WORTH = 0.5

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[Any]


class Base:
    """The primary's copies of pages as the standby's image will have them at the next commit."""

    def __init__(self, page_count: int) -> None:
        self._slot_of: npt.NDArray[np.int32] = np.full(page_count, -1, np.int32)
        self._pages: Pages = np.zeros((BASE_PAGES, PAGE_SIZE), np.uint8)
        self._used = 0

    def forget(self, numbers: PageNumbers) -> None:
        """These are sent whole, and not for the last time in their epoch, or not kept."""
        self._slot_of[numbers] = -1

    def known(self, numbers: PageNumbers) -> npt.NDArray[np.bool_]:
        """Which of these have a copy here."""
        return self._slot_of[numbers] >= 0

    def keep(self, numbers: PageNumbers, data: Pages) -> None:
        """These are sent for the last time in their epoch: what the next delta starts from."""
        slots = self._slot_of[numbers]
        fresh = slots < 0
        count = int(np.count_nonzero(fresh))
        if self._used + count > BASE_PAGES:
            self._slot_of[:] = -1  # anew: copies of pages that are not written any more go, too
            self._used = 0
            slots = np.full(len(numbers), -1, np.int32)
            fresh, count = slots < 0, len(numbers)
        slots[fresh] = np.arange(self._used, self._used + count, dtype=np.int32)
        self._used += count
        self._slot_of[numbers] = slots
        self._pages[slots] = data

    def encode(self, numbers: PageNumbers, data: Pages) -> bytes | None:
        """The changes of pages that are all known; None when whole pages are hardly more.

        Layout: numbers (int64), changed words (uint64) of one page after the other, changes of
        each page (uint16), place of each word in its page (uint16); all little endian.
        """
        old = self._pages[self._slot_of[numbers]].view(np.uint64)
        new = np.ascontiguousarray(data).view(np.uint64)
        changed = old != new
        places = np.flatnonzero(changed)
        size = len(numbers) * PAGE_BYTES + len(places) * CHANGE_BYTES
        if size > WORTH * data.nbytes:
            return None
        return b"".join(
            (
                numbers.astype("<i8", copy=False).tobytes(),
                new.reshape(-1)[places].astype("<u8", copy=False).tobytes(),
                changed.sum(axis=1).astype("<u2").tobytes(),
                (places % PAGE_WORDS).astype("<u2").tobytes(),
            )
        )


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
