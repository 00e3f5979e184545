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

"""The cache keeps its limit, follows the state, and never faults in a pause."""

from __future__ import annotations

import ctypes
import errno
import mmap
import resource
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt.checkpoint.cache import SLAB_BYTES, SLAB_PAGES, SPARE_SLABS, SlabCache

_libc = ctypes.CDLL(None, use_errno=True)


def resident_slabs(cache: SlabCache) -> float:
    """How much of the cache's range the kernel has really backed with memory, in slabs."""
    vector = (ctypes.c_ubyte * (cache.limit_slabs * SLAB_PAGES))()
    address = cache.pages.ctypes.data
    length = cache.limit_slabs * SLAB_BYTES
    assert _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), vector) == 0
    return sum(page & 1 for page in vector) / SLAB_PAGES


@pytest.fixture
def cache() -> Iterator[SlabCache]:
    made = SlabCache(32 * SLAB_BYTES)
    yield made
    made.close()


def test_reserving_costs_no_memory(cache: SlabCache) -> None:
    assert resident_slabs(cache) == 0
    assert (cache.backed_slabs, cache.available_slabs) == (0, 32)
    assert cache.take() is None


def test_huge_pages_do_not_make_it_larger_than_it_says(cache: SlabCache) -> None:
    address, flags = cache.pages.ctypes.data, ""
    inside = False
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for line in lines:
            head = line.split()[0]
            if "-" in head:
                first, last = (int(part, 16) for part in head.split("-"))
                inside = first <= address < last
            elif inside and head == "VmFlags:":
                flags = line
    assert " nh " in flags


def test_limit_is_rounded_down_to_whole_slabs_and_is_at_least_four() -> None:
    assert SlabCache(0).limit_slabs == 4
    assert SlabCache(10 * SLAB_BYTES - 1).limit_slabs == 9


def test_what_is_backed_is_what_the_kernel_has_given(cache: SlabCache) -> None:
    for more in (1, 5, 2):
        cache.grow(more)
        assert resident_slabs(cache) == cache.backed_slabs
    cache.adapt(1)
    assert cache.backed_slabs == 1 + SPARE_SLABS
    assert resident_slabs(cache) == cache.backed_slabs


def test_limit_holds_whatever_is_asked_for(cache: SlabCache) -> None:
    taken = []
    for need in (1, 100, 10_000):
        cache.grow(need)
        cache.adapt(need)
        while (slab := cache.take()) is not None:
            taken.append(slab)
            cache.pages[slab * SLAB_PAGES : (slab + 1) * SLAB_PAGES] = 255
        assert cache.backed_slabs <= cache.limit_slabs
        assert resident_slabs(cache) <= cache.limit_slabs
    assert sorted(taken) == list(range(32))
    assert cache.grow(1) == 0
    assert cache.take() is None
    assert len(cache.pages) == 32 * SLAB_PAGES


def test_writing_to_a_taken_slab_faults_no_memory_in(cache: SlabCache) -> None:
    cache.grow(8)
    source = np.ones((SLAB_PAGES, 4096), np.uint8)
    warm = cache.take()
    assert warm is not None
    cache.pages[warm * SLAB_PAGES : (warm + 1) * SLAB_PAGES] = source
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(7):
        slab = cache.take()
        assert slab is not None
        cache.pages[slab * SLAB_PAGES : (slab + 1) * SLAB_PAGES] = source
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    assert faults < 8, f"{faults} faults for {7 * SLAB_PAGES} pages"


def test_give_back_keeps_memory_warm_for_the_next(cache: SlabCache) -> None:
    cache.grow(2)
    first = cache.take()
    assert first is not None
    cache.give_back((first,))
    assert cache.take() == first
    assert resident_slabs(cache) == 2


def test_slabs_that_hold_pages_are_never_freed(cache: SlabCache) -> None:
    cache.grow(20)
    held = [cache.take() for _ in range(10)]
    for slab in held:
        assert slab is not None
        cache.pages[slab * SLAB_PAGES] = slab
    for _ in range(60):
        cache.adapt(0)
    assert cache.backed_slabs == cache.used_slabs == 10
    assert [int(cache.pages[slab * SLAB_PAGES, 0]) for slab in held if slab is not None] == held


