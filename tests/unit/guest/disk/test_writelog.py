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

"""The write log: what was written comes out again, however the log is cut; garbage is an error."""

from __future__ import annotations

import contextlib
import functools
import random
import re
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.guest import nbd
from nova_pmt.guest.disk.writelog import Entry, Kind, LogParser, is_zero
from tests.unit.guest.test_nbd import image, needs_qemu, nodes, server

SECTOR = 512
DISK_SECTORS = 1 << 16


@dataclass(frozen=True)
class Request:
    """What a guest asked for; ``data`` of a write, ``zeros`` of a request to write zeros."""

    kind: Kind
    first: int = 0
    count: int = 0
    data: bytes = b""
    fua: bool = False

    def header(self, sector: int = SECTOR) -> bytes:
        flags = {Kind.WRITE: 2 * self.fua, Kind.DISCARD: 4, Kind.FLUSH: 1}[self.kind]
        return struct.pack("<QQQQ", self.first, self.count, flags, 0).ljust(sector, b"\0")


@st.composite
def requests(draw: st.DrawFn, sector: int = SECTOR) -> Request:
    kind = draw(st.sampled_from([Kind.WRITE, Kind.WRITE, Kind.DISCARD, Kind.FLUSH]))
    if kind is Kind.FLUSH:
        return Request(kind)
    count = draw(st.integers(1, 9))
    first = draw(st.integers(0, DISK_SECTORS - count))
    if kind is Kind.DISCARD:
        return Request(kind, first, count)
    seed = draw(st.none() | st.integers(0, 1 << 32))
    size = count * sector
    data = bytes(size) if seed is None else random.Random(seed).randbytes(size)
    return Request(kind, first, count, data, draw(st.booleans()))


def reference_log(wanted: list[Request], sector: int = SECTOR) -> bytes:
    """The log as ``block/blklogwrites.c`` writes it (without the super block)."""
    return b"".join(request.header(sector) + request.data for request in wanted)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """The data in pieces, the given sizes again and again."""
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)] if sizes else len(data)
        yield data[at : at + size]
        at += size
        turn += 1


def joined(entries: list[Entry]) -> list[tuple[Kind, int, int, bytes, bool]]:
    """Entries as requests again: parts that follow each other are one."""
    found: list[tuple[Kind, int, int, bytes, bool]] = []
    for entry in entries:
        data = b"" if entry.data is None else bytes(entry.data)
        assert entry.length == len(data) or entry.kind is not Kind.WRITE
        assert entry.zero == (entry.kind is Kind.WRITE and not any(data))
        found.append((entry.kind, entry.offset, entry.length, data, entry.fua))
    return found


def parse(log: bytes, sizes: list[int], sector: int = SECTOR) -> list[Entry]:
    parser = LogParser(DISK_SECTORS * sector, sector)
    entries: list[Entry] = []
    for piece in cut(log, sizes):
        entries += parser.feed(piece)
    parser.finish()
    return entries


# -- round trips ------------------------------------------------------------------------


@given(
    st.lists(requests(), max_size=12),
    st.lists(st.integers(1, 6000), max_size=5),
)
def test_any_log_in_any_pieces_is_read_as_it_was_written(
    wanted: list[Request], sizes: list[int]
) -> None:
    parts = joined(parse(reference_log(wanted), sizes))
    turn = iter(parts)
    for request in wanted:
        kind, offset, length, data, fua = next(turn)
        while kind is Kind.WRITE and length < request.count * SECTOR:
            _, following, more, rest, _ = next(turn)
            assert following == offset + length
            length, data = length + more, data + rest
        assert (kind, offset, data) == (request.kind, request.first * SECTOR, request.data)
        assert length == request.count * SECTOR
        assert fua == request.fua
    assert next(turn, None) is None


@pytest.mark.parametrize("sector", [32, 4096])
def test_sectors_may_have_other_sizes(sector: int) -> None:
    data = random.Random(1).randbytes(3 * sector)
    wanted = [Request(Kind.WRITE, 5, 3, data), Request(Kind.FLUSH), Request(Kind.DISCARD, 1, 2)]
    assert joined(parse(reference_log(wanted, sector), [], sector)) == [
        (Kind.WRITE, 5 * sector, 3 * sector, data, False),
        (Kind.FLUSH, 0, 0, b"", False),
        (Kind.DISCARD, sector, 2 * sector, b"", False),
    ]
    with pytest.raises(ValueError):
        LogParser(1 << 20, 500)


def test_data_are_views_of_what_was_fed() -> None:
    log = bytearray(reference_log([Request(Kind.WRITE, 1, 2, b"a" * 1024)]))
    (entry,) = LogParser(1 << 20).feed(log)
    assert entry.data is not None
    log[SECTOR] = ord("b")
    assert entry.data[0] == ord("b")


