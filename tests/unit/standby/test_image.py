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

"""The image: pages go to where their numbers say, in QEMU's memory file or aside."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.guest.layout import Layout, TrackedBlock
from nova_pmt.standby.image import StandbyImage
from tests.unit.fakes.standby import AsideImage, two_blocks
from tests.unit.guest.test_memory import ended_process

PAGE = 4096

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="/proc/PID/map_files needs CAP_CHECKPOINT_RESTORE: run as root"
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.lists(st.sets(st.integers(0, 119), max_size=40), max_size=5),
)
def test_pages_of_any_blocks_in_any_order_land_where_they_belong(
    sizes: list[int], writes: list[set[int]]
) -> None:
    blocks, first = [], 0
    for index, pages in enumerate(sizes):
        blocks.append(TrackedBlock(f"b{index}", pages * PAGE, 0, first, False))
        first += pages
    image = AsideImage(Layout(tuple(blocks)))
    expected = np.zeros((first, PAGE), np.uint8)
    for turn, wanted in enumerate(writes):
        numbers = np.array([n for n in wanted if n < first], np.int64)
        data = np.zeros((len(numbers), PAGE), np.uint8)
        data[:] = (numbers[:, None] + turn * 50) % 256
        image.write(numbers, data)
        expected[numbers] = data
    assert np.array_equal(image.contents(), expected)
    assert image.page_count == first


@pytest.fixture
def directory() -> Iterator[Path]:
    """On tmpfs, as libvirt's memory_backing_dir is."""
    path = Path("/dev/shm") / f"nova-pmt-test-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def mapped(directory: Path, name: str, pages: int, shared: bool = True) -> mmap.mmap:
    """A memory backend as QEMU has it; libvirt has removed its file's name."""
    path = directory / name
    path.write_bytes(b"")
    os.truncate(path, pages * PAGE)
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, pages * PAGE, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    os.close(fd)
    path.unlink()
    return memory


@needs_root
def test_main_memory_is_what_qemu_has_mapped(directory: Path) -> None:
    qemu = mapped(directory, "pc.ram", 50)
    _other = mapped(directory, "other.ram", 50)
    with StandbyImage(two_blocks(60, 10), os.getpid()) as image:
        image.write(np.array([49, 0, 55]), np.full((3, PAGE), 7, np.uint8))
        assert (qemu[0], qemu[49 * PAGE], qemu[PAGE]) == (7, 7, 0)
        assert image.side == {"vga.vram": image.side["vga.vram"]}
        assert image.side["vga.vram"][5 * PAGE] == 7


@needs_root
def test_numa_cells_are_told_apart_by_the_names_of_their_files(directory: Path) -> None:
    first = mapped(directory, "ram-node0", 20)
    second = mapped(directory, "ram-node1", 20)
    layout = Layout(
        (
            TrackedBlock("ram-node0", 20 * PAGE, 0, 0, True),
            TrackedBlock("/objects/ram-node1", 20 * PAGE, 0, 20, True),
        )
    )
    with StandbyImage(layout, os.getpid()) as image:
        image.write(np.array([20, 1]), np.array([[1], [2]], np.uint8).repeat(PAGE, axis=1))
    assert (first[PAGE], second[0]) == (2, 1)


@needs_root
@pytest.mark.parametrize("how", ["absent", "private", "other size", "twice"])
def test_memory_that_is_not_one_shared_file_is_refused(directory: Path, how: str) -> None:
    keep = []
    if how == "private":
        keep.append(mapped(directory, "pc.ram", 50, shared=False))
    elif how == "other size":
        keep.append(mapped(directory, "pc.ram", 51))
    elif how == "twice":
        keep += [mapped(directory, "pc.ram", 50), mapped(directory, "pc.ram", 50)]
    with pytest.raises(exception.UnsupportedMemory, match=r"look like block 'pc.ram'"):
        StandbyImage(two_blocks(60, 10), os.getpid())


def test_a_standby_that_ended_is_gone() -> None:
    child = ended_process()
    with pytest.raises(exception.GuestGone):
        StandbyImage(two_blocks(60, 10), child)
