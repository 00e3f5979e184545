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

"""Deltas make of the old what was sent, or are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt.checkpoint.interfaces import PAGE_SIZE
from nova_pmt.replication import delta

PAGES = 64


def guest(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (PAGES, PAGE_SIZE), np.uint8)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_pages_come_out_as_they_went_in(data: st.DataObject) -> None:
    """Over many epochs, with pages that are kept, forgotten, and too many to keep."""
    base = delta.Base(PAGES)
    ram, image = guest(1), guest(2)
    for _ in range(data.draw(st.integers(1, 8))):
        wanted = data.draw(st.lists(st.integers(0, PAGES - 1), min_size=1, unique=True))
        numbers = np.array(wanted, np.int64)
        for page in wanted:
            places = data.draw(st.lists(st.integers(0, PAGE_SIZE - 1), max_size=5))
            ram[page, places] += 1
        if data.draw(st.booleans()):
            base.forget(numbers[: len(numbers) // 2])
        known = base.known(numbers)
        payload = base.encode(numbers[known], ram[numbers[known]]) if known.any() else None
        if payload is None:
            known[:] = False
        else:
            count = int(known.sum())
            found, rows, at, words = delta.decode(memoryview(payload), count)
            assert (found == numbers[known]).all()
            rebuilt = image[found]
            rebuilt.view(np.uint64)[rows, at] = words
            image[found] = rebuilt
        image[numbers[~known]] = ram[numbers[~known]]
        base.keep(numbers, ram[numbers])
        assert (image[numbers] == ram[numbers]).all()


def test_little_that_changed_is_little_to_send() -> None:
    base, ram = delta.Base(PAGES), guest(1)
    numbers = np.arange(30)
    base.keep(numbers, ram[:30])
    ram[:30, 8] += 1
    payload = base.encode(numbers, ram[:30])
    assert payload is not None
    assert len(payload) == 30 * (delta.PAGE_BYTES + delta.CHANGE_BYTES)


def test_much_that_changed_is_sent_whole() -> None:
    base = delta.Base(PAGES)
    numbers = np.arange(30)
    base.keep(numbers, guest(1)[:30])
    assert base.encode(numbers, guest(2)[:30]) is None


def test_more_pages_than_fit_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "BASE_PAGES", 40)
    base, ram = delta.Base(PAGES), guest(1)
    base.keep(np.arange(30), ram[:30])
    base.keep(np.arange(20, 60), ram[20:60])
    assert not base.known(np.arange(20)).any()
    assert base.known(np.arange(20, 60)).all()


@given(st.binary(max_size=200), st.integers(1, 20))
def test_garbage_is_refused(payload: bytes, count: int) -> None:
    try:
        numbers, rows, places, words = delta.decode(memoryview(payload), count)
    except ValueError:
        return
    assert len(numbers) == count
    assert len(rows) == len(places) == len(words)
    assert not len(rows) or (rows.max() < count and places.max() < delta.PAGE_WORDS)


@given(st.binary(max_size=3000), st.data())
def test_device_states_come_out_as_they_went_in(old: bytes, data: st.DataObject) -> None:
    new = bytearray(old)
    if new:
        for at in data.draw(st.lists(st.integers(0, len(new) - 1), max_size=6)):
            new[at] ^= 0xFF
    payload = delta.encode_state(old, bytes(new))
    if payload is not None:
        assert delta.decode_state(old, memoryview(payload)) == bytes(new)


def test_a_device_state_of_another_length_is_sent_whole() -> None:
    assert delta.encode_state(b"x" * 100, b"x" * 104) is None
    assert delta.encode_state(b"", b"x" * 8) is None


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_garbage_for_a_device_state_is_refused(old: bytes, payload: bytes) -> None:
    try:
        assert len(delta.decode_state(old, memoryview(payload))) == len(old)
    except ValueError:
        return
