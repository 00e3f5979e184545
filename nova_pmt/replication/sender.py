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

from collections.abc import Callable

from nova_pmt.checkpoint.interfaces import PageNumbers, Pages
from nova_pmt.replication.link import Buffers, Link
from nova_pmt.replication.protocol import Digest, Header, Type, disk_value


class _PagesFrame:
    def __init__(
        self,
        epoch: int,
        numbers: PageNumbers,
        data: Pages,
        sent: Callable[[], None] | None,
        digest: Digest,
    ) -> None:
        self._epoch, self._numbers, self._data = epoch, numbers, data
        self._sent, self._digest = sent, digest

    def begin(self) -> Buffers:
        numbers = self._numbers.astype("<i8", copy=False).tobytes()
        data = self._data.data.cast("B")
        count = len(self._numbers)
        self._digest.add_pages(numbers, data, count)
        header = Header(Type.PAGES, len(numbers) + len(data), self._epoch, count)
        return [memoryview(header.pack() + numbers), data]

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
    def __init__(self, epoch: int, state: bytes, digest: Digest) -> None:
        self._epoch, self._state, self._digest = epoch, state, digest

    def begin(self) -> Buffers:
        pages = self._digest.pages
        digest = self._digest.finish(self._state)
        header = Header(Type.COMMIT, len(digest) + len(self._state), self._epoch, pages)
        return [memoryview(header.pack() + digest), memoryview(self._state)]

    def sent(self) -> None:
        """Nothing to do: the commit's answer counts, not its departure."""


class Sender:
    """See the module's text."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._digest = Digest()
        self.hold = link.hold
        self.go_on = link.go_on

    def send_pages(
        self, epoch: int, numbers: PageNumbers, data: Pages, sent: Callable[[], None] | None
    ) -> None:
        """See the interface."""
        if len(numbers):
            self._link.send(_PagesFrame(epoch, numbers, data, sent, self._digest))
        elif sent is not None:
            sent()

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
        self._link.send(_CommitFrame(epoch, device_state, self._digest))
