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

"""A running guest's disks are read: all that is in use, or what changed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_pmt import exception
from nova_pmt.guest import nbd
from nova_pmt.guest.disk import bitmap, discover
from nova_pmt.guest.disk import source as source_module
from nova_pmt.guest.disk.source import DiskSource
from tests.unit.fakes.blocks import DISKS, MIB, FakeBlocks

KIB = 1024


class FakeExport:
    """What the NBD client would give for an export of a disk."""

    contents: dict[str, bytes] = {}
    allocation: dict[str, list[nbd.Extent]] = {}
    dirty: dict[str, list[nbd.Extent]] = {}
    opened: list[FakeExport] = []

    def __init__(self, path: str, name: str, bitmaps: list[str]) -> None:
        assert os.path.exists(path)
        self.disk = name.removeprefix("pmt-copy-")
        self.bitmaps = bitmaps
        self.size = len(self.contents[self.disk])
        self.closed = False
        self.opened.append(self)

    def extents(
        self, offset: int, length: int, context: str = "base:allocation"
    ) -> list[nbd.Extent]:
        assert (offset, length) == (0, self.size)
        if context == "base:allocation":
            return self.allocation.get(self.disk, [(0, self.size, 0)])
        assert context.removeprefix("qemu:dirty-bitmap:") in self.bitmaps
        return self.dirty.get(self.disk, [(0, self.size, 0)])

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.contents[self.disk][offset : offset + len(view)]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBlocks]:
    monkeypatch.setattr(source_module.nbd, "Export", FakeExport)
    FakeExport.contents = {
        "vda": bytes(range(256)) * (64 * MIB // 256),
        "sda": bytes(16 * MIB),
        "hda": b"\1" * (2 * MIB),
    }
    FakeExport.allocation, FakeExport.dirty, FakeExport.opened = {}, {}, []
    blocks = FakeBlocks()
    yield blocks
    blocks.close()


def test_a_full_copy_has_all_that_is_in_use(qemu: FakeBlocks, tmp_path: Path) -> None:
    FakeExport.allocation["vda"] = [
        (0, 3 * MIB, 0),
        (3 * MIB, 10 * MIB, nbd.HOLE | nbd.ZERO_READS),
        (13 * MIB, 100 * KIB, nbd.HOLE),
        (13 * MIB + 100 * KIB, 64 * MIB - 13 * MIB - 100 * KIB, nbd.ZERO_READS),
    ]
    disks = discover.disks(DISKS, qemu)
    with DiskSource(disks, qemu, str(tmp_path)) as source:
        assert source.extents(0) == [(0, 3 * MIB), (13 * MIB, 100 * KIB)]
        assert source.total_bytes == (3 + 16 + 2) * MIB + 100 * KIB
        blocks = [(disk, offset, bytes(data)) for disk, offset, data in source.blocks()]
        assert all(not export["writable"] for export in qemu.exports.values())
    assert [(disk, offset, len(data)) for disk, offset, data in blocks] == [
        *((0, at * MIB, MIB) for at in range(3)),
        (0, 13 * MIB, 100 * KIB),
        # sda is in use, but holds nothing but zeros
        *((2, at * MIB, MIB) for at in range(2)),
    ]
    assert blocks[3][2] == FakeExport.contents["vda"][13 * MIB : 13 * MIB + 100 * KIB]


def test_blocks_stay_good(qemu: FakeBlocks, tmp_path: Path) -> None:
    with DiskSource(discover.disks(DISKS, qemu)[2:], qemu, str(tmp_path)) as source:
        first, second = (data for _, _, data in source.blocks())
        second[:] = bytes(MIB)
        assert first == b"\1" * MIB


def test_a_resynchronisation_has_what_changed(qemu: FakeBlocks, tmp_path: Path) -> None:
    """Also zeros: the standby's image has something else there. The read-only disk it has."""
    disks = discover.disks(DISKS, qemu)
    for disk in disks[:2]:
        bitmap.keep(disk, qemu)
    FakeExport.dirty = {
        "vda": [(0, 64 * KIB, nbd.DIRTY), (64 * KIB, 64 * MIB - 64 * KIB, 0)],
        "sda": [(0, MIB, 0), (MIB, 128 * KIB, nbd.DIRTY), (MIB + 128 * KIB, 14 * MIB, 0)],
    }
    ranges = {"vda": [(32 * KIB, 64 * KIB), (5 * MIB, 512), (64 * MIB - 512, 4096)]}
    with DiskSource(disks, qemu, str(tmp_path), ranges) as source:
        assert source.extents(0) == [(0, 96 * KIB), (5 * MIB, 512), (64 * MIB - 512, 512)]
        assert source.extents(1) == [(MIB, 128 * KIB)]
        assert source.extents(2) == []
        assert [disk for disk, _, _ in source.blocks()] == [0, 0, 0, 1]
        assert all(bitmap.has(disk, qemu) for disk in disks[:2])
    assert all(list(maps) == [bitmap.NAME] for maps in qemu.bitmaps.values())


