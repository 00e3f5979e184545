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

"""What is known of a disk's changes after a break, and when it is void."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.guest.disk import bitmap, discover
from nova_pmt.guest.disk.bitmap import FROZEN, NAME, Note, coalesce
from tests.unit.fakes.blocks import DISKS, FakeBlocks

NODE = "libvirt-3-format"


@pytest.fixture
def qemu() -> FakeBlocks:
    return FakeBlocks()


@pytest.fixture
def disk(qemu: FakeBlocks) -> discover.GuestDisk:
    return discover.disks(DISKS, qemu)[0]


def test_a_kept_bitmap_records_until_it_is_dropped(
    qemu: FakeBlocks, disk: discover.GuestDisk
) -> None:
    assert not bitmap.has(disk, qemu)
    bitmap.keep(disk, qemu)
    assert bitmap.has(disk, qemu)
    bitmap.keep(disk, qemu)
    assert qemu.commands.count("block-dirty-bitmap-add") == 1
    assert qemu.bitmaps[NODE][NAME]["granularity"] == 65536
    bitmap.drop(disk, qemu)
    assert not bitmap.has(disk, qemu)
    bitmap.drop(disk, qemu)
    assert not any(qemu.bitmaps.values())


def test_a_bitmap_that_does_not_record_is_none(qemu: FakeBlocks, disk: discover.GuestDisk) -> None:
    bitmap.keep(disk, qemu)
    qemu.bitmaps[NODE][NAME]["recording"] = False
    assert not bitmap.has(disk, qemu)
    bitmap.keep(disk, qemu)
    assert bitmap.has(disk, qemu)


def test_a_snapshot_voids_the_bitmap(qemu: FakeBlocks, disk: discover.GuestDisk) -> None:
    """The guest writes into another image then, which has none."""
    bitmap.keep(disk, qemu)
    qemu.add_node("libvirt-4-format", drv="qcow2", file="/snap", size=64 << 20)
    qemu.devices[disk.qom_path] = "libvirt-4-format"
    assert not bitmap.has(disk, qemu)


def test_a_frozen_copy_is_apart_from_what_records(
    qemu: FakeBlocks, disk: discover.GuestDisk
) -> None:
    bitmap.keep(disk, qemu)
    assert bitmap.freeze(disk, qemu) == bitmap.freeze(disk, qemu) == FROZEN
    assert not qemu.bitmaps[NODE][FROZEN]["recording"]
    assert bitmap.has(disk, qemu)
    bitmap.thaw(disk, qemu)
    bitmap.thaw(disk, qemu)
    assert FROZEN not in qemu.bitmaps[NODE]


def test_without_a_bitmap_nothing_is_frozen(qemu: FakeBlocks, disk: discover.GuestDisk) -> None:
    with pytest.raises(exception.GuestError):
        bitmap.freeze(disk, qemu)


def test_a_bitmap_that_cannot_be_taken_off_is_told(
    qemu: FakeBlocks, disk: discover.GuestDisk
) -> None:
    bitmap.keep(disk, qemu)
    qemu.fails["block-dirty-bitmap-remove"] = "busy"
    with pytest.raises(exception.GuestError, match="busy"):
        bitmap.drop(disk, qemu)


def test_a_detached_disk_has_no_bitmap_to_ask_for(
    qemu: FakeBlocks, disk: discover.GuestDisk
) -> None:
    del qemu.devices[disk.qom_path]
    with pytest.raises(exception.GuestError):
        bitmap.has(disk, qemu)


# -- ranges -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "limit", "expected"),
    [
        ([], 5, []),
        ([(0, 512), (512, 512)], 5, [(0, 1024)]),
        ([(512, 512), (0, 4096)], 5, [(0, 4096)]),
        ([(0, 512), (1024, 512)], 5, [(0, 512), (1024, 512)]),
        ([(0, 10), (100, 10), (120, 10), (1000, 10)], 3, [(0, 10), (100, 30), (1000, 10)]),
        ([(0, 10), (100, 10), (120, 10), (1000, 10)], 2, [(0, 130), (1000, 10)]),
        ([(0, 10), (100, 10)], 0, [(0, 110)]),
        ([(3000, 512), (4000, 1000)], 5, [(3000, 512), (4000, 96)]),
        ([(4096, 512)], 5, []),
    ],
)
def test_ranges_are_coalesced(
    ranges: list[tuple[int, int]], limit: int, expected: list[tuple[int, int]]
) -> None:
    shuffled = random.Random(1).sample(ranges, len(ranges))
    assert coalesce(shuffled, limit, 4096) == expected


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 40)), max_size=40), st.integers(1, 12)
)
def test_coalesced_ranges_cover_all_and_are_few(ranges: list[tuple[int, int]], limit: int) -> None:
    found = coalesce(ranges, limit)
    covered = {byte for start, length in found for byte in range(start, start + length)}
    assert covered >= {byte for start, length in ranges for byte in range(start, start + length)}
    assert len(found) <= limit
    assert all(a + b < c for (a, b), (c, _) in itertools.pairwise(found))
    if len(found) < limit:
        exact = {byte for start, length in ranges for byte in range(start, start + length)}
        assert covered == exact


# -- the note ---------------------------------------------------------------------------


def test_a_note_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Note.read(str(tmp_path)) is None
    note = Note(4, 17, {"vda": [(0, 512), (4096, 1024)], "sda": []})
    note.write(str(tmp_path))
    assert Note.read(str(tmp_path)) == note
    Note(5, 1).write(str(tmp_path))
    assert Note.read(str(tmp_path)) == Note(5, 1)
    assert os.listdir(tmp_path) == ["resync.json"]
    Note.delete(str(tmp_path))
    Note.delete(str(tmp_path))
    assert Note.read(str(tmp_path)) is None


def test_a_note_has_a_bounded_number_of_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmap, "MAX_RANGES", 10)
    Note(1, 1, {"vda": [(at * 4096, 512) for at in range(100)]}).write(str(tmp_path))
    note = Note.read(str(tmp_path))
    assert note is not None
    assert len(note.ranges["vda"]) == 10


def test_a_note_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "resync.json.new").write_text("{")
    assert Note.read(str(tmp_path)) is None
    Note(1, 2).write(str(tmp_path))
    assert Note.read(str(tmp_path)) == Note(1, 2)


@pytest.mark.parametrize(
    "data",
    [
        "",
        "nonsense",
        "[]",
        "[" * 100_000,
        "{}",
        {"generation": "1"},
        {"generation": True},
        {"generation": -1},
        {"epoch": None},
        {"epoch": 1 << 70},
        {"ranges": []},
        {"ranges": {"vda": [[1]]}},
        {"ranges": {"vda": [[0, 1]]}},
        {"ranges": {"vda": [[0.5, 512]]}},
        {"ranges": {"vda": [[-512, 512]]}},
        {"ranges": {"vda": 7}},
    ],
)
def test_a_note_that_makes_no_sense_is_none(tmp_path: Path, data: str | dict[str, object]) -> None:
    if isinstance(data, dict):
        data = json.dumps({"generation": 1, "epoch": 1, "ranges": {}} | data)
    (tmp_path / "resync.json").write_text(data)
    assert Note.read(str(tmp_path)) is None


def test_a_link_in_place_of_the_note_is_not_followed(tmp_path: Path) -> None:
    """The directory is QEMU's."""
    elsewhere = tmp_path / "elsewhere"
    Note(1, 1).write(str(tmp_path))
    os.rename(tmp_path / "resync.json", elsewhere)
    os.symlink(elsewhere, tmp_path / "resync.json")
    assert Note.read(str(tmp_path)) is None
    os.symlink(elsewhere, tmp_path / "resync.json.new")
    content = elsewhere.read_text()
    Note(2, 2).write(str(tmp_path))
    assert elsewhere.read_text() == content
    os.unlink(tmp_path / "resync.json")
    os.mkfifo(tmp_path / "resync.json")
    assert Note.read(str(tmp_path)) is None
