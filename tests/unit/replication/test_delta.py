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

import itertools

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
@given(st.data(), st.integers(1, PAGES + 10))
def test_pages_come_out_as_they_went_in(data: st.DataObject, limit: int) -> None:
    """Over many epochs, with pages kept, forgotten, sharing a place, and changed a lot."""
    base = delta.Base(PAGES, limit)
    ram, image = guest(1), guest(2)
    for _ in range(data.draw(st.integers(1, 8))):
        wanted = data.draw(st.lists(st.integers(0, PAGES - 1), min_size=1, unique=True))
        numbers = np.array(wanted, np.int64)
        for page in wanted:
            if data.draw(st.booleans()):
                places = data.draw(st.lists(st.integers(0, PAGE_SIZE - 1), max_size=5))
                ram[page, places] += 1
            else:
                ram[page] += 1
        if data.draw(st.booleans()):
            base.forget(numbers[: len(numbers) // 2])
        small = base.known(numbers)
        if small.any():
            worth, payload = base.encode(numbers[small], ram[numbers[small]])
            small[small] = worth
            if small.any():
                found, rows, at, words = delta.decode(memoryview(payload), int(small.sum()))
                assert (found == numbers[small]).all()
                rebuilt = image[found]
                rebuilt.view(np.uint64)[rows, at] = words
                image[found] = rebuilt
            else:
                assert payload == b""
        image[numbers[~small]] = ram[numbers[~small]]
        base.keep(numbers, ram[numbers])
        assert (image[numbers] == ram[numbers]).all()
        assert base.backed_pages <= min(limit, PAGES)


def test_little_that_changed_is_little_to_send() -> None:
    base, ram = delta.Base(PAGES, PAGES), guest(1)
    numbers = np.arange(30)
    base.keep(numbers, ram[:30])
    ram[:30, 8] += 1
    worth, payload = base.encode(numbers, ram[:30])
    assert worth.all()
    assert len(payload) == 30 * (delta.PAGE_BYTES + delta.CHANGE_BYTES)


def test_of_many_pages_those_that_hardly_changed_are_deltas() -> None:
    base, ram = delta.Base(PAGES, PAGES), guest(1)
    numbers = np.arange(30)
    base.keep(numbers, ram[:30])
    ram[:10] = guest(2)[:10]
    worth, payload = base.encode(numbers, ram[:30])
    assert worth.tolist() == [False] * 10 + [True] * 20
    assert len(payload) == 20 * delta.PAGE_BYTES  # nothing has changed in them


def test_pages_of_one_place_push_each_other_out() -> None:
    base, ram = delta.Base(PAGES, 40), guest(1)
    base.keep(np.arange(30), ram[:30])
    base.keep(np.arange(20, 60), ram[20:60])
    assert not base.known(np.arange(20)).any()
    assert base.known(np.arange(20, 60)).all()
    both = np.array([0, 40])
    base.keep(both, ram[both])
    assert np.count_nonzero(base.known(both)) == 1
    kept = both[base.known(both)]
    worth, payload = base.encode(kept, ram[kept])
    assert worth.all()
    assert len(payload) == delta.PAGE_BYTES


# -- whether it pays ---------------------------------------------------------------------------


class Trial:
    """A gate under a clock of the test's: 1,024 pages each 10 ms, which take 1 ms where tried."""

    def __init__(self) -> None:
        self.now = 100.0
        self.gate = delta.Gate(lambda: self.now)
        self.tried_at: list[float] = []

    def go(self, seconds: float, saved_bytes: int, s_per_byte: float = 0.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01
            if self.gate.tries:
                self.tried_at.append(self.now)
                self.gate.count(delta.JUDGED_PAGES, 1e-3, saved_bytes, s_per_byte)


def test_what_saves_time_goes_on() -> None:
    trial = Trial()
    trial.go(1.0, 1_000_000)
    assert len(trial.tried_at) >= 99


def test_what_costs_time_rests_longer_each_time_and_is_tried_again() -> None:
    trial = Trial()
    trial.go(400, 0)
    gaps = [b - a for a, b in itertools.pairwise(trial.tried_at)]
    rests = [min(delta.FIRST_REST_S * 2**n, delta.LONGEST_REST_S) for n in range(len(gaps))]
    assert gaps == [pytest.approx(rest, abs=0.03) for rest in rests]
    assert delta.LONGEST_REST_S in rests


def test_copies_are_there_when_it_is_tried_again() -> None:
    trial = Trial()
    trial.go(400, 0)
    while trial.gate.keeps:
        trial.go(0.01, 0)
    start = trial.now
    while not trial.gate.keeps:
        trial.go(0.01, 0)
    kept = trial.now
    before = len(trial.tried_at)
    while len(trial.tried_at) == before:
        trial.go(0.01, 0)
    assert trial.now - kept == pytest.approx(delta.WARM_S, abs=0.05)
    assert kept - start > 10


def test_what_pays_again_is_trusted_again() -> None:
    trial = Trial()
    trial.go(60, 0)
    trial.go(120, 1_000_000)
    before = len(trial.tried_at)
    trial.go(1.0, 1_000_000)
    assert len(trial.tried_at) - before >= 99
    trial.go(2.0, 0)  # and rests shortly when it does not any more
    assert trial.gate._rest_s <= 4 * delta.FIRST_REST_S


def test_on_a_slow_link_less_is_worth_it() -> None:
    slow, fast = Trial(), Trial()
    slow.go(1.0, 50_000, 80e-9)  # 100 Mbit/s: 4 ms
    fast.go(1.0, 50_000, 1e-9)
    assert len(slow.tried_at) > 50
    assert len(fast.tried_at) < 5


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
