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

"""Frames and the handshake: what is ours is understood, all else is refused with its type."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.replication import protocol
from nova_pmt.replication.link import Buffers, FrameReader, read_frame
from nova_pmt.replication.protocol import (
    DIGEST_BYTES,
    DISK_BYTES,
    HEADER,
    LIMITS,
    MAX_PAGES,
    PACKED,
    STATE_IS_DELTA,
    Digest,
    Header,
    Type,
)

PAGE_RECORD = 8 + 4096
PACKABLE = (Type.PAGES, Type.DELTA, Type.BLOCK, Type.LOG)
PAIR = {
    "uuid": "7b0e3b2e-0000-4000-8000-000000000001",
    "generation": 7,
    "primary_host": "one",
    "standby_host": "two",
}
DISKS = [{"name": "vda", "format": "raw", "path": "/vda", "size": 512, "readonly": False}]
LAYOUT = [{"name": "pc.ram", "length": 4096, "first_page": 0, "main": True}]


@st.composite
def headers(draw: st.DrawFn, max_length: int = 1 << 32) -> Header:
    """Any header that is acceptable."""
    kind = draw(st.sampled_from(Type))
    value = draw(st.integers(0, 2**64 - 1))
    length = draw(st.integers(0, min(LIMITS[kind], max_length)))
    if kind is Type.PAGES:
        value = draw(st.integers(1, min(MAX_PAGES, max(1, max_length // PAGE_RECORD))))
        length = value * PAGE_RECORD
    elif kind is Type.COMMIT:
        length = max(length, DIGEST_BYTES)
    elif kind in (Type.BLOCK, Type.LOG):
        length = max(length, 1)
    elif kind is Type.DELTA:
        value = draw(st.integers(1, min(MAX_PAGES, max(1, max_length // 8))))
        length = max(length, value * 8)
    elif kind is Type.ZEROS:
        value = draw(st.integers(1, min(MAX_PAGES, max(1, max_length // 8))))
        length = value * 8
    flags = 0
    if kind in PACKABLE and draw(st.booleans()):
        flags = PACKED
        least = value * 8 + 1 if kind is Type.PAGES else 5
        length = draw(st.integers(least, max(least, length - 1)))
    elif kind is Type.COMMIT and draw(st.booleans()):
        flags = STATE_IS_DELTA
    return Header(kind, length, draw(st.integers(0, 2**64 - 1)), value, flags)


# -- headers ----------------------------------------------------------------------------


@given(headers())
def test_headers_survive_the_wire(header: Header) -> None:
    assert len(header.pack()) == HEADER.size == 24
    assert Header.unpack(header.pack()) == header


@given(st.binary(min_size=24, max_size=24))
def test_random_bytes_are_refused_with_a_typed_error(data: bytes) -> None:
    try:
        header = Header.unpack(data)
    except exception.PeerError:
        return
    assert header.length <= LIMITS[header.type]


@given(headers(), st.integers(0, 23), st.integers(1, 255))
def test_a_damaged_header_is_refused_or_means_another_frame(
    header: Header, at: int, change: int
) -> None:
    data = bytearray(header.pack())
    data[at] ^= change
    try:
        other = Header.unpack(data)
    except exception.PeerError:
        return
    assert other != header
    assert at >= 2, "a wrong magic is never accepted"
    assert other.flags in (0, STATE_IS_DELTA if other.type is Type.COMMIT else PACKED)


@pytest.mark.parametrize(
    "header",
    [
        Header(Type.PAGES, 0, 1, 0),
        Header(Type.PAGES, PAGE_RECORD, 1, 2),
        Header(Type.PAGES, (MAX_PAGES + 1) * PAGE_RECORD, 1, MAX_PAGES + 1),
        Header(Type.COMMIT, DIGEST_BYTES - 1, 1),
        Header(Type.COMMIT, LIMITS[Type.COMMIT] + 1, 1),
        Header(Type.HEARTBEAT, 1),
        Header(Type.COMMITTED, 8, 1),
        Header(Type.HELLO, (1 << 16) + 1),
        Header(Type.BYE, 4, flags=1),
        Header(Type.ZEROS, 0, 1, 0),
        Header(Type.ZEROS, 8, 1, 2),
        Header(Type.ZEROS, 8 * (MAX_PAGES + 1), 1, MAX_PAGES + 1),
        Header(Type.ZEROS, 8, 1, 1, PACKED),
        Header(Type.PAGES, 8, 1, 1, PACKED),
        Header(Type.PAGES, PAGE_RECORD, 1, 1, PACKED),
        Header(Type.PAGES, 100, 1, 1, STATE_IS_DELTA),
        Header(Type.DELTA, 0, 1, 1),
        Header(Type.DELTA, 7, 1, 1),
        Header(Type.DELTA, 4, 1, 1, PACKED),
        Header(Type.LOG, 4, 1, 0, PACKED),
        Header(Type.COMMIT, 100, 1, 1, PACKED),
        Header(Type.BLOCK, 0, 1),
        Header(Type.BLOCK, DISK_BYTES + 1, 1),
        Header(Type.LOG, 0, 1),
        Header(Type.LOG, DISK_BYTES + 1, 1),
    ],
    ids=str,
)
def test_a_frame_of_impossible_size_is_refused_by_its_header(header: Header) -> None:
    with pytest.raises(exception.ProtocolMismatch):
        Header.unpack(header.pack())


@pytest.mark.parametrize(
    ("offered", "found"),
    [
        (["zstd", "lz4"], ["zstd", "lz4"]),
        (["../x", 3, "lz4", None, "a" * 9], ["lz4", "aaaaaaaaa"]),
        ([f"c{n}" for n in range(99)], [f"c{n}" for n in range(16)]),
        ("zstd", []),
        (None, []),
    ],
)
def test_what_is_no_name_of_a_codec_is_not_offered(offered: object, found: list[str]) -> None:
    assert protocol.offered_codecs({"codecs": offered}) == found


def test_unknown_types_and_other_protocols_are_told_apart() -> None:
    with pytest.raises(exception.ProtocolMismatch, match="unknown frame type 99"):
        Header.unpack(HEADER.pack(b"PM", 99, 0, 0, 0, 0))
    with pytest.raises(exception.ProtocolMismatch, match="does not speak"):
        Header.unpack(b"GET / HTTP/1.1\r\nHost: wo")


def test_every_type_has_a_limit() -> None:
    assert set(LIMITS) == set(Type)


# -- frames in pieces -------------------------------------------------------------------


class Collector:
    """Takes payloads in several buffers, empty ones too."""

    def __init__(self, cut: int) -> None:
        self.frames: list[tuple[Header, bytes]] = []
        self._cut = cut

    def buffers(self, header: Header) -> Buffers:
        data = bytearray(header.length)
        at = min(self._cut, header.length)
        return [memoryview(data)[:at], memoryview(data)[at:], memoryview(data)[:0]]

    def frame(self, header: Header, payload: Buffers) -> None:
        self.frames.append((header, b"".join(payload)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(headers(max_length=15_000), min_size=1, max_size=6),
    st.lists(st.integers(1, 20_000), min_size=1, max_size=8),
    st.integers(0, 20_000),
    st.randoms(use_true_random=False),
)
def test_frames_come_out_whole_however_the_bytes_are_cut(
    sequence: list[Header], pieces: list[int], cut: int, rng: Any
) -> None:
    sent = [(header, rng.randbytes(header.length)) for header in sequence]
    stream = memoryview(b"".join(header.pack() + payload for header, payload in sent))
    collector = Collector(cut)
    reader = FrameReader(collector)
    turn = 0
    while stream:
        space = reader.space()
        count = min(len(space), len(stream), pieces[turn % len(pieces)])
        space[:count] = stream[:count]
        reader.filled(count)
        stream = stream[count:]
        turn += 1
    assert collector.frames == sent


def test_a_frame_cut_short_is_never_delivered() -> None:
    collector = Collector(5)
    reader = FrameReader(collector)
    frame = Header(Type.BYE, 100).pack() + bytes(99)
    for byte in frame:
        reader.space()[0] = byte
        reader.filled(1)
    assert collector.frames == []


# -- payloads ---------------------------------------------------------------------------


@given(
    st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20) | st.none()),
)
def test_json_payloads_survive_the_wire(data: dict[str, Any]) -> None:
    frame = protocol.pack_json(Type.BYE, data, 3)
    header = Header.unpack(frame[: HEADER.size])
    assert (header.type, header.epoch) == (Type.BYE, 3)
    assert protocol.unpack_json(frame[HEADER.size :]) == data


@given(st.binary(max_size=200))
def test_json_garbage_is_refused_with_a_typed_error(data: bytes) -> None:
    try:
        assert isinstance(protocol.unpack_json(data), dict)
    except exception.ProtocolMismatch:
        return


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b"null", b'"x"', b"\xff\xfe", b"{", b"[" * 60_000, b'{"a":' * 12_000]
)
def test_json_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(exception.ProtocolMismatch):
        protocol.unpack_json(data)


def test_an_oversize_payload_is_not_even_made() -> None:
    with pytest.raises(ValueError, match="BYE payload"):
        protocol.pack_json(Type.BYE, {"reason": "x" * (1 << 16)})


def test_errors_come_out_as_what_they_went_in() -> None:
    error = exception.CheckpointCorrupt("bits", cure="new memory", epoch=3)
    frame = protocol.pack_json(Type.ERROR, error.to_dict())
    back = exception.from_dict(protocol.unpack_json(frame[HEADER.size :]))
    assert type(back) is exception.CheckpointCorrupt
    assert (back.message, back.cure, back.code, back.details) == (
        "bits",
        "new memory",
        "CHECKPOINT_CORRUPT",
        {"epoch": 3},
    )


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"code": 5, "message": None, "details": []},
        {"code": "NO_SUCH_CODE", "message": "x", "cure": 1},
        {"code": "PEER_LOST", "details": {"message": "x", "cure": "y", "code": "z", "self": 1}},
    ],
)
def test_whatever_a_peer_calls_an_error_is_one(data: dict[str, Any]) -> None:
    assert isinstance(exception.from_dict(data), exception.PmtError)


def test_the_digest_covers_disks_with_their_number_and_offset() -> None:
    def of(*frames: tuple[int, bytes]) -> bytes:
        digest = Digest()
        for value, data in frames:
            digest.add_disk(value, data)
        assert digest.pages == 0
        return digest.finish(b"devices")

    value = protocol.disk_value(3, 4096)
    seen = {
        of((value, b"ab")),
        of((value, b"ab"), (value, b"ab")),
        of((value, b"ba")),
        of((protocol.disk_value(2, 4096), b"ab")),
        of((protocol.disk_value(3, 4608), b"ab")),
        of((value, b"a"), (value, b"b")),
        of((value, b"b"), (value, b"a")),
        of(),
    }
    assert len(seen) == 8
    assert of((value, b"ab")) == xxhash.xxh3_128_digest(value.to_bytes(8, "big") + b"abdevices")


def test_the_digest_covers_numbers_pages_and_devices_in_their_order() -> None:
    numbers = np.array([3, 9], np.int64).tobytes()
    pages = bytes(range(256)) * 32
    digest = Digest()
    digest.add_pages(numbers, pages, 2)
    assert digest.pages == 2
    assert digest.finish(b"devices") == xxhash.xxh3_128_digest(numbers + pages + b"devices")
    assert digest.pages == 0
    assert digest.finish(b"") == xxhash.xxh3_128_digest(b"")


# -- the handshake ----------------------------------------------------------------------


def greeting(**changes: Any) -> dict[str, Any]:
    data = json.loads(protocol.hello(PAIR, LAYOUT, DISKS)[HEADER.size :])
    data.update(changes)
    return data


def test_the_right_primary_is_welcome() -> None:
    protocol.check_hello(greeting(), PAIR, LAYOUT, DISKS)


@pytest.mark.parametrize(
    "changes",
    [{"protocol": 2}, {"protocol": 4}, {"protocol": None}, {"page_size": 16384}, {"pair": "x"}],
)
def test_another_version_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(exception.ProtocolMismatch) as caught:
        protocol.check_hello(greeting(**changes), PAIR, LAYOUT, DISKS)
    assert caught.value.code == "PROTOCOL_MISMATCH"
    assert "same protocol version" in caught.value.cure


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uuid", "7b0e3b2e-0000-4000-8000-000000000002"),
        ("generation", 6),
        ("generation", "7"),
        ("primary_host", "three"),
        ("standby_host", None),
    ],
)
def test_another_pair_is_refused(key: str, value: Any) -> None:
    with pytest.raises(exception.PairMismatch, match=key):
        protocol.check_hello(greeting(pair={**PAIR, key: value}), PAIR, LAYOUT, DISKS)


@pytest.mark.parametrize(
    "layout",
    [[], None, [{**LAYOUT[0], "length": 8192}], [{**LAYOUT[0], "name": "ram-node0"}], LAYOUT * 2],
)
def test_another_memory_layout_is_refused(layout: Any) -> None:
    with pytest.raises(exception.PairMismatch, match="layout"):
        protocol.check_hello(greeting(layout=layout), PAIR, LAYOUT, DISKS)


@pytest.mark.parametrize("disks", [[], None, DISKS * 2, [{**DISKS[0], "size": 1024}]])
def test_other_disks_are_refused(disks: Any) -> None:
    with pytest.raises(exception.PairMismatch, match="disks"):
        protocol.check_hello(greeting(disks=disks), PAIR, LAYOUT, DISKS)


@given(st.integers(0, protocol.MAX_DISKS - 1), st.integers(0, 2**56 - 1))
def test_a_value_names_a_disk_and_an_offset(disk: int, offset: int) -> None:
    assert protocol.disk_of(protocol.disk_value(disk, offset)) == (disk, offset)


def over_a_socket(send: Callable[[socket.socket], None]) -> tuple[Header, bytes]:
    """What :func:`read_frame` makes of what somebody sends and then closes."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5.0)

    def run() -> None:
        with theirs:
            send(theirs)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with ours:
            return read_frame(ours)
    finally:
        thread.join()


