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

"""Reading RAM and numbering pages, on memory of this very process: needs no privilege."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.guest import pagemap, process
from nova_pmt.guest.layout import Layout, TrackedBlock
from nova_pmt.guest.memory import PrivateReader, TrackedMemory, make_reader
from nova_pmt.guest.pagemap import PageNumbers, RangeScanner, expand
from nova_pmt.guest.tracker import MemoryTracker

PAGE = 4096


class NoTracker(MemoryTracker):
    """Tells nothing."""

    def __init__(self, pid: int, layout: Layout, threads: int = 0) -> None: ...

    @classmethod
    def check(cls) -> None: ...

    def attach(self) -> None: ...

    def scan(self) -> PageNumbers:
        return np.array([7], np.int64)

    def detach(self) -> None: ...

    def close(self) -> None: ...


def ended_process() -> int:
    """A process id that nobody has."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.fixture
def private() -> mmap.mmap:
    return mmap.mmap(-1, 40 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


# -- ranges -----------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 20)), max_size=120), max_size=4)
)
def test_ranges_become_numbers_in_their_order(parts: list[list[tuple[int, int]]]) -> None:
    arrays = [
        np.array([(first, first + count) for first, count in part], np.int64).reshape(-1, 2)
        for part in parts
    ]
    wanted = [n for part in parts for first, count in part for n in range(first, first + count)]
    out = np.full(len(wanted) + 3, -1, np.int64)
    found = expand(arrays, out, np.arange(10_000, dtype=np.int64))
    assert found.tolist() == wanted
    assert (out[len(wanted) :] == -1).all()


@pytest.mark.parametrize("count", [64, 65, 5000])
def test_few_and_many_ranges_are_expanded_alike(count: int) -> None:
    firsts = np.random.default_rng(count).permutation(count).astype(np.int64) * 10
    ranges = np.stack([firsts, firsts + 1 + firsts % 7], axis=1)
    wanted = np.concatenate([np.arange(first, last) for first, last in ranges.tolist()])
    out = np.zeros(len(wanted) + 5, np.int64)
    found = expand([ranges[:3], ranges[3:]], out, np.arange(60_000, dtype=np.int64))
    assert np.array_equal(found, wanted)


# -- /proc ------------------------------------------------------------------------------


def test_mappings_tell_shared_from_private(private: mmap.mmap) -> None:
    fd = os.memfd_create("nova-pmt-test")
    os.ftruncate(fd, 8 * PAGE)
    shared = mmap.mmap(fd, 8 * PAGE)
    (mapping,) = process.covering(os.getpid(), address_of(shared), 8 * PAGE)
    assert mapping.shared and mapping.inode and "nova-pmt-test" in mapping.path
    assert mapping.link == f"{mapping.start:x}-{mapping.end:x}"
    assert not any(m.shared for m in process.covering(os.getpid(), address_of(private), PAGE))
    os.close(fd)


def test_a_range_that_is_not_all_mapped_is_an_error() -> None:
    with pytest.raises(exception.GuestError, match="not mapped"):
        process.covering(os.getpid(), 0, PAGE)


def test_a_process_that_ended_is_gone() -> None:
    child = ended_process()
    with pytest.raises(exception.GuestGone):
        process.mappings(child)
    assert not process.is_qemu(child)


def test_facts_about_this_process() -> None:
    assert process.owner(os.getpid()) == (os.geteuid(), os.getegid())
    assert process.start_time(os.getpid()) > 0
    assert not process.is_qemu(os.getpid())
    assert not process.has_ended(os.getpid(), process.start_time(os.getpid()))
    assert process.has_ended(os.getpid(), process.start_time(os.getpid()) + 1)


# -- private memory ---------------------------------------------------------------------


def test_private_memory_is_read_page_by_page(private: mmap.mmap) -> None:
    for page in (0, 7, 39):
        private[page * PAGE : page * PAGE + 8] = page.to_bytes(8, "little")
    block = TrackedBlock("pc.ram", 40 * PAGE, address_of(private), 0, True)
    reader = make_reader(block, os.getpid())
    assert type(reader) is PrivateReader
    out = np.full((4, PAGE), 255, np.uint8)
    reader.copy(np.array([39, 0, 7, 1], np.int64), out)
    assert out[:, :8].view(np.int64)[:, 0].tolist() == [39, 0, 7, 0]
    reader.close()


def test_many_pages_are_read_in_several_calls() -> None:
    memory = mmap.mmap(-1, 2600 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8).reshape(-1, PAGE)
    whole[:, :8] = np.arange(2600, dtype=np.int64)[:, None].view(np.uint8)
    address = whole.ctypes.data
    reader = PrivateReader(TrackedBlock("x", 2600 * PAGE, address, 0, True), os.getpid())
    pages = np.random.default_rng(1).permutation(2600).astype(np.int64)
    out = np.zeros((2600, PAGE), np.uint8)
    reader.copy(pages, out)
    assert np.array_equal(out, whole[pages])
    reader.close()


