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

"""The primary's end: turns checkpoints into frames.

Implements :class:`nova_pmt.checkpoint.interfaces.CheckpointSink` over a link. Checksums
are computed in the link's thread as frames begin, so the thread of the pauses has none of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nova_pmt import exception
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages
from nova_pmt.codecs.base import Codec
from nova_pmt.replication import delta
from nova_pmt.replication.delta import Base, Gate
from nova_pmt.replication.link import Buffers, Link
from nova_pmt.replication.packing import LENGTH, ZEROS, Packer, zero_pages
from nova_pmt.replication.protocol import (
    NUMBER_BYTES,
    PACKED,
    STATE_IS_DELTA,
    Digest,
    Header,
    Type,
    disk_value,
    receipt_of,
)
from nova_pmt.replication.speed import Mark, Speed

#: Deltas of so many pages are always tried: an idle guest's.
FEW_PAGES = 128
#: A page that is sent whole.
PAGE_BYTES_SENT = NUMBER_BYTES + PAGE_SIZE


@dataclass
class _Means:
    """What all frames of a sender are made with; the I/O thread's."""

    digest: Digest
    base: Base | None
    gate: Gate
    packer: Packer | None
    speed: Speed

    def packed(self, kind: Type, epoch: int, value: int, data: memoryview) -> Buffers:
        """A frame whose payload is compressed as a whole, if that pays."""
        packed = self.packer.pack(kind, data) if self.packer is not None else None
        if packed is None:
            return [memoryview(Header(kind, len(data), epoch, value).pack()), data]
        header = Header(kind, LENGTH.size + len(packed), epoch, value, PACKED)
        return [memoryview(header.pack() + LENGTH.pack(len(data))), memoryview(packed)]


class _PagesFrame:
    """PAGES, ZEROS and DELTA frames, in this order: pages that are sent whole, that are zero, and
    that hardly changed.
    """

    def __init__(
        self,
        epoch: int,
        numbers: PageNumbers,
        data: Pages,
        sent: Callable[[], None] | None,
        means: _Means,
    ) -> None:
        self._epoch, self._numbers, self._data = epoch, numbers, data
        self._sent, self._means = sent, means

    def begin(self) -> Buffers:
        numbers, data = self._numbers, self._data
        base, gate = self._means.base, self._means.gate
        if base is None:
            return self._whole(numbers, data)
        few = len(numbers) <= FEW_PAGES
        if self._sent is not None or not (few or gate.keeps):
            # Sent ahead of the pause these may be sent again, and then the standby does not have
            # them in its image yet.
            base.forget(numbers)
            return self._whole(numbers, data)
        parts: Buffers = []
        known = base.known(numbers) if few or gate.tries else np.zeros(len(numbers), np.bool_)
        if known.any():
            parts = self._with_changes(base, known, few)
        else:
            parts = self._whole(numbers, data)
        base.keep(numbers, data)
        return parts

    def _with_changes(self, base: Base, known: npt.NDArray[np.bool_], few: bool) -> Buffers:
        """Pages that hardly changed since they were sent last as deltas, the others whole."""
        start = time.perf_counter()
        all_known = bool(known.all())
        numbers = self._numbers if all_known else self._numbers[known]
        data = self._data if all_known else self._data[known]
        worth, changes = base.encode(numbers, data)
        count = int(np.count_nonzero(worth))
        spent = time.perf_counter() - start
        if not few:
            saved = count * PAGE_BYTES_SENT - len(changes)
            self._means.gate.count(len(numbers), spent, saved, self._means.speed.s_per_byte)
        parts: Buffers = []
        whole = ~known
        whole[known] = ~worth
        if whole.any():
            rest = self._data if whole.all() else np.ascontiguousarray(self._data[whole])
            parts += self._whole(self._numbers[whole], rest)
        if count:
            same = count == len(numbers)
            numbers, data = (numbers, data) if same else (numbers[worth], data[worth])
            parts += self._delta(numbers, data, changes)
        return parts

    def _whole(self, numbers: PageNumbers, data: Pages) -> Buffers:
        """Not as changes; those that are zero as their numbers, where the standby knows of that."""
        if self._means.packer is None:
            return self._full(numbers, data)
        zero = zero_pages(data)
        if not zero.any():
            return self._full(numbers, data)
        parts: Buffers = []
        if not zero.all():
            parts = self._full(numbers[~zero], np.ascontiguousarray(data[~zero]))
        numbers = numbers[zero]
        places = numbers.astype("<i8", copy=False).tobytes()
        self._means.digest.add_pages(places, ZEROS[: len(numbers) * PAGE_SIZE], len(numbers))
        header = Header(Type.ZEROS, len(places), self._epoch, len(numbers))
        return [*parts, memoryview(header.pack() + places)]

    def _full(self, numbers: PageNumbers, data: Pages) -> Buffers:
        places, contents = numbers.astype("<i8", copy=False).tobytes(), data.data.cast("B")
        self._means.digest.add_pages(places, contents, len(numbers))
        packer = self._means.packer
        packed = packer.pack(Type.PAGES, contents) if packer is not None else None
        flags = 0
        if packed is not None:
            contents, flags = memoryview(packed), PACKED
        length = len(places) + len(contents)
        header = Header(Type.PAGES, length, self._epoch, len(numbers), flags)
        return [memoryview(header.pack() + places), contents]

    def _delta(self, numbers: PageNumbers, data: Pages, changes: bytes) -> Buffers:
        places = numbers.astype("<i8", copy=False).tobytes()
        self._means.digest.add_pages(places, data.data.cast("B"), len(numbers))
        return self._means.packed(Type.DELTA, self._epoch, len(numbers), memoryview(changes))

    def sent(self) -> None:
        if self._sent is not None:
            self._sent()


