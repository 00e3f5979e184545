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

"""Disks in a checkpoint: written with it, or as they were before it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.checkpoint.cache import SLAB_BYTES
from nova_pmt.replication.protocol import DISK_BYTES, HEADER, Header, Type, disk_value
from nova_pmt.replication.sender import Sender
from tests.unit.fakes.disk import SECTOR, log_entry
from tests.unit.fakes.guest import device_state
from tests.unit.fakes.standby import FakeLink, FakeStandby, two_blocks

SIZES = [16 * SECTOR, 40 * SECTOR, 8 * SECTOR]
READONLY = 2


class Stream:
    """A checkpoint as the sender makes it, frame by frame."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.frames: list[bytearray] = []
        self._link = FakeLink(self._collect)
        self._sender = Sender(self._link, 1 << 16, 64)  # type: ignore[arg-type]

    def _collect(self, data: memoryview) -> None:
        self.frames[-1].extend(data)

    def _flush(self) -> None:
        self.frames.append(bytearray())
        self._link.step(1 << 30)
        while self._link._parts:
            self._link.step(1 << 30)

    def block(self, disk: int, sector: int, content: bytes) -> Stream:
        self._sender.send_block(disk, sector * SECTOR, memoryview(content), None)
        self._flush()
        return self

    def log(self, disk: int, *parts: bytes) -> Stream:
        for part in parts:
            self._sender.send_log(self.epoch, disk, memoryview(part), None)
            self._flush()
        return self

    def commit(self) -> Stream:
        self._sender.send_commit(self.epoch, device_state(self.epoch))
        self._flush()
        return self

    def header(self, number: int) -> Header:
        return Header.unpack(self.frames[number][: HEADER.size])

    def with_header(self, number: int, header: Header) -> Stream:
        self.frames[number][: HEADER.size] = header.pack()
        return self


def fill(letter: str, sectors: int) -> bytes:
    return letter.encode() * (sectors * SECTOR)


def feed(standby: FakeStandby, stream: Stream) -> None:
    for frame in stream.frames:
        standby.feed(frame)


def first() -> Stream:
    """Checkpoint 1: all disks."""
    stream = Stream(1)
    for disk, size in enumerate(SIZES):
        stream.block(disk, 0, fill("abc"[disk], size // SECTOR))
    return stream


def fresh() -> FakeStandby:
    return FakeStandby(two_blocks(50, 5), 4 * SLAB_BYTES, SIZES, [READONLY])


@pytest.fixture
def standby() -> Iterator[FakeStandby]:
    made = fresh()
    feed(made, first().commit())
    assert made.acknowledged == [1]
    yield made
    made.staging.close()


def refused(standby: FakeStandby, stream: Stream) -> exception.PeerError:
    """The error of a checkpoint that is not taken; the images are as they were."""
    before, writes = [bytes(data) for data in standby.images.data], standby.images.writes
    committed = standby.receiver.committed
    with pytest.raises(exception.PeerError) as caught:
        feed(standby, stream)
    standby.receiver.discard()
    if committed:
        assert standby.images.writes == writes
        assert [bytes(data) for data in standby.images.data] == before
    assert standby.receiver.committed == committed == len(standby.acknowledged)
    return caught.value


def corrupt(standby: FakeStandby, stream: Stream) -> str:
    error = refused(standby, stream)
    assert type(error) is exception.CheckpointCorrupt
    assert error.code == "CHECKPOINT_CORRUPT"
    return error.message


# -- what is whole ----------------------------------------------------------------------


def test_blocks_and_logs_of_checkpoint_one_are_written_as_they_come() -> None:
    """Nothing depends on the images before the first commit, and so any size fits."""
    standby = fresh()
    stream = first().log(1, log_entry(3, fill("x", 2))[:700], log_entry(3, fill("x", 2))[700:])
    stream.block(1, 4, fill("y", 1)).commit()
    for number, frame in enumerate(stream.frames[:-1]):
        writes = standby.images.writes
        standby.feed(frame)
        assert standby.images.writes == writes + (number != 3)  # of that the entry has no data yet
    standby.feed(stream.frames[-1])
    expected = bytearray(fill("b", 40))
    expected[3 * SECTOR : 6 * SECTOR] = fill("x", 1) + fill("y", 1) + fill("b", 1)
    assert standby.images.data == [fill("a", 16), expected, fill("c", 8)]
    assert standby.acknowledged == [1]


def test_a_log_is_written_behind_its_commit_and_its_answer(standby: FakeStandby) -> None:
    stream = Stream(2).log(0, log_entry(2, fill("n", 3)), log_entry(3, b"", count=1, flags=4))
    writes = standby.images.writes
    feed(standby, stream)
    assert standby.images.writes == writes
    seen: list[tuple[int, int]] = []
    standby.receiver._acknowledge = lambda epoch, _: seen.append((epoch, standby.images.writes))
    standby.feed(stream.commit().frames[-1])
    assert seen == [(2, writes)]
    assert standby.images.data[0][2 * SECTOR : 5 * SECTOR] == (
        fill("n", 1) + bytes(SECTOR) + fill("n", 1)
    )
    assert standby.images.data[1] == fill("b", 40)


def test_logs_of_several_disks_do_not_mix_though_their_parts_do(standby: FakeStandby) -> None:
    one, two = log_entry(0, fill("1", 4)), log_entry(0, fill("2", 4))
    feed(
        standby,
        Stream(2).log(0, one[:600]).log(1, two[:100]).log(0, one[600:]).log(1, two[100:]).commit(),
    )
    assert standby.images.data[0][: 4 * SECTOR] == fill("1", 4)
    assert standby.images.data[1][: 4 * SECTOR] == fill("2", 4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 15), st.integers(1, 6), st.booleans()),
        max_size=8,
    ),
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_logs_cut_anywhere_are_what_the_guest_wrote(
    writes: list[tuple[int, int, int, bool]], pieces: list[int], checkpoints: int
) -> None:
    standby = fresh()
    feed(standby, first().commit())
    expected = [bytearray(data) for data in standby.images.data]
    for at in range(checkpoints):
        logs = [b"", b""]
        for turn, (disk, sector, most, discard) in enumerate(writes[at::checkpoints]):
            count = min(most, 16 - sector)
            content = b"" if discard else bytes([1 + turn]) * (count * SECTOR)
            logs[disk] += log_entry(sector, content, count=count, flags=4 * discard)
            expected[disk][sector * SECTOR : (sector + count) * SECTOR] = content or bytes(
                count * SECTOR
            )
        stream = Stream(at + 2)
        for disk, log in enumerate(logs):
            start = 0
            while start < len(log):
                size = pieces[len(stream.frames) % len(pieces)]
                stream.log(disk, log[start : start + size])
                start += size
        feed(standby, stream.commit())
        assert standby.images.data == expected
    assert standby.acknowledged == list(range(1, checkpoints + 2))


