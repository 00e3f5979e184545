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

"""The standby's end: stages checkpoints in memory and commits them whole, or not at all.

A checkpoint touches the image only after every page of it is here and its checksum is right.
Checkpoint 1 is the exception that is none: it goes straight into the image, which no
commit has made valid yet; a standby whose checkpoint 1 fails is thrown away with its image.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from nova_pmt import exception, faultpoint
from nova_pmt.checkpoint.cache import SLAB_PAGES, SlabCache
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages
from nova_pmt.checkpoint.statistics import RING, percentiles
from nova_pmt.codecs.base import Codec
from nova_pmt.replication import delta, packing
from nova_pmt.replication.link import Buffers
from nova_pmt.replication.protocol import (
    DIGEST_BYTES,
    DISK_BYTES,
    MAX_PAGES,
    NUMBER_BYTES,
    PACKED,
    STATE_IS_DELTA,
    Digest,
    Header,
    Type,
    disk_of,
    receipt_of,
)

assert MAX_PAGES <= SLAB_PAGES  # a PAGES frame fits into one slab
#: So much is applied before the primary hears of us again: some milliseconds' worth.
BREATHE_SLABS = 16
#: Frames that make up a checkpoint, but for the last one.
PARTS = frozenset({Type.PAGES, Type.ZEROS, Type.DELTA, Type.BLOCK, Type.LOG})


class Image(Protocol):
    """What committed checkpoints are written to."""

    page_count: int

    def write(self, numbers: PageNumbers, data: Pages) -> None:
        """Put pages in place."""

    def read(self, numbers: PageNumbers, out: Pages) -> None:
        """Copy pages, as the last commit left them, into ``out``."""


class Disks(Protocol):
    """What committed write logs are applied to."""

    count: int

    def copy(self, disk: int, offset: int, data: memoryview) -> None:
        """Write a block of the first copy."""

    def stage(self, disk: int, part: memoryview) -> None:
        """Take a part of a write log in, and check it; writes nothing."""

    def whole(self) -> bool:
        """Whether every log that was taken in ends with a whole entry."""

    def apply(self) -> None:
        """Write what was taken in, in order."""

    def discard(self) -> None:
        """Forget what was taken in."""

    def summary(self) -> dict[str, object]:
        """For the status."""


class Receiver:
    """Stages, verifies, commits, applies.

    Implements :class:`nova_pmt.replication.link.FrameHandler` for :data:`PARTS`, and takes COMMIT
    frames; the standby hands it those.

    :param staging: where checkpoints wait.
    :param acknowledge: called with the epoch when it is whole and verified; before it is applied.
    :param check_state: raises when a device state is not one.
    :param breathe: called again and again while a large checkpoint is applied, so that the primary
        hears of us.

    :ivar codec: what compressed frames are compressed with; agreed on in the handshake.
    """

    def __init__(
        self,
        image: Image,
        disks: Disks,
        staging: SlabCache,
        acknowledge: Callable[[int, int], None],
        check_state: Callable[[bytes], None],
        breathe: Callable[[], None] = lambda: None,
    ) -> None:
        self._image = image
        self._breathe = breathe
        self._disks = disks
        self._staging = staging
        self._acknowledge = acknowledge
        self._check_state = check_state
        self.codec: Codec | None = None
        self._numbers: PageNumbers = np.zeros((staging.limit_slabs, SLAB_PAGES), np.int64)
        self._staged: list[tuple[int, int]] = []  # slab, pages
        self._filling = -1
        self._digest = Digest()
        self.committed = 0
        self.device_state = b""
        self._apply_ms = np.zeros(RING, np.float64)
        self._applied = 0

    def buffers(self, header: Header) -> Buffers:
        """Where a frame's payload goes: pages into a slab of their own.

        :raises nova_pmt.exception.CheckpointCorrupt: not the epoch that is due.
        """
        if header.epoch != self.committed + 1:
            raise exception.CheckpointCorrupt(
                f"{header.type.name} of checkpoint {header.epoch}, but {self.committed + 1} is due"
            )
        if header.type is not Type.PAGES:
            return [memoryview(bytearray(header.length))]
        slab = self._filling = self._staging_slab()
        first = slab * SLAB_PAGES
        numbers = self._numbers[slab, : header.value].data.cast("B")
        assert len(numbers) == header.value * NUMBER_BYTES
        if header.flags & PACKED:
            return [numbers, memoryview(bytearray(header.length - len(numbers)))]
        return [numbers, self._staging.pages[first : first + header.value].data.cast("B")]

    def _staging_slab(self) -> int:
        slab = self._take_slab()
        if slab is None:
            raise exception.PeerError(
                "the standby has no memory left to stage this checkpoint",
                code="STAGING_FULL",
                cure="Give the standby host more free memory; the pair is made anew by itself.",
            )
        return slab

    def _take_slab(self) -> int | None:
        slab = self._staging.take()
        if slab is None and not self._staging.grow(4) and self._staged:
            # Pages that were sent again fill it: keep the newest copy of each.
            self._compact()
        return self._staging.take() if slab is None else slab

    def _compact(self) -> None:
        """Drop staged copies that newer ones replace; moves the others together."""
        slots = np.concatenate(
            [np.arange(slab * SLAB_PAGES, slab * SLAB_PAGES + n) for slab, n in self._staged]
        )
        numbers = self._numbers.reshape(-1)[slots]
        _, newest = np.unique(numbers[::-1], return_index=True)
        keep = slots[np.sort(len(slots) - 1 - newest)]
        slabs = [slab for slab, _ in self._staged]
        self._staged.clear()
        flat = self._numbers.reshape(-1)
        for at in range(0, len(keep), SLAB_PAGES):
            part = keep[at : at + SLAB_PAGES]
            slab = slabs[at // SLAB_PAGES]
            first = slab * SLAB_PAGES
            # The sources lie in this slab or behind it, so nothing is overwritten that is needed.
            self._staging.pages[first : first + len(part)] = self._staging.pages[part]
            flat[first : first + len(part)] = flat[part]
            self._staged.append((slab, len(part)))
        self._staging.give_back(slabs[len(self._staged) :])

    def frame(self, header: Header, payload: Buffers) -> None:
        """A part of a checkpoint is complete.

        :raises nova_pmt.exception.CheckpointCorrupt: it is not what its type says, or names pages
            or a disk that there are not.
        :raises nova_pmt.exception.PeerError: it comes when it must not, or a disk's image cannot
            be written.
        """
        if header.type is Type.PAGES:
            self._pages(header, payload)
            return
        data = payload[0]
        if header.flags & PACKED:
            data = packing.unpack_whole(self.codec, header, data)
        if header.type is Type.ZEROS:
            self._zeros(header, data)
        elif header.type is Type.DELTA:
            self._delta(header, data)
        else:
            self._disk(header, data)

    def _pages(self, header: Header, payload: Buffers) -> None:
        slab = self._filling
        self._check_numbers(header, self._numbers[slab, : header.value])
        first = slab * SLAB_PAGES
        contents = self._staging.pages[first : first + header.value].data.cast("B")
        if header.flags & PACKED:
            packing.unpack(self.codec, header, payload[1], contents)
        self._filling = -1
        self._digest.add_pages(payload[0], contents, header.value)
        self._staged.append((slab, header.value))
        faultpoint.reach("standby.staging")
        if not self.committed:
            self._apply()

    def _check_numbers(self, header: Header, numbers: PageNumbers) -> None:
        if int(numbers.min()) < 0 or int(numbers.max()) >= self._image.page_count:
            raise exception.CheckpointCorrupt(
                f"page number out of range in checkpoint {header.epoch}"
            )

    def _zeros(self, header: Header, payload: memoryview) -> None:
        numbers = np.frombuffer(payload, "<i8").astype(np.int64)
        self._check_numbers(header, numbers)
        self._room(numbers)[:] = 0
        self._digest.add_pages(payload, packing.ZEROS[: len(numbers) * PAGE_SIZE], len(numbers))
        if not self.committed:
            self._apply()

    def _room(self, numbers: PageNumbers) -> Pages:
        """Where the contents of these pages are staged.

        Of a slab that was sent in several frames the first is staged already, and leaves room for
        just the others.
        """
        slab, used = self._staged[-1] if self._staged else (-1, SLAB_PAGES)
        if (
            used + len(numbers) <= SLAB_PAGES
            # A slab is written at once: of a page that was sent before the newest copy must win.
            and not np.isin(numbers, self._numbers[slab, :used]).any()
        ):
            self._staged.pop()
        else:
            slab, used = self._staging_slab(), 0
        first, end = slab * SLAB_PAGES + used, used + len(numbers)
        self._numbers[slab, used:end] = numbers
        self._staged.append((slab, end))
        return self._staging.pages[first : first + len(numbers)]

    def _delta(self, header: Header, payload: memoryview) -> None:
        """Pages of the image, changed."""
        try:
            numbers, rows, places, words = delta.decode(payload, header.value)
        except ValueError as error:
            raise exception.CheckpointCorrupt(
                f"delta in checkpoint {header.epoch}: {error}"
            ) from error
        self._check_numbers(header, numbers)
        pages = self._room(numbers)
        self._image.read(numbers, pages)
        pages.view(np.uint64)[rows, places] = words
        self._digest.add_pages(
            numbers.astype("<i8", copy=False).tobytes(), pages.data.cast("B"), header.value
        )
        faultpoint.reach("standby.rebuilt")

    def _disk(self, header: Header, payload: memoryview) -> None:
        assert len(payload) <= DISK_BYTES
        disk, offset = disk_of(header.value)
        if disk >= self._disks.count:
            raise exception.CheckpointCorrupt(f"there is no disk {disk}")
        self._digest.add_disk(header.value, payload)
        if header.type is Type.BLOCK:
            if self.committed:
                raise exception.CheckpointCorrupt("a first copy of a disk that is in use")
            self._disks.copy(disk, offset, payload)
            return
        self._disks.stage(disk, payload)
        if not self.committed:
            self._disks.apply()

    def commit(self, header: Header, payload: bytes | memoryview) -> None:
        """A COMMIT frame is complete: verify, acknowledge, apply.

        :raises nova_pmt.exception.CheckpointCorrupt: the checkpoint is not whole; the
            image is as the last commit left it.
        """
        if header.epoch != self.committed + 1:
            raise exception.CheckpointCorrupt(
                f"commit of checkpoint {header.epoch}, but {self.committed + 1} is due"
            )
        state = self._state_of(header, memoryview(payload)[DIGEST_BYTES:])
        pages = self._digest.pages
        digest = self._digest.finish(state)
        if digest != bytes(payload[:DIGEST_BYTES]) or pages != header.value:
            raise exception.CheckpointCorrupt(
                f"checksum of checkpoint {header.epoch} is wrong ({pages} of {header.value} pages)"
            )
        try:
            self._check_state(state)
        except exception.VmstateError as error:
            raise exception.CheckpointCorrupt(
                f"device state of checkpoint {header.epoch}: {error.message}"
            ) from error
        if not self._disks.whole():
            raise exception.CheckpointCorrupt(
                f"a write log of checkpoint {header.epoch} ends in the middle of an entry"
            )
        faultpoint.reach("standby.verified")
        self.committed = header.epoch
        self.device_state = state
        lost: exception.PeerError | None = None
        try:
            self._acknowledge(header.epoch, receipt_of(digest))
        except exception.PeerError as error:
            # The primary may have died just now, and then this is what its standby goes on from:
            # committed is committed, and the image must have it.
            lost = error
        faultpoint.reach("standby.acknowledged")
        used = len(self._staged)
        start = time.perf_counter()
        self._apply()
        faultpoint.reach("standby.disks")
        self._disks.apply()
        self._apply_ms[self._applied % RING] = (time.perf_counter() - start) * 1e3
        self._applied += 1
        self._staging.adapt(used)
        if lost is not None:
            raise lost
        faultpoint.reach("standby.applied")

    def _state_of(self, header: Header, payload: memoryview) -> bytes:
        if not header.flags & STATE_IS_DELTA:
            return bytes(payload)
        try:
            return delta.decode_state(self.device_state, payload)
        except ValueError as error:
            raise exception.CheckpointCorrupt(
                f"device state of checkpoint {header.epoch}: {error}"
            ) from error

    def _apply(self) -> None:
        for number, (slab, count) in enumerate(self._staged, 1):
            first = slab * SLAB_PAGES
            self._image.write(
                self._numbers[slab, :count], self._staging.pages[first : first + count]
            )
            if number % BREATHE_SLABS == 0:
                self._breathe()
        self._staging.give_back(slab for slab, _ in self._staged)
        self._staged.clear()

    def discard(self) -> None:
        """Throw away what is staged of a checkpoint that was cut short."""
        if self._filling >= 0:
            self._staging.give_back((self._filling,))
            self._filling = -1
        self._staging.give_back(slab for slab, _ in self._staged)
        self._staged.clear()
        self._digest = Digest()
        self._disks.discard()

    def summary(self) -> dict[str, object]:
        """The part of a standby's status that comes from here."""
        applied = self._apply_ms[: min(self._applied, RING)]
        return {
            "committed": self.committed,
            "apply_ms": percentiles(applied),
            "staging_mib": self._staging.backed_slabs * SLAB_PAGES * 4096 / (1 << 20),
            **self._disks.summary(),
        }