def test_a_boundary_is_where_no_request_is_half_read() -> None:
    log = reference_log([Request(Kind.WRITE, 0, 1, b"x" * 512), Request(Kind.FLUSH)])
    parser = LogParser(1 << 20)
    assert parser.at_boundary
    bounds = []
    for at in range(len(log)):
        parser.feed(log[at : at + 1])
        if parser.at_boundary:
            parser.finish()
            bounds.append(at + 1)
        else:
            with pytest.raises(exception.DiskLogError):
                parser.finish()
    assert bounds == [1024, 1536]
    assert parser.requests == 2


@given(st.integers(0, 200), st.integers(1, 255), st.integers(0, 199))
def test_zeros_are_told_from_all_else(length: int, value: int, at: int) -> None:
    data = bytearray(length)
    assert is_zero(memoryview(data))
    if at < length:
        data[at] = value
        assert not is_zero(memoryview(data))


# -- what is no log ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((0, 0, 0, 0), "no sectors"),
        ((5, 0, 0, 0), "no sectors"),
        ((0, 0, 4, 0), "no sectors"),
        ((0, 0, 2, 0), "no sectors"),
        ((0, 1, 1, 0), "flush of sectors"),
        ((7, 0, 1, 0), "flush of sectors"),
        ((0, 1, 8, 0), "flags 0x8"),
        ((0, 1, 3, 0), "flags 0x3"),
        ((0, 1, 16, 0), "flags 0x10"),
        ((0, 1, 0, 1), "header that is none"),
        ((DISK_SECTORS, 1, 0, 0), "but the disk has"),
        ((0, DISK_SECTORS + 1, 4, 0), "but the disk has"),
        ((1 << 63, 1 << 63, 0, 0), "but the disk has"),
        ((1, (1 << 64) - 1, 0, 0), "but the disk has"),
    ],
)
def test_a_header_that_is_none_is_refused(fields: tuple[int, ...], words: str) -> None:
    log = struct.pack("<QQQQ", *fields).ljust(SECTOR, b"\0")
    with pytest.raises(exception.DiskLogError, match=words) as refused:
        parse(log, [])
    assert "new synchronisation" in refused.value.cure


def test_the_rest_of_a_header_is_zeros() -> None:
    for at in (32, 300, 511):
        log = bytearray(Request(Kind.FLUSH).header())
        log[at] = 1
        with pytest.raises(exception.DiskLogError, match="header that is none"):
            parse(bytes(log), [])


def test_the_last_sector_counts_even_when_the_disk_ends_within_it() -> None:
    parser = LogParser(1000)
    assert parser.feed(reference_log([Request(Kind.WRITE, 1, 1, bytes(512))]))
    with pytest.raises(exception.DiskLogError):
        parser.feed(Request(Kind.DISCARD, 2, 1).header())


@settings(max_examples=300)
@given(
    st.lists(
        st.binary(max_size=1500)
        | requests().map(lambda request: reference_log([request]))
        | st.tuples(*[st.integers(0, 40) | st.integers(0, (1 << 64) - 1)] * 4).map(
            lambda fields: struct.pack("<QQQQ", *fields).ljust(512, b"\0")
        ),
        max_size=8,
    ),
    st.lists(st.integers(1, 3000), max_size=4),
)
def test_garbage_is_an_error_and_nothing_else(parts: list[bytes], sizes: list[int]) -> None:
    with contextlib.suppress(exception.DiskLogError):
        for entry in parse(b"".join(parts), sizes):
            assert 0 <= entry.offset <= entry.offset + entry.length <= DISK_SECTORS * SECTOR