def test_the_largest_frames_pass() -> None:
    size = 2 * DISK_BYTES
    standby = FakeStandby(two_blocks(50, 5), 4 * SLAB_BYTES, [size])
    sectors = DISK_BYTES // SECTOR
    stream = Stream(1).block(0, 0, fill("a", sectors)).block(0, sectors, fill("b", sectors))
    feed(standby, stream.commit())
    entry = log_entry(0, fill("n", sectors))
    feed(standby, Stream(2).log(0, entry[:DISK_BYTES], entry[DISK_BYTES:]).commit())
    assert standby.images.data[0] == fill("n", sectors) + fill("b", sectors)


def test_the_status_tells_of_disks(standby: FakeStandby) -> None:
    entry = log_entry(0, fill("n", 3))
    feed(standby, Stream(2).log(0, entry).commit())
    summary = standby.receiver.summary()
    assert (summary["disks"], summary["disk_bytes_applied"]) == (3, len(entry))


# -- what is not ------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_log_is_found(which: int, where: float, bit: int) -> None:
    standby = fresh()
    feed(standby, first().commit())
    one, two = log_entry(0, fill("1", 3)), log_entry(7, b"", count=2, flags=4)
    stream = Stream(2).log(0, one[:600], one[600:]).log(1, two).commit()
    damaged = stream.frames[which]
    damaged[HEADER.size + int(where * (len(damaged) - HEADER.size))] ^= 1 << bit
    corrupt(standby, stream)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_block_is_found(which: int, where: float, bit: int) -> None:
    """Too late for the image, which nothing depends on; but the checkpoint does not count."""
    standby = fresh()
    stream = Stream(1).block(0, 0, fill("a", 16)).block(1, 3, fill("b", 2)).commit()
    damaged = stream.frames[which]
    damaged[HEADER.size + int(where * (len(damaged) - HEADER.size))] ^= 1 << bit
    corrupt(standby, stream)


@pytest.mark.parametrize("value", [disk_value(1), disk_value(0, SECTOR), disk_value(1, SECTOR)])
def test_a_block_that_says_another_disk_or_offset_is_found(value: int) -> None:
    standby = fresh()
    stream = Stream(1).block(0, 0, fill("a", 2)).commit()
    header = stream.header(0)
    corrupt(standby, stream.with_header(0, Header(header.type, header.length, 1, value)))


def test_a_log_that_says_another_disk_is_found(standby: FakeStandby) -> None:
    stream = Stream(2).log(0, log_entry(0, fill("1", 3))).commit()
    header = stream.header(0)
    corrupt(standby, stream.with_header(0, Header(header.type, header.length, 2, disk_value(1))))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_log_frame_that_is_missing_is_noticed(standby: FakeStandby, missing: int) -> None:
    stream = Stream(2).log(0, log_entry(0, fill("1", 1)), log_entry(2, fill("2", 1))).commit()
    del stream.frames[missing]
    assert "checksum" in corrupt(standby, stream)


def test_log_frames_in_another_order_are_noticed(standby: FakeStandby) -> None:
    stream = Stream(2).log(0, log_entry(0, fill("1", 1)), log_entry(0, fill("2", 1))).commit()
    stream.frames[:2] = stream.frames[1::-1]
    assert "checksum" in corrupt(standby, stream)