def test_a_burst_is_forgotten_within_thirty_rounds() -> None:
    """40,000 pages, then quiet: below a quarter of the peak, in real memory."""
    cache = SlabCache(512 << 20)
    burst = -(-40_000 // SLAB_PAGES)
    cache.grow(burst)
    slabs = [slab for _ in range(burst) if (slab := cache.take()) is not None]
    cache.give_back(slabs)
    cache.adapt(burst)
    peak = cache.backed_slabs
    assert peak >= burst
    below = None
    for number in range(30):
        cache.adapt(4)
        if below is None and cache.backed_slabs < cache.peak_slabs / 4:
            below = number
    assert below is not None
    assert resident_slabs(cache) == cache.backed_slabs < peak / 4
    cache.close()


def test_growth_ends_when_the_host_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlabCache(8 * SLAB_BYTES)
    real = cache._map

    class Poor:
        def madvise(self, advice: int, start: int, length: int) -> None:
            if start // SLAB_BYTES >= 3:
                raise OSError(errno.ENOMEM, "no memory")
            real.madvise(advice, start, length)

    monkeypatch.setattr(cache, "_map", Poor())
    assert cache.grow(8) == 3
    assert cache.backed_slabs == 3


def test_kernels_without_populate_are_served_by_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlabCache(8 * SLAB_BYTES)

    class Old:
        def madvise(self, advice: int, start: int, length: int) -> None:
            raise OSError(errno.EINVAL, "unknown advice")

    monkeypatch.setattr(cache, "_map", Old())
    assert cache.grow(3) == 3
    assert resident_slabs(cache) == 3


def test_other_failures_of_the_kernel_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlabCache(8 * SLAB_BYTES)

    class Broken:
        def madvise(self, advice: int, start: int, length: int) -> None:
            raise OSError(errno.EIO, "hardware")

    monkeypatch.setattr(cache, "_map", Broken())
    with pytest.raises(OSError, match="hardware"):
        cache.grow(1)


def test_closing_frees_all_even_with_a_view_still_held(cache: SlabCache) -> None:
    other = SlabCache(4 * SLAB_BYTES)
    view = other.pages[:1]
    other.close()
    assert view.shape == (1, 4096)
    assert other.take() is None
    assert other.grow(4) == 0
    unused = SlabCache(4 * SLAB_BYTES)
    unused.close()
    with pytest.raises(ValueError, match="closed"):
        unused._map.madvise(mmap.MADV_DONTNEED)


ACTION = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 12)),
    st.tuples(st.just("give"), st.integers(1, 12)),
    st.tuples(st.just("grow"), st.integers(0, 12)),
    st.tuples(st.just("adapt"), st.integers(0, 40)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTION, max_size=40))
def test_every_slab_is_in_one_place_at_any_time(actions: list[tuple[str, int]]) -> None:
    cache = SlabCache(12 * SLAB_BYTES)
    held: list[int] = []
    peak = 0
    for action, count in actions:
        if action == "take":
            for _ in range(count):
                slab = cache.take()
                if slab is not None:
                    assert slab not in held
                    held.append(slab)
        elif action == "give":
            cache.give_back(held[:count])
            del held[:count]
        elif action == "grow":
            before = cache.backed_slabs
            grown = cache.grow(count)
            assert cache.backed_slabs == before + grown <= 12
            assert grown == min(count, 12 - before)
        else:
            cache.adapt(count)
            assert cache.backed_slabs == max(cache.target_slabs, len(held))
        peak = max(peak, cache.backed_slabs)
        assert cache.used_slabs == len(held)
        assert cache.free_slabs + cache.used_slabs == cache.backed_slabs
        assert cache.available_slabs == 12 - len(held)
        assert cache.peak_slabs == peak
    cache.close()
