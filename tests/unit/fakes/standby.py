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

"""A wire that takes its time and can break, and the standby at its other end."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from nova_pmt.checkpoint.cache import SlabCache
from nova_pmt.checkpoint.interfaces import PageNumbers, Pages
from nova_pmt.guest.layout import Layout, TrackedBlock
from nova_pmt.guest.vmstate import check_device_state
from nova_pmt.replication.link import Buffers, FrameReader, Outgoing
from nova_pmt.replication.protocol import HEADER, Header, Type
from nova_pmt.replication.receiver import PARTS, Receiver
from nova_pmt.replication.speed import Speed
from nova_pmt.standby.image import StandbyImage
from tests.unit.fakes.disk import journal


def two_blocks(page_count: int, side_pages: int) -> Layout:
    """Main memory, and video RAM that the standby keeps aside."""
    main = page_count - side_pages
    return Layout(
        (
            TrackedBlock("pc.ram", main * 4096, 0, 0, True),
            TrackedBlock("vga.vram", side_pages * 4096, 0, main, False),
        )
    )


class AsideImage(StandbyImage):
    """The real image, but main memory is a buffer of this process and not a file of QEMU's."""

    def __init__(self, layout: Layout) -> None:
        self.writes = 0
        super().__init__(layout, 0)

    def _main(self, block: TrackedBlock, pid: int) -> Pages:
        return self._aside(block)

    def write(self, numbers: PageNumbers, data: Pages) -> None:
        self.writes += 1
        super().write(numbers, data)

    def contents(self) -> Pages:
        """All pages in the order of their numbers."""
        parts = [np.frombuffer(data, np.uint8).reshape(-1, 4096) for data in self.side.values()]
        return np.concatenate(parts)


class FakeStandby:
    """Receiver and image behind a frame reader, as the standby worker has them."""

    def __init__(
        self,
        layout: Layout,
        staging_bytes: int,
        disks: Sequence[int] = (),
        readonly: Sequence[int] = (),
    ) -> None:
        self.image = AsideImage(layout)
        self.journal, self.images = journal(disks, readonly)
        self.staging = SlabCache(staging_bytes)
        self.acknowledged: list[int] = []
        self.receipts: list[int] = []
        self.images_at_acknowledge: list[int] = []
        self.receiver = Receiver(
            self.image, self.journal, self.staging, self._acknowledge, check_device_state
        )
        self.reader = FrameReader(self)
        self.frames: list[Header] = []
        self.commit_frames: list[bytes] = []

    def _acknowledge(self, epoch: int, receipt: int) -> None:
        self.acknowledged.append(epoch)
        self.receipts.append(receipt)
        self.images_at_acknowledge.append(self.image.writes)

    def buffers(self, header: Header) -> Buffers:
        if header.type in PARTS:
            return self.receiver.buffers(header)
        return [memoryview(bytearray(header.length))]

    def frame(self, header: Header, payload: Buffers) -> None:
        self.frames.append(header)
        if header.type in PARTS:
            self.receiver.frame(header, payload)
        elif header.type is Type.COMMIT:
            self.receiver.commit(header, payload[0])

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes from the wire."""
        view = memoryview(data)
        while view:
            space = self.reader.space()
            count = min(len(space), len(view))
            space[:count] = view[:count]
            self.reader.filled(count)
            view = view[count:]


class FakeLink:
    """What :class:`nova_pmt.replication.sender.Sender` needs of a link; a wire that one steps.

    Frames begin when their turn comes and their memory is read piece by piece, so that whoever
    changes it before ``sent`` corrupts the checkpoint, just as with the real link.
    """

    def __init__(self, feed: Callable[[memoryview], None]) -> None:
        self._feed = feed
        self._queue: deque[Outgoing] = deque()
        self._current: Outgoing | None = None
        self._parts: deque[memoryview] = deque()
        self._returns: list[Callable[[], None]] = []
        self.held = False
        self.broken = False
        self.speed = Speed()
        self.sent_bytes = 0
        self.flip: Callable[[Header, bytearray], None] | None = None
        self._flip_at = 0

    def send(self, frame: Outgoing, *, urgent: bool = False) -> None:
        if urgent:
            self._queue.appendleft(frame)
        else:
            self._queue.append(frame)

    def hold(self) -> None:
        self.held = True

    def go_on(self) -> None:
        self.held = False

    @property
    def idle(self) -> bool:
        return not (self._queue or self._parts or self._current or self._returns)

    def step(self, limit: int = 20_000) -> bool:
        """Let up to ``limit`` bytes through; False when there is nothing to do."""
        if self.held or self.broken:
            return False
        if not self._parts:
            if self._current is not None:
                self._returns.append(self._current.sent)
                self._current = None
            if not self._queue:
                return False
            self._current = self._queue.popleft()
            self._parts.extend(self._current.begin())
            if self.flip is not None:
                self._corrupt()
        part = self._parts.popleft()
        if len(part) > limit:
            self._parts.appendleft(part[limit:])
        self._feed(part[:limit])
        return True

    def _corrupt(self) -> None:
        """Have the test change the frame that begins."""
        whole = bytearray(b"".join(self._parts))
        header = Header.unpack(whole[: HEADER.size])
        assert self.flip is not None
        self.flip(header, whole)
        self._parts = deque((memoryview(whole),))

    def settle(self, rng: random.Random | None = None) -> bool:
        """Call one of the ``sent`` callbacks that are due, any of them."""
        if not self._returns:
            return False
        at = rng.randrange(len(self._returns)) if rng is not None else 0
        self._returns.pop(at)()
        return True