def test_the_first_frame_is_read_whole_though_it_comes_in_drops() -> None:
    frame = protocol.hello(PAIR, LAYOUT, DISKS)

    def drops(sock: socket.socket) -> None:
        for at in range(len(frame)):
            sock.sendall(frame[at : at + 1])

    header, payload = over_a_socket(drops)
    assert header.type is Type.HELLO
    protocol.check_hello(protocol.unpack_json(payload), PAIR, LAYOUT, DISKS)


@pytest.mark.parametrize("keep", [0, 10, 24, 60])
def test_a_peer_that_leaves_in_the_handshake_is_lost(keep: int) -> None:
    with pytest.raises(exception.PeerLost):
        over_a_socket(lambda sock: sock.sendall(protocol.hello(PAIR, LAYOUT, DISKS)[:keep]))


def test_a_peer_that_says_nothing_is_lost() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.05)
    with ours, theirs, pytest.raises(exception.PeerLost):
        read_frame(ours)


@pytest.mark.parametrize(
    "header",
    [Header(Type.PRELUDE, 200 << 20), Header(Type.COMMIT, 1 << 20), Header(Type.HELLO, 1 << 20)],
    ids=str,
)
def test_a_huge_frame_in_the_handshake_is_refused_before_memory_is_found_for_it(
    header: Header,
) -> None:
    with pytest.raises(exception.ProtocolMismatch):
        over_a_socket(lambda sock: sock.sendall(header.pack()))
