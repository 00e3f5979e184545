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

"""Zero pages and compressed frames: what comes out is what went in, and less is sent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.checkpoint.interfaces import Pages
from nova_pmt.codecs.base import Codec
from nova_pmt.codecs.lz4 import Lz4Codec
from nova_pmt.replication import packing
from nova_pmt.replication.protocol import HEADER, PACKED, Header, Type
from nova_pmt.replication.sender import Sender
from tests.unit.fakes.disk import SECTOR, log_entry
from tests.unit.fakes.guest import device_state
from tests.unit.fakes.standby import FakeLink, FakeStandby, two_blocks

PAGES, SIDE = 600, 20
GBIT = 8e-9


class Pair:
    """A sender and a standby that agreed on a codec."""

    def __init__(self, name: str = "zstd", delta_pages: int = 0, s_per_byte: float = GBIT) -> None:
        self.standby = FakeStandby(two_blocks(PAGES, SIDE), 16 << 20, [64 * SECTOR])
        self.link = FakeLink(self.standby.feed)
        self.link.speed.s_per_byte = s_per_byte
        codec = packing.first_of([name])
        assert codec is not None
        self.standby.receiver.codec = codec[1]
        self.sender = Sender(self.link, PAGES, delta_pages, codec)  # type: ignore[arg-type]
        self.epoch = 0

    def checkpoint(self, numbers: np.ndarray, data: Pages, log: bytes = b"") -> list[Header]:
        """Send and commit one; the headers of its frames."""
        self.epoch += 1
        before = len(self.standby.frames)
        for at in range(0, len(numbers), 256):
            part = slice(at, at + 256)
            pages = np.ascontiguousarray(data[part])
            self.sender.send_pages(self.epoch, numbers[part], pages, None)
        if log:
            self.sender.send_log(self.epoch, 0, memoryview(log), None)
        self.sender.send_commit(self.epoch, device_state(self.epoch))
        while self.link.step():
            pass
        return self.standby.frames[before:]


def pages_of(kinds: str, seed: int = 0) -> Pages:
    """A page for each letter: zero, text, noise, or almost zero."""
    rng = np.random.default_rng(seed)
    made = np.zeros((len(kinds), 4096), np.uint8)
    for at, kind in enumerate(kinds):
        if kind == "t":
            made[at] = np.frombuffer((b"the quick brown fox %d " % (at + seed)) * 250, "u1")[:4096]
        elif kind == "n":
            made[at] = rng.integers(0, 256, 4096, np.uint8)
        elif kind == "a":
            made[at, rng.integers(4096)] = 1
    return made


kinds = st.text("ztna", min_size=1, max_size=280)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(kinds, st.integers(0, 300)), min_size=1, max_size=4),
    st.sampled_from(["zstd", "lz4"]),
    st.sampled_from([0, 64, PAGES]),
)
def test_the_image_is_what_was_sent(
    checkpoints: list[tuple[str, int]], name: str, delta_pages: int
) -> None:
    pair = Pair(name, delta_pages)
    expected = np.zeros((PAGES, 4096), np.uint8)
    for seed, (found, first) in enumerate(checkpoints):
        numbers, data = np.arange(first, first + len(found)), pages_of(found, seed)
        expected[numbers] = data
        pair.checkpoint(numbers, data)
        assert np.array_equal(pair.standby.image.contents()[:PAGES], expected)
        assert pair.standby.staging.used_slabs == 0
    pair.standby.staging.close()


@given(kinds)
def test_zero_pages_are_those_without_a_single_bit(found: str) -> None:
    assert packing.zero_pages(pages_of(found)).tolist() == [kind == "z" for kind in found]


def test_of_zero_pages_only_their_numbers_are_sent() -> None:
    pair = Pair()
    frames = pair.checkpoint(np.arange(512), pages_of("z" * 512))
    assert [frame.type for frame in frames] == [Type.ZEROS, Type.ZEROS, Type.COMMIT]
    frames = pair.checkpoint(np.arange(40, 80), pages_of("nz" * 20))
    assert [frame.type for frame in frames] == [Type.PAGES, Type.ZEROS, Type.COMMIT]
    assert [frame.value for frame in frames[:2]] == [20, 20]
    assert len(pair.standby.acknowledged) == 2


def test_a_page_that_becomes_zero_is_zero() -> None:
    pair = Pair(delta_pages=PAGES)
    for found in ("t", "z", "n", "z", "a"):
        pair.checkpoint(np.arange(30), pages_of(found * 30, pair.epoch))
        assert pair.standby.image.contents()[:30].any() == (found != "z")


def test_a_page_that_is_sent_twice_in_one_slab_ends_as_it_was_sent_last() -> None:
    """Ahead of the pause as it was, then, in the pause, zero; and the other way round."""
    for first, second in ("tz", "zt", "za"):
        pair = Pair()
        pair.checkpoint(np.arange(3), pages_of("nnn"))
        pair.epoch += 1
        for kind in (first, second):
            pages = pages_of(kind * 3, seed=ord(kind))
            pair.sender.send_pages(pair.epoch, np.array([0, 1, 2]), pages, None)
        pair.sender.send_commit(pair.epoch, device_state(pair.epoch))
        while pair.link.step():
            pass
        assert np.array_equal(pair.standby.image.contents()[:3], pages)


def test_pages_and_logs_that_repeat_are_sent_smaller() -> None:
    pair = Pair(s_per_byte=1e-6)
    log = log_entry(0, b"written again and again " * 1024)
    for _ in range(6):
        frames = pair.checkpoint(np.arange(256), pages_of("t" * 256, pair.epoch), log)
    sent = {frame.type: frame for frame in frames}
    assert sent[Type.PAGES].flags == PACKED and sent[Type.PAGES].length < 256 * 400
    assert sent[Type.LOG].flags == PACKED and sent[Type.LOG].length < len(log) / 10
    told = pair.sender.codec
    assert told is not None
    assert told["name"] == "zstd" and told["level"] is not None and told["left"] < 0.1


@pytest.mark.parametrize(("found", "s_per_byte"), [("n", GBIT), ("t", 1e-12)])
def test_where_it_does_not_pay_nothing_is_compressed(found: str, s_per_byte: float) -> None:
    pair = Pair(s_per_byte=s_per_byte)
    pair.sender._means.packer._choices[Type.PAGES] = slow = Slow()  # type: ignore[union-attr]
    slow.pays = s_per_byte == GBIT
    for _ in range(20):
        frames = pair.checkpoint(np.arange(256), pages_of(found * 256, pair.epoch))
    assert frames[0].flags == 0


class Slow:
    """A choice that was made."""

    pays = True

    def level(self, s_per_byte: float) -> int | None:
        return -5 if self.pays else None

    def count(self, *_what: object) -> None:
        pass


def test_a_standby_that_knows_of_no_codec_gets_neither() -> None:
    standby = FakeStandby(two_blocks(PAGES, SIDE), 16 << 20)
    link = FakeLink(standby.feed)
    sender = Sender(link, PAGES, 0)  # type: ignore[arg-type]
    sender.send_pages(1, np.arange(4), pages_of("zztt"), None)
    sender.send_commit(1, device_state(1))
    while link.step():
        pass
    assert [(frame.type, frame.flags) for frame in standby.frames] == [
        (Type.PAGES, 0),
        (Type.COMMIT, 0),
    ]
    assert sender.codec is None


def spoilt(
    pair: Pair, spoil: Callable[[Header, bytearray], None], found: str = "t" * 256
) -> exception.PeerError:
    """The error with which a checkpoint is refused; the image stays as it was."""
    pair.checkpoint(np.arange(256), pages_of("t" * 256))
    before = pair.standby.image.contents().copy()
    pair.link.flip = spoil
    with pytest.raises(exception.PeerError) as caught:
        pair.checkpoint(np.arange(256), pages_of(found, 9))
    assert np.array_equal(pair.standby.image.contents(), before)
    assert pair.standby.acknowledged == [1]
    pair.standby.receiver.discard()
    assert pair.standby.staging.used_slabs == 0
    return caught.value


@pytest.mark.parametrize("name", ["zstd", "lz4"])
@pytest.mark.parametrize("at", [2048, 2060, 2300, -1])
def test_a_changed_bit_in_what_is_compressed_is_noticed(name: str, at: int) -> None:
    def spoil(header: Header, frame: bytearray) -> None:
        if header.flags & PACKED:
            frame[at if at < 0 else HEADER.size + at] ^= 0x10

    assert isinstance(spoilt(Pair(name, s_per_byte=1.0), spoil), exception.CheckpointCorrupt)


@pytest.mark.parametrize("number", [-1, PAGES + SIDE])
def test_a_zero_page_that_there_is_not_is_refused(number: int) -> None:
    def spoil(header: Header, frame: bytearray) -> None:
        if header.type is Type.PAGES:  # and the zero page behind it
            frame[-8:] = number.to_bytes(8, "little", signed=True)

    assert "out of range" in spoilt(Pair(), spoil, "t" * 255 + "z").message


def test_a_compressed_frame_without_a_codec_is_refused() -> None:
    pair = Pair(s_per_byte=1.0)

    def spoil(header: Header, frame: bytearray) -> None:
        pair.standby.receiver.codec = None

    assert "no codec was agreed on" in spoilt(pair, spoil).message


@pytest.mark.parametrize("length", [0, 1 << 21, 0xFFFFFFFF])
def test_a_length_that_cannot_be_is_refused_before_memory_is_found_for_it(length: int) -> None:
    pair = Pair(s_per_byte=1.0)
    pair.checkpoint(np.arange(1), pages_of("t"))
    header = Header(Type.LOG, 20, 2, 0, PACKED)
    with pytest.raises(exception.CheckpointCorrupt, match=f"{length} bytes, packed"):
        pair.standby.feed(header.pack() + packing.LENGTH.pack(length) + bytes(16))


def test_what_the_standby_answers_must_have_been_offered() -> None:
    offered = packing.available(["lz4", "none"])
    assert packing.agreed(offered, None) is None
    found = packing.agreed(offered, "lz4")
    assert found is not None and found[0] == "lz4" and isinstance(found[1], Lz4Codec)
    for answer in ("zstd", "none", "../lz4", 7, ["lz4"]):
        with pytest.raises(exception.ProtocolMismatch):
            packing.agreed(offered, answer)


def test_the_first_codec_that_is_there_is_used() -> None:
    assert packing.first_of([]) is None
    assert packing.first_of(["none"]) is None
    found = packing.first_of(["none", "lz4", "zstd"])
    assert found is not None and found[0] == "lz4" and isinstance(found[1], Codec)


def test_a_codec_that_cannot_be_loaded_is_not_offered_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Lz4Codec) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(Lz4Codec, "__init__", broken)
    assert list(packing.available(["lz4", "zstd", "none"])) == ["zstd"]
    assert "codec lz4 is not used: no such library" in caplog.text
    assert "codec none is not used" in caplog.text
    found = packing.first_of(["lz4", "zstd"])
    assert found is not None and found[0] == "zstd"