@pytest.mark.parametrize("disk", [3, 127, 255])
@pytest.mark.parametrize("kind", [Type.BLOCK, Type.LOG])
def test_a_disk_that_there_is_not_is_refused(kind: Type, disk: int) -> None:
    standby = fresh()
    stream = Stream(1).block(0, 0, fill("a", 2))
    corrupt_header = Header(kind, 2 * SECTOR, 1, disk_value(disk))
    assert f"no disk {disk}" in corrupt(standby, stream.with_header(0, corrupt_header))
    assert standby.images.writes == 0


def test_without_disks_every_disk_is_one_too_many() -> None:
    standby = FakeStandby(two_blocks(50, 5), 4 * SLAB_BYTES)
    assert "no disk 0" in corrupt(standby, Stream(1).log(0, log_entry(0, fill("a", 1))))


@pytest.mark.parametrize(("epoch", "why"), [(1, "BLOCK of checkpoint 1, but 2"), (2, "in use")])
def test_a_block_of_a_disk_that_is_in_use_is_refused(
    standby: FakeStandby, epoch: int, why: str
) -> None:
    stream = Stream(1).block(0, 0, fill("z", 2))
    stream.with_header(0, Header(Type.BLOCK, stream.header(0).length, epoch, 0))
    assert why in corrupt(standby, stream)


@pytest.mark.parametrize("committed", [False, True])
def test_a_write_to_a_disk_that_is_only_read_is_refused(committed: bool) -> None:
    standby = fresh()
    if committed:
        feed(standby, first().commit())
    stream = Stream(1 + committed).log(READONLY, log_entry(0, fill("z", 1)))
    assert f"disk {READONLY} is read-only" in corrupt(standby, stream)
    assert b"z" not in standby.images.data[READONLY]


@pytest.mark.parametrize("keep", [1, 31, 32, 511, 512, 513, 3 * SECTOR, 4 * SECTOR - 1])
def test_a_log_that_is_cut_short_at_its_commit_is_refused(standby: FakeStandby, keep: int) -> None:
    """The checksum is right: it is the primary that cut where it must not."""
    stream = Stream(2).log(1, log_entry(0, fill("z", 1))).log(0, log_entry(0, fill("z", 3))[:keep])
    assert "ends in the middle of an entry" in corrupt(standby, stream.commit())


def test_a_log_that_is_cut_short_at_the_first_commit_is_refused() -> None:
    standby = fresh()
    stream = first().log(0, log_entry(0, fill("z", 3))[:1000]).commit()
    assert "ends in the middle" in corrupt(standby, stream)


@pytest.mark.parametrize(
    "entry",
    [
        log_entry(15, fill("z", 2)),  # beyond the end
        log_entry(2**63, b"", count=1, flags=4),
        log_entry(0, b"", count=2**63, flags=4),
        log_entry(0, fill("z", 1), flags=8),
        log_entry(0, fill("z", 1), flags=6),
        b"\xff" * SECTOR,
        b"S" * 4 + bytes(SECTOR - 4),
    ],
    ids=["end", "sector", "count", "mark", "flags", "garbage", "super block"],
)
def test_what_is_no_log_of_this_disk_is_refused_before_its_commit(
    standby: FakeStandby, entry: bytes
) -> None:
    message = corrupt(standby, Stream(2).log(0, log_entry(0, fill("y", 1)), entry))
    assert "write log of disk 0" in message


@pytest.mark.parametrize("epoch", [0, 1, 3, 2**63])
def test_a_log_of_another_epoch_is_refused(standby: FakeStandby, epoch: int) -> None:
    message = corrupt(standby, Stream(epoch).log(0, log_entry(0, fill("z", 1))))
    assert "2 is due" in message


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_cut_short_anywhere_leaves_the_images_alone(where: float) -> None:
    standby = fresh()
    feed(standby, first().commit())
    before, writes = [bytes(data) for data in standby.images.data], standby.images.writes
    one = log_entry(0, fill("1", 3))
    stream = b"".join(Stream(2).log(0, one[:900], one[900:]).log(1, one).commit().frames)
    standby.feed(stream[: int(where * len(stream))])
    standby.receiver.discard()
    assert standby.images.writes == writes
    assert [bytes(data) for data in standby.images.data] == before
    assert standby.acknowledged == [1]


def test_more_writes_than_there_is_room_for_are_told_with_their_cure(
    standby: FakeStandby, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nova_pmt.standby.journal.STAGING_BYTES", 5 * SECTOR)
    feed(standby, Stream(2).log(0, log_entry(0, fill("1", 3))).commit())
    feed(standby, Stream(3).log(0, log_entry(0, fill("1", 3))).commit())  # none of it waits
    entry = log_entry(0, fill("z", 2))
    error = refused(standby, Stream(4).log(0, entry).log(1, entry))
    assert error.code == "STAGING_FULL"
    assert "log_limit_mib" in error.cure
