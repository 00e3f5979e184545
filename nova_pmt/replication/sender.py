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

import numpy as np
import numpy.typing as npt

from nova_pmt import exception
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages
from nova_pmt.replication import delta
from nova_pmt.replication.delta import Base, Gate
from nova_pmt.replication.link import Buffers, Link
from nova_pmt.replication.protocol import (
    NUMBER_BYTES,
    STATE_IS_DELTA,
    Digest,
    Header,
    Type,
    disk_value,
    receipt_of,
)

#: A page that is sent whole.
PAGE_BYTES_SENT = NUMBER_BYTES + PAGE_SIZE


class _PagesFrame:
    def __init__(
        self,
        epoch: int,
        numbers: PageNumbers,
        data: Pages,
        sent: Callable[[], None] | None,
        digest: Digest,
        base: Base | None,
        gate: Gate,
    ) -> None:
        self._epoch, self._numbers, self._data = epoch, numbers, data
        self._sent, self._digest, self._base, self._gate = sent, digest, base, gate

    def begin(self) -> Buffers:
        numbers, data, base, gate = self._numbers, self._data, self._base, self._gate
        gate.begin(self._epoch)
        if base is None or self._sent is not None or not gate.keeps:
            # Sent ahead of the pause these may be sent again, and then the standby does not have
            # them in its image yet.
            if base is not None:
                base.forget(numbers)
            return self._whole(numbers, data)
        parts: Buffers = []
        if gate.tries:
            start = time.perf_counter()
            small, changes = self._changes(base)
            if len(changes):
                parts += self._delta(numbers[small], data[small], changes)
        else:
            small = np.zeros(len(numbers), np.bool_)
        if not small.any():
            parts += self._whole(numbers, data)
        elif not small.all():
            parts += self._whole(numbers[~small], np.ascontiguousarray(data[~small]))
        base.keep(numbers, data)
        if gate.tries:
            saved = int(np.count_nonzero(small)) * PAGE_BYTES_SENT - len(changes)
            gate.count(len(numbers), time.perf_counter() - start, saved)
        return parts

    def _changes(self, base: Base) -> tuple[npt.NDArray[np.bool_], bytes]:
        """Which pages hardly changed since they were sent last, and their changes."""
        small = base.known(self._numbers)
        if not small.any():
            return small, b""
        worth, changes = base.encode(self._numbers[small], self._data[small])
        small[small] = worth
        return small, changes

    def _whole(self, numbers: PageNumbers, data: Pages) -> Buffers:
        places, contents = numbers.astype("<i8", copy=False).tobytes(), data.data.cast("B")
        self._digest.add_pages(places, contents, len(numbers))
        header = Header(Type.PAGES, len(places) + len(contents), self._epoch, len(numbers))
        return [memoryview(header.pack() + places), contents]

    def _delta(self, numbers: PageNumbers, data: Pages, changes: bytes) -> Buffers:
        places = numbers.astype("<i8", copy=False).tobytes()
        self._digest.add_pages(places, data.data.cast("B"), len(numbers))
        header = Header(Type.DELTA, len(changes), self._epoch, len(numbers))
        return [memoryview(header.pack() + changes)]

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
        digest: Digest,
    ) -> None:
        self._kind, self._epoch, self._value = kind, epoch, value
        self._data, self._sent, self._digest = data, sent, digest

    def begin(self) -> Buffers:
        self._digest.add_disk(self._value, self._data)
        header = Header(self._kind, len(self._data), self._epoch, self._value)
        return [memoryview(header.pack()), self._data]

    def sent(self) -> None:
        if self._sent is not None:
            self._sent()


class _CommitFrame:
    def __init__(
        self, epoch: int, before: bytes, state: bytes, digest: Digest, sums: dict[int, int]
    ) -> None:
        self._epoch, self._before, self._state, self._digest = epoch, before, state, digest
        self._sums = sums

    def begin(self) -> Buffers:
        pages = self._digest.pages
        digest = self._digest.finish(self._state)
        self._sums[self._epoch] = receipt_of(digest)
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
    """

    def __init__(self, link: Link, page_count: int, delta_pages: int = 0) -> None:
        self._link = link
        self._digest = Digest()
        self._base = Base(page_count, delta_pages) if delta_pages else None
        self._gate = Gate()
        self._state = b""
        #: Receipts that are due; the I/O thread's.
        self._sums: dict[int, int] = {}
        self.hold = link.hold
        self.go_on = link.go_on

    def send_pages(
        self, epoch: int, numbers: PageNumbers, data: Pages, sent: Callable[[], None] | None
    ) -> None:
        """See the interface."""
        if len(numbers):
            self._link.send(self._frame(epoch, numbers, data, sent))
        elif sent is not None:
            sent()

    def _frame(
        self, epoch: int, numbers: PageNumbers, data: Pages, sent: Callable[[], None] | None
    ) -> _PagesFrame:
        return _PagesFrame(epoch, numbers, data, sent, self._digest, self._base, self._gate)

    @property
    def delta_bytes(self) -> int:
        """Memory that copies of pages take. Any thread."""
        return self._base.kept_pages * PAGE_SIZE if self._base is not None else 0

    def send_log(
        self, epoch: int, disk: int, part: memoryview, sent: Callable[[], None] | None
    ) -> None:
        """See the interface."""
        self._link.send(_DiskFrame(Type.LOG, epoch, disk_value(disk), part, sent, self._digest))

    def send_block(
        self, disk: int, offset: int, data: memoryview, sent: Callable[[], None] | None
    ) -> None:
        """See the interface."""
        value = disk_value(disk, offset)
        self._link.send(_DiskFrame(Type.BLOCK, 1, value, data, sent, self._digest))

    def send_commit(self, epoch: int, device_state: bytes) -> None:
        """See the interface."""
        self._link.send(_CommitFrame(epoch, self._state, device_state, self._digest, self._sums))
        self._state = device_state

    def received(self, epoch: int, receipt: int) -> None:
        """A standby says that it has checkpoint ``epoch`` whole. I/O thread.

        :param receipt: what it found, of the checksum.
        :raises nova_pmt.exception.PeerError: it has something else, or cannot have it yet.
        """
        due = self._sums.pop(epoch, None)
        if due is None:
            raise exception.PeerError(
                f"standby committed checkpoint {epoch}, which it was not sent, or twice"
            )
        if receipt != due:
            raise exception.PeerError(
                f"standby committed checkpoint {epoch} with another checksum than it was sent"
            )