def test_memory_that_is_not_there_is_a_typed_error() -> None:
    reader = PrivateReader(TrackedBlock("x", PAGE, 0x1000, 0, True), os.getpid())
    with pytest.raises(exception.GuestError, match="cannot be read"):
        reader.copy(np.zeros(1, np.int64), np.zeros((1, PAGE), np.uint8))
    reader.close()


def test_memory_of_a_process_that_ended_is_gone() -> None:
    reader = PrivateReader(TrackedBlock("x", PAGE, 0x1000, 0, True), os.getpid())
    child = ended_process()
    reader._pid = child
    with pytest.raises(exception.GuestGone):
        reader.copy(np.zeros(1, np.int64), np.zeros((1, PAGE), np.uint8))
    reader.close()


@pytest.mark.skipif(not pagemap.supported(), reason="this kernel has no PAGEMAP_SCAN (Linux 6.7)")
def test_only_pages_that_were_touched_are_populated(private: mmap.mmap) -> None:
    for page in (3, 4, 5, 38):
        private[page * PAGE] = 1
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    address = address_of(private)
    ranges = RangeScanner(fd, address, address + 40 * PAGE, 100).populated()
    assert [row for part in ranges for row in part.tolist()] == [[103, 106], [138, 139]]
    # more ranges than the kernel gives at a time, and than one call can return
    many = mmap.mmap(-1, 50_000 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    many.madvise(mmap.MADV_NOHUGEPAGE)
    touched = np.arange(0, 50_000, 2)
    np.frombuffer(many, np.uint8).reshape(-1, PAGE)[touched, 0] = 1
    address = address_of(many)
    ranges = RangeScanner(fd, address, address + 50_000 * PAGE, 0).populated()
    assert np.array_equal(np.concatenate(ranges)[:, 0], touched)
    os.close(fd)


@pytest.mark.skipif(not pagemap.supported(), reason="this kernel has no PAGEMAP_SCAN (Linux 6.7)")
def test_memory_that_nobody_armed_is_not_scanned_for_writes(private: mmap.mmap) -> None:
    private[0] = 1
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    address = address_of(private)
    scanner = RangeScanner(fd, address, address + 40 * PAGE, 0)
    with pytest.raises(PermissionError):
        scanner.probe()
    with pytest.raises(PermissionError):
        scanner.written()
    os.close(fd)


# -- all blocks together ----------------------------------------------------------------


def test_pages_of_all_blocks_share_one_numbering(private: mmap.mmap) -> None:
    side = mmap.mmap(-1, 10 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, 40, 3):
        private[page * PAGE] = page
    for page in (0, 9):
        side[page * PAGE] = 100 + page
    layout = Layout(
        (
            TrackedBlock("pc.ram", 40 * PAGE, address_of(private), 0, True),
            TrackedBlock("vga.vram", 10 * PAGE, address_of(side), 40, False),
        )
    )
    memory = TrackedMemory(layout, os.getpid(), NoTracker(0, layout))
    assert memory.page_count == 50
    assert memory.scan().tolist() == [7]
    for wanted in ([3, 40, 49, 6], [3, 6], [49], []):
        out = np.zeros((len(wanted), PAGE), np.uint8)
        memory.copy(np.array(wanted, np.int64), out)
        values = {3: 3, 6: 6, 40: 100, 49: 109}
        assert out[:, 0].tolist() == [values[page] for page in wanted]
    if pagemap.supported():
        assert memory.populated().tolist() == [*range(0, 40, 3), 40, 49]
    memory.close()


def test_a_block_pieced_together_from_shared_files_is_refused() -> None:
    fd = os.memfd_create("pieces")
    os.ftruncate(fd, 2 * PAGE)
    memory = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = address_of(memory)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED
    assert libc.mmap(address, PAGE, mmap.PROT_READ, fixed, fd, 0) == address
    block = TrackedBlock("odd", 4 * PAGE, address, 0, True)
    with pytest.raises(exception.UnsupportedMemory, match="'odd' is pieced together"):
        make_reader(block, os.getpid())
    os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="/proc/PID/map_files needs CAP_CHECKPOINT_RESTORE")
def test_shared_memory_is_mapped_and_knows_its_holes() -> None:
    fd = os.memfd_create("guest-ram")
    os.ftruncate(fd, 40 * PAGE)
    for page in (0, 10, 11, 39):
        os.pwrite(fd, bytes([page + 1]) * PAGE, page * PAGE)
    # QEMU has it mapped from an offset on, and the block begins behind the mapping's start
    memory = mmap.mmap(fd, 38 * PAGE, offset=2 * PAGE)
    block = TrackedBlock("pc.ram", 36 * PAGE, address_of(memory) + 2 * PAGE, 0, True)
    reader = make_reader(block, os.getpid())
    assert [row for part in reader.populated() for row in part.tolist()] == [[6, 8], [35, 36]]
    out = np.zeros((3, PAGE), np.uint8)
    reader.copy(np.array([7, 6, 0], np.int64), out)
    assert out[:, 0].tolist() == [12, 11, 0]
    memory[2 * PAGE + 7 * PAGE] = 99  # what the guest writes is seen
    reader.copy(np.array([7], np.int64), out[:1])
    assert out[0, 0] == 99
    reader.close()
    os.close(fd)
