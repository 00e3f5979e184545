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

"""A whole pair in one thread: guest, algorithm, sender, wire, receiver, image."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from nova_pmt.checkpoint import cache as slab_cache
from nova_pmt.checkpoint import epoch, round
from nova_pmt.checkpoint.cache import SlabCache
from nova_pmt.checkpoint.interfaces import PAGE_SIZE
from nova_pmt.checkpoint.round import Checkpointer
from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.codecs.base import Codec
from nova_pmt.replication import packing, receiver
from nova_pmt.replication.delta import Gate
from nova_pmt.replication.sender import Sender
from nova_pmt.replication.speed import Speed
from tests.unit.fakes.disk import SECTOR, FakeDisk
from tests.unit.fakes.guest import (
    FakeExecution,
    FakeMemory,
    FakeOutput,
    Faults,
    Guest,
    pause_of,
)
from tests.unit.fakes.standby import FakeLink, FakeStandby, two_blocks

#: Bytes of blocks and logs under way; entries are larger, and so is a disk.
DISK_WINDOW = 6000
#: Bytes of a block of the first copy: no number of pages.
BLOCK = 5 * SECTOR
#: Steps without any event after which a wait is taken for one without an end.
PATIENCE = 5000


@contextlib.contextmanager
def small_slabs(pages: int = 16) -> Iterator[None]:
    """Slabs and goals of a few pages, so that a small guest comes to every limit often."""
    sizes = {"SLAB_PAGES": pages}
    with contextlib.ExitStack() as stack:
        for module, names in (
            (slab_cache, {**sizes, "SLAB_BYTES": pages * PAGE_SIZE}),
            (epoch, {**sizes, "SCRATCH_PAGES": pages // 2}),
            (round, {**sizes, "SYNC_WINDOW_SLABS": 3, "SYNC_GOAL_PAGES": pages}),
            (round, {"DISK_WINDOW_BYTES": DISK_WINDOW}),
            (receiver, sizes),
        ):
            stack.enter_context(mock.patch.multiple(module, **names))
        yield


class PacedCheckpointer(Checkpointer):
    """Waits by letting the rest of the world go on, rather than by the clock."""

    world: World

    def pump(self, timeout_s: float = 0.0) -> None:
        if timeout_s > 0:
            self.world.wait(timeout_s)
        super().pump(0.0)


class World:
    """See the module's text.

    :param chaos: probability that somebody does something at a step of the guest's readers.
    :param disk_sectors: sizes of the guest's disks.
    :param readonly: numbers of those that it does not write.
    """

    def __init__(
        self,
        page_count: int = 1600,
        side_pages: int = 100,
        *,
        cache_slabs: int = 4,
        staging_slabs: int = 256,
        seed: int = 0,
        chaos: float = 0.0,
        late_commits: bool = False,
        disk_sectors: tuple[int, ...] = (24, 60),
        readonly: tuple[int, ...] = (),
    ) -> None:
        self.rng = random.Random(seed)
        self.chaos = chaos
        self.late_commits = late_commits
        self.faults = Faults()
        self.guest = Guest(page_count)
        self.memory = FakeMemory(self.guest, self.faults)
        self.execution = FakeExecution(self.guest, self.faults)
        self.output = FakeOutput(self.guest, self.faults)
        self.standby = FakeStandby(
            two_blocks(page_count, side_pages),
            staging_slabs * slab_cache.SLAB_BYTES,
            [sectors * SECTOR for sectors in disk_sectors],
            readonly,
        )
        self.link = FakeLink(self.standby.feed)
        self.disks = [
            FakeDisk(self.guest, sectors, self.faults, self._in_pause) for sectors in disk_sectors
        ]
        for disk in self.disks:
            disk.limit = 64 << 10  # what the first copy sends ahead of time comes often
            disk.write(0, len(disk.data) // SECTOR // 2)
        self.written = [disk for number, disk in enumerate(self.disks) if number not in readonly]
        self.guest.on_pause = self._on_pause
        self.sender = Sink(self.link, page_count, self.faults, self.rng)
        self.standby.receiver.codec = self.sender.codec_used
        self.cache = SlabCache(cache_slabs * slab_cache.SLAB_BYTES)
        self.records: list[RoundRecord] = []
        self.checkpointer = PacedCheckpointer(
            self.memory,
            self.execution,
            self.sender,
            self.cache,
            logs={n: disk for n, disk in enumerate(self.disks) if n not in readonly},
            on_round=self.records.append,
        )
        self.checkpointer.world = self
        self.checkpointer.arm((self.output,))
        self.told = self.discards = 0
        self.waited = 0
        self._checked = (0, 0, 0)
        if chaos:
            self.guest.meddle = self.meddle

    # -- others' turns ------------------------------------------------------------------

    def meddle(self) -> None:
        """Perhaps the guest writes; perhaps the wire goes on."""
        if self.rng.random() >= self.chaos:
            return
        if self.rng.random() < 0.5:
            self.progress()
        elif not self.guest.paused:
            self.write_some(self.rng.choice((1, 3, 40)))
            self.write_disks()

    def _on_pause(self, number: int) -> None:
        for disk in self.disks:
            disk.pause(number)

    def _in_pause(self) -> bool:
        """After a switchover's last pause nobody waits for the guest any more."""
        return self.link.held or self.execution.held

    def write_disks(self) -> None:
        """The guest writes to one of its disks, or none."""
        if self.rng.random() < 0.5:
            self.write_disk()

    def write_disk(self) -> None:
        """The guest writes or discards some sectors, anywhere."""
        if not self.written:
            return
        disk = self.rng.choice(self.written)
        sectors = len(disk.data) // SECTOR
        first = self.rng.randrange(sectors)
        count = self.rng.randint(1, min(20, sectors - first))
        discard = self.rng.random() < 0.2
        self.discards += discard
        disk.write(first, count, discard=discard)

    def blocks(self) -> Iterator[tuple[int, int, memoryview]]:
        """The disks, block by block, while the guest writes on them."""
        for number, disk in enumerate(self.disks):
            for at in range(0, len(disk.data), BLOCK):
                self.meddle_with_disks()
                head = bytes(disk.data[at : at + BLOCK // 2])
                self.meddle_with_disks()  # a block can be torn
                yield number, at, memoryview(head + disk.data[at + BLOCK // 2 : at + BLOCK])

    def meddle_with_disks(self) -> None:
        """As :meth:`meddle`, but there are few blocks, so that it does more."""
        if not self.chaos:
            return
        if self.rng.random() < 0.4:
            self.write_disk()
        if self.rng.random() < 0.4:
            self.progress()

    @property
    def total_bytes(self) -> int:
        return sum(len(disk.data) for disk in self.disks)

    def write_some(self, count: int) -> None:
        """The guest writes pages that lie together, as guests do."""
        first = self.rng.randrange(self.guest.page_count)
        last = min(self.guest.page_count, first + count)
        self.guest.write(range(first, last), zeros=self.rng.random() < 0.1)

    def progress(self) -> bool:
        """One thing happens outside of the checkpointer's thread; False when nothing can."""
        actions = [self.link.step, lambda: self.link.settle(self.rng)]
        if not self.late_commits:
            actions.append(self.tell_commit)
        self.rng.shuffle(actions)
        return any(action() for action in actions)

    def tell_commit(self) -> bool:
        """One COMMITTED frame reaches the primary."""
        if self.told >= len(self.standby.acknowledged):
            return False
        epoch = self.standby.acknowledged[self.told]
        self.told += 1
        self.checkpointer.post(lambda: self.checkpointer.commit(epoch))
        return True

    def wait(self, _timeout_s: float) -> None:
        """The checkpointer waits: let something happen."""
        if self.progress() or self.tell_commit():
            self.waited = 0
            return
        self.waited += 1
        assert self.waited < PATIENCE, "the checkpointer waits for what will never happen"

    def settle(self) -> None:
        """Let everything happen that is under way."""
        while self.progress() or self.tell_commit():
            self.checkpointer.pump()
        self.checkpointer.pump()

    # -- rounds -------------------------------------------------------------------------

    def copy_disks(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Logs on, then the first copy of the disks: what comes before memory's."""
        for disk in self.written:
            disk.logging = True
        self.checkpointer.copy_disks(self, progress=progress)

    def synchronise(self, progress: Callable[[int, int], None] | None = None) -> None:
        """First synchronisation and the commit of checkpoint 1."""
        self.copy_disks()
        self.checkpointer.synchronise(progress)
        self.round()
        self.settle()
        assert self.checkpointer.committed == 1

    def round(self, passes: int = 2) -> int:
        """One round as the loop does it; returns the pause's number."""
        for _ in range(passes):
            self.checkpointer.copy_pass()
        self.checkpointer.prepare()
        while (checkpoint := self.checkpointer.capture()) is None:
            self.checkpointer.drain()
            self.checkpointer.prepare()
        self.checkpointer.transfer(checkpoint)
        return self.execution.pauses

    def check(self) -> None:
        """What must hold at any time."""
        standby, committed = self.standby, self.standby.receiver.committed
        assert standby.acknowledged == list(range(1, committed + 1))
        assert self.output.released == list(range(1, self.checkpointer.committed + 1))
        assert self.checkpointer.committed <= committed
        assert not self.guest.paused and not self.link.held
        assert self.cache.backed_slabs <= self.cache.limit_slabs
        taken = list(range(self.checkpointer.committed + 1, self.checkpointer.epoch))
        assert all(list(disk.waiting) == taken for disk in self.written)
        self.check_image()

    def check_image(self) -> None:
        """The image and the device state are of one and the same pause."""
        receiver, image, images = self.standby.receiver, self.standby.image, self.standby.images
        now = (receiver.committed, image.writes, images.writes)
        if not receiver.committed or self._checked == now:
            return
        self._checked = now
        pause = pause_of(receiver.device_state)
        snapshots = self.execution.snapshots
        assert np.array_equal(image.contents(), snapshots[pause])
        for number, disk in enumerate(self.disks):
            same = images.data[number] == disk.snapshots[pause]
            assert same, f"disk {number} is not what it was at pause {pause}"
            for old in [number for number in disk.snapshots if number < pause]:
                del disk.snapshots[old]
        for old in [number for number in snapshots if number < pause]:
            del snapshots[old]


class FickleGate(Gate):
    """Changes its mind all the time, which must not matter."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    @property
    def tries(self) -> bool:
        return self._rng.random() < 0.5

    @property
    def keeps(self) -> bool:
        return self._rng.random() < 0.7


class _Moody(Codec):
    """A codec some of whose levels compress nothing."""

    levels = (0, 1, 2)

    def __init__(self, codec: Codec | None, rng: random.Random) -> None:
        assert codec is not None
        self._codec, self._rng = codec, rng

    def compress(self, data: memoryview, level: int) -> bytes:
        packed = self._codec.compress(data, self._codec.levels[0])
        return packed if self._rng.random() < 0.8 else packed + bytes(len(data))

    def decompress(self, packed: memoryview, out: memoryview) -> None:
        raise AssertionError("of the standby")


class Sink(Sender):
    """The real sender, which also sees that nothing is sent twice that need not be."""

    def __init__(self, link: FakeLink, page_count: int, faults: Faults, rng: random.Random) -> None:
        # Deltas of none, of pages that push each other out, and of all.
        pages = rng.choice((0, 1, page_count // 3 + 1, page_count))
        codec = rng.choice((None, packing.first_of(["zstd"]), packing.first_of(["lz4"])))
        super().__init__(link, page_count, pages, codec)  # type: ignore[arg-type]
        self.codec_used = codec[1] if codec is not None else None
        if self._means.packer is not None:
            slow = Speed()
            slow.s_per_byte = 1e-7
            # A network on which it may pay; and levels that are as good as any other.
            self._means.packer = packing.Packer("", _Moody(self.codec_used, rng), slow)
        if rng.random() < 0.5:
            self._means.gate = FickleGate(rng)
        self._faults = faults
        self._hold, self._go_on = link.hold, link.go_on
        self.hold, self.go_on = self._held, self._released
        self.numbers: dict[int, list[np.ndarray]] = {}
        self.commits: list[int] = []
        self.spilled = 0

    def _held(self) -> None:
        self._faults.enter("hold")
        self._hold()
        self._faults.leave()

    def _released(self) -> None:
        self._faults.enter("go_on")
        self._go_on()
        self._faults.leave()

    def send_pages(self, epoch, numbers, data, sent) -> None:  # type: ignore[no-untyped-def]
        self._faults.enter("send_pages")
        assert data.flags.c_contiguous and len(data) == len(numbers) <= 256
        assert epoch not in self.commits, "pages after their commit"
        if sent is None:
            before = self.numbers.setdefault(epoch, [])
            before.append(numbers.copy())
            together = np.concatenate(before)
            assert len(np.unique(together)) == len(together), "a page is sent twice"
        else:
            assert len(np.unique(numbers)) == len(numbers)
            self.spilled += 1
        super().send_pages(epoch, numbers, data, sent)
        self._faults.leave()

    def send_log(self, epoch, disk, part, sent) -> None:  # type: ignore[no-untyped-def]
        self._faults.enter("send_log")
        assert epoch not in self.commits, "a log after its commit"
        super().send_log(epoch, disk, part, sent)
        self._faults.leave()

    def send_block(self, disk, offset, data, sent) -> None:  # type: ignore[no-untyped-def]
        self._faults.enter("send_block")
        assert not self.commits, "a first copy after the first commit"
        super().send_block(disk, offset, data, sent)
        self._faults.leave()

    def send_commit(self, epoch: int, device_state: bytes) -> None:
        self._faults.enter("send_commit")
        assert self.commits == list(range(1, epoch)), "commits go out in order"
        self.commits.append(epoch)
        super().send_commit(epoch, device_state)
        self._faults.leave()