class _DiskFrame:
    """A BLOCK or a LOG frame."""

    def __init__(
        self,
        kind: Type,
        epoch: int,
        value: int,
        data: memoryview,
        sent: Callable[[], None] | None,
        means: _Means,
    ) -> None:
        self._kind, self._epoch, self._value = kind, epoch, value
        self._data, self._sent, self._means = data, sent, means

    def begin(self) -> Buffers:
        self._means.digest.add_disk(self._value, self._data)
        return self._means.packed(self._kind, self._epoch, self._value, self._data)

    def sent(self) -> None:
        if self._sent is not None:
            self._sent()


@dataclass(frozen=True)
class _Due:
    """The answer to a commit that the standby owes."""

    receipt: int
    asked: tuple[Mark, int]


class _CommitFrame:
    def __init__(
        self,
        epoch: int,
        before: bytes,
        state: bytes,
        digest: Digest,
        due: dict[int, _Due],
        link: Link,
    ) -> None:
        self._epoch, self._before, self._state, self._digest = epoch, before, state, digest
        self._due, self._link = due, link

    def begin(self) -> Buffers:
        pages = self._digest.pages
        digest = self._digest.finish(self._state)
        asked = self._link.speed.asked(self._link.sent_bytes)
        self._due[self._epoch] = _Due(receipt_of(digest), asked)
        changes = delta.encode_state(self._before, self._state)
        state = self._state if changes is None else changes
        flags = 0 if changes is None else STATE_IS_DELTA
        header = Header(Type.COMMIT, len(digest) + len(state), self._epoch, pages, flags)
        return [memoryview(header.pack() + digest), memoryview(state)]

    def sent(self) -> None:
        """Nothing to do: the commit's answer counts, not its departure."""


class Sender:
    """See the module's text.

    :param page_count: of the guest.
    :param delta_pages: of how many pages copies are kept to send only what changes in them; 0:
        whole pages are sent.
    :param codec: name of the codec that the standby agreed to, and the codec; None: it knows of
        none, nor of zero pages.
    """

    def __init__(
        self,
        link: Link,
        page_count: int,
        delta_pages: int,
        codec: tuple[str, Codec] | None = None,
    ) -> None:
        self._link = link
        self._means = _Means(
            Digest(),
            Base(page_count, delta_pages) if delta_pages else None,
            Gate(),
            Packer(*codec, link.speed) if codec is not None else None,
            link.speed,
        )
        self._state = b""
        self._due: dict[int, _Due] = {}  # the I/O thread's
        self.hold = link.hold
        self.go_on = link.go_on

    def send_pages(
        self, epoch: int, numbers: PageNumbers, data: Pages, sent: Callable[[], None] | None
    ) -> None:
        """See the interface."""
        if len(numbers):
            self._link.send(_PagesFrame(epoch, numbers, data, sent, self._means))
        elif sent is not None:
            sent()

    @property
    def delta_bytes(self) -> int:
        """Memory that copies of pages take. Any thread."""
        base = self._means.base
        return base.backed_pages * PAGE_SIZE if base is not None else 0

    @property
    def codec(self) -> dict[str, Any] | None:
        """For the status: the codec and what it makes of pages; None: there is none. Any thread."""
        packer = self._means.packer
        return packer.summary() if packer is not None else None

    def send_log(
        self, epoch: int, disk: int, part: memoryview, sent: Callable[[], None] | None
    ) -> None:
        """See the interface."""
        self._link.send(_DiskFrame(Type.LOG, epoch, disk_value(disk), part, sent, self._means))

    def send_block(
        self, disk: int, offset: int, data: memoryview, sent: Callable[[], None] | None
    ) -> None:
        """See the interface."""
        value = disk_value(disk, offset)
        self._link.send(_DiskFrame(Type.BLOCK, 1, value, data, sent, self._means))

    def send_commit(self, epoch: int, device_state: bytes) -> None:
        """See the interface."""
        self._link.send(
            _CommitFrame(
                epoch, self._state, device_state, self._means.digest, self._due, self._link
            )
        )
        self._state = device_state

    def received(self, epoch: int, receipt: int) -> None:
        """A standby says that it has checkpoint ``epoch`` whole. I/O thread.

        :param receipt: what it found, of the checksum.
        :raises nova_pmt.exception.PeerError: it has something else, or cannot have it yet.
        """
        due = self._due.pop(epoch, None)
        if due is None:
            raise exception.PeerError(
                f"standby committed checkpoint {epoch}, which it was not sent, or twice"
            )
        if receipt != due.receipt:
            raise exception.PeerError(
                f"standby committed checkpoint {epoch} with another checksum than it was sent"
            )
        self._link.speed.answered(due.asked)