def test_a_resynchronisation_without_bitmaps_fails_and_leaves_nothing(
    qemu: FakeBlocks, tmp_path: Path
) -> None:
    with pytest.raises(exception.GuestError):
        DiskSource(discover.disks(DISKS, qemu), qemu, str(tmp_path), {}).__enter__()
    assert qemu.server is None
    assert os.listdir(tmp_path) == []


def test_at_the_end_the_server_is_off_and_connections_are_closed(
    qemu: FakeBlocks, tmp_path: Path
) -> None:
    with DiskSource(discover.disks(DISKS, qemu), qemu, str(tmp_path)):
        assert qemu.server is not None
        assert len(qemu.exports) == 3
    assert qemu.server is None
    assert os.listdir(tmp_path) == []
    assert all(export.closed for export in FakeExport.opened)


def test_somebody_elses_server_is_left_alone(qemu: FakeBlocks, tmp_path: Path) -> None:
    theirs = {"type": "unix", "data": {"path": str(tmp_path / "backup.sock")}}
    qemu.execute("nbd-server-start", addr=theirs)
    with pytest.raises(exception.GuestError) as caught:
        DiskSource(discover.disks(DISKS, qemu), qemu, str(tmp_path)).__enter__()
    assert caught.value.code == "NBD_SERVER_BUSY"
    assert "backup" in caught.value.cure
    assert qemu.server is not None


def test_a_dead_workers_server_is_taken_over(qemu: FakeBlocks, tmp_path: Path) -> None:
    disks = discover.disks(DISKS, qemu)
    DiskSource(disks, qemu, str(tmp_path)).__enter__()
    with DiskSource(disks, qemu, str(tmp_path)) as source:
        assert source.total_bytes
    assert qemu.server is None


def test_a_dead_workers_server_is_ended(qemu: FakeBlocks, tmp_path: Path) -> None:
    disks = discover.disks(DISKS, qemu)
    bitmap.keep(disks[0], qemu)
    bitmap.keep(disks[1], qemu)
    DiskSource(disks, qemu, str(tmp_path), {}).__enter__()
    assert DiskSource.recover(disks, qemu, str(tmp_path))
    assert qemu.server is None
    assert list(qemu.bitmaps["libvirt-3-format"]) == [bitmap.NAME]
    assert not DiskSource.recover(disks, qemu, str(tmp_path))


def test_a_socket_that_nobody_listens_on_is_removed(qemu: FakeBlocks, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "copy.sock"))
    with DiskSource(discover.disks(DISKS, qemu), qemu, str(tmp_path)) as source:
        assert source.total_bytes


def test_a_disk_that_changed_its_size_is_told(qemu: FakeBlocks, tmp_path: Path) -> None:
    disks = discover.disks(DISKS, qemu)
    FakeExport.contents["sda"] += bytes(MIB)
    with pytest.raises(exception.GuestError, match="sda"):
        DiskSource(disks, qemu, str(tmp_path)).__enter__()
    assert qemu.server is None


def test_an_export_that_qemu_refuses_leaves_nothing(qemu: FakeBlocks, tmp_path: Path) -> None:
    qemu.fails["block-export-add"] = "no"
    with pytest.raises(exception.GuestError):
        DiskSource(discover.disks(DISKS, qemu), qemu, str(tmp_path)).__enter__()
    assert qemu.server is None