def test_a_huge_request_takes_no_memory() -> None:
    huge = 1 << 40
    parser = LogParser(huge)
    piece = bytes(1 << 20)
    tracemalloc.start()
    try:
        assert parser.feed(struct.pack("<QQQQ", 0, huge // 512, 0, 0).ljust(512, b"\0")) == []
        for turn in range(100):
            (entry,) = parser.feed(piece)
            assert (entry.offset, entry.length, entry.zero) == (turn << 20, 1 << 20, True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10
    assert not parser.at_boundary


# -- QEMUs that log requests to write zeros wrongly ---------------------------------------


@st.composite
def faulty_segments(draw: st.DrawFn) -> tuple[bytes, bool]:
    """A segment as QEMU 6.2 may write it, and whether it differs from what it should be.

    A request to write zeros takes the sectors of its data only when its header was written; what
    other requests log meanwhile comes first.
    """
    log: list[bytes] = []
    owed: list[int] = []  # sectors of zeros that are still to come, of requests under way
    faulty = False
    for request in draw(st.lists(requests(), max_size=10)):
        for _ in range(draw(st.integers(0, len(owed)))):
            log.append(bytes(owed.pop(draw(st.integers(0, len(owed) - 1))) * SECTOR))
        faulty |= bool(owed)
        log.append(request.header())
        if request.data and is_zero(memoryview(request.data)):
            owed.append(request.count)
        else:
            log.append(request.data)
    log += [bytes(count * SECTOR) for count in owed]
    return b"".join(log), faulty


@settings(max_examples=400)
@given(faulty_segments(), st.lists(st.integers(1, 5000), max_size=3))
def test_a_segment_of_a_faulty_qemu_never_ends_well(
    segment: tuple[bytes, bool], sizes: list[int]
) -> None:
    log, faulty = segment
    if faulty:
        with pytest.raises(exception.DiskLogError):
            parse(log, sizes)
    else:
        parse(log, sizes)


@functools.cache
def repaired() -> bool:
    """Whether this machine's QEMU has commit a9c8ea95470c (in 7.2.9, 8.1.5, 8.2.1, 9.0)."""
    text = subprocess.run(["qemu-img", "--version"], check=True, capture_output=True).stdout
    found = re.search(rb"version (\d+)\.(\d+)\.(\d+)", text)
    assert found
    version = tuple(map(int, found.groups()))
    since = {(7, 2): 9, (8, 1): 5, (8, 2): 1}
    return version[0] >= 9 or version[2] >= since.get(version[:2], 1 << 30)


# -- the real thing ---------------------------------------------------------------------


def logging(disk: Path, kind: str, log: Path) -> list[dict[str, object]]:
    """Block nodes of an image with a log of its writes."""
    blocks = nodes(disk, kind)
    blocks[1]["node-name"] = "below"
    cache = {"no-flush": True}  # or each request waits for the log to be on the disk
    blocks.append({"driver": "file", "node-name": "log", "filename": str(log), "cache": cache})
    blocks.append(
        {
            "driver": "blklogwrites",
            "node-name": "disk",
            "file": "below",
            "log": "log",
            "log-sector-size": SECTOR,
            "log-super-update-interval": 1,
            "discard": "unmap",
        }
    )
    return blocks


def replay(log: bytes, sizes: list[int], disk: bytearray) -> dict[Kind, int]:
    """Apply a log; discards read as zeros (in a raw file they do)."""
    parser = LogParser(len(disk))
    seen = dict.fromkeys(Kind, 0)
    for piece in cut(log, sizes):
        for entry in parser.feed(piece):
            seen[entry.kind] += 1
            data = bytes(entry.length) if entry.data is None else entry.data
            disk[entry.offset : entry.offset + entry.length] = data
    parser.finish()
    return seen


@needs_qemu
@pytest.mark.parametrize("seed", range(3))
def test_a_real_log_replayed_makes_the_same_disk(tmp_path: Path, seed: int) -> None:
    """Writes, zeros, discards and flushes, many at a time; those of one batch do not overlap."""
    chance = random.Random(seed)
    size = 16 << 20
    disk, log = image(tmp_path / "disk", "raw", size), tmp_path / "log"
    initial = chance.randbytes(size)
    disk.write_bytes(initial)
    log.touch()
    with server(tmp_path, logging(disk, "raw", log)) as path, nbd.Export(path, "vda") as export:
        for _ in range(20):
            changes = []
            for at in sorted(chance.sample(range(size // 65536), 60)):
                offset = at * 65536 + 512 * chance.randrange(16)
                length = 512 * chance.randint(1, 100)
                # Zeroing beside other requests is what old QEMUs log wrongly.
                kind = chance.choice("wwwd" + ("zzZ" if repaired() else ""))
                if kind == "d":
                    changes.append(nbd.trim(offset, length))
                elif kind == "w":
                    changes.append(nbd.write(offset, chance.randbytes(length)))
                else:
                    changes.append(nbd.zero(offset, length, punch=kind == "z"))
            chance.shuffle(changes)
            export.write_many(changes)
            if chance.random() < 0.7:
                export.flush()
    written = log.read_bytes()
    magic, version, requests_logged, sector = struct.unpack_from("<QQQI", written)
    assert (magic, version, sector) == (0x6A736677736872, 1, SECTOR)
    copy = bytearray(initial)
    seen = replay(written[SECTOR:], [chance.randint(1, 200_000) for _ in range(20)], copy)
    assert copy == disk.read_bytes()
    assert all(seen.values())
    parser = LogParser(size)
    parser.feed(written[SECTOR:])
    assert parser.requests == requests_logged


@needs_qemu
@pytest.mark.skipif(not shutil.which("qemu-io") or not repaired(), reason="logs zeros wrongly")
def test_zeros_written_beside_other_requests_are_where_they_belong(tmp_path: Path) -> None:
    """The circumstances of the fault: a QEMU that has the repair logs them right."""
    size = 64 << 20
    disk, log = image(tmp_path / "disk", "raw", size), tmp_path / "log"
    copy = bytearray(size)
    for turn in range(5):
        log.write_bytes(b"")
        commands = []
        for number in range(64):
            what = ("-z", "-P 7", "-z -u")[number % 3]
            commands += ["-c", f"aio_write {what} {number}M {4 << (turn + number % 3)}k"]
        node = (
            f"driver=blklogwrites,file.driver=raw,file.file.driver=file,file.file.filename={disk}"
        )
        node += f",log.driver=file,log.filename={log},log.cache.no-flush=on"
        subprocess.run(
            ["qemu-io", *commands, "-c", "aio_flush", "--image-opts", node],
            check=True,
            capture_output=True,
        )
        replay(log.read_bytes()[SECTOR:], [], copy)
        assert copy == disk.read_bytes()
