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

"""QEMU's migration stream: read as far as the prelude needs it, written as activation needs it.

Streams are built here by the documented format, not by the code under test.
"""

from __future__ import annotations

import contextlib
import io
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.guest import vmstate
from nova_pmt.guest.vmstate import Prelude, PreludeReader

PAGE = 4096
MAGIC = b"QEVM" + struct.pack(">I", 3)
RAM_ID = 2


def named(name: str) -> bytes:
    return struct.pack("B", len(name)) + name.encode()


def configuration(data: bytes = b"\0\0\0\x10pc-q35-7.2-test!") -> bytes:
    return b"\x07" + struct.pack(">I", len(data)) + data


def subsection(name: str, data: bytes) -> bytes:
    return b"\x05" + named(name) + struct.pack(">I", 1) + data


def ram_start(blocks: dict[str, int]) -> bytes:
    """Section start of ``ram`` with the list of blocks, as with x-ignore-shared."""
    out = b"\x01" + struct.pack(">I", RAM_ID) + named("ram") + struct.pack(">II", 0, 4)
    out += struct.pack(">Q", sum(blocks.values()) | 0x04)
    for name, length in blocks.items():
        out += named(name) + struct.pack(">QQ", length, 0xC0000)
    return out + struct.pack(">Q", 0x10) + footer()


def footer(section: int = RAM_ID) -> bytes:
    return b"\x7e" + struct.pack(">I", section)


def page(offset: int, data: bytes | None, name: str | None, *, data_flag: int = 0x08) -> bytes:
    """One page; ``name`` None: of the same block as the one before."""
    flags = (data_flag if data else 0x02) | (0x20 if name is None else 0)
    out = struct.pack(">Q", offset | flags) + (named(name) if name is not None else b"")
    return out + (data or b"\0")


def ram_part(*pages: bytes, kind: int = 0x02) -> bytes:
    return (
        bytes([kind]) + struct.pack(">I", RAM_ID) + b"".join(pages) + struct.pack(">Q", 0x10)
    ) + footer()


ROM = bytes(range(256)) * 16
FULL_SECTION = b"\x04" + struct.pack(">I", 9) + named("timer") + struct.pack(">II", 0, 2) + b"\x07"
BLOCKS = {"pc.ram": 4 * PAGE, "pc.bios": 2 * PAGE, "rom@etc": 2 * PAGE}


def stream() -> bytes:
    """A prelude as QEMU 7.2 sends it: two iterations, then device state."""
    return b"".join(
        [
            MAGIC,
            configuration(),
            subsection("configuration/target-page-bits", struct.pack(">I", 12)),
            subsection("configuration/capabilities", struct.pack(">I", 1) + named("events")),
            subsection("configuration/uuid", bytes(16)),
            b"\x08" + struct.pack(">HH", 1, 4) + b"open",
            ram_start(BLOCKS),
            ram_part(
                page(0, ROM, "pc.ram"),
                page(PAGE, None, None),
                page(0, ROM, "pc.bios"),
                page(PAGE, None, None),
            ),
            ram_part(page(0, None, "rom@etc"), page(PAGE, ROM[::-1], None)),
            ram_part(page(2 * PAGE, ROM, "pc.ram"), kind=0x03),
            FULL_SECTION,
        ]
    )


class Reading:
    """A stream that was read; how far it was when the prelude was complete."""

    def __init__(self, data: bytes, skip: tuple[str, ...] = ("pc.ram",)) -> None:
        self.source = io.BytesIO(data)
        self.completed: list[int] = []
        self.reader = PreludeReader(
            self.source, frozenset(skip), lambda: self.completed.append(self.source.tell())
        )
        self.reader.read()
        self.prelude = self.reader.prelude


# -- reading ----------------------------------------------------------------------------


def test_prelude_has_the_machine_all_blocks_and_the_contents_of_those_not_tracked() -> None:
    reading = Reading(stream())
    assert reading.prelude.configuration == b"\0\0\0\x10pc-q35-7.2-test!"
    assert reading.prelude.blocks == BLOCKS
    assert list(reading.prelude.blocks) == list(BLOCKS)
    assert reading.prelude.contents == {
        "pc.bios": {0: ROM, PAGE: None},
        "rom@etc": {0: None, PAGE: ROM[::-1]},
    }


def test_completion_is_told_once_with_the_last_page() -> None:
    reading = Reading(stream())
    assert len(reading.completed) == 1
    rest = stream()[reading.completed[0] :]
    assert rest.startswith(struct.pack(">Q", 0x10) + footer() + b"\x03")


def test_a_page_that_comes_again_replaces_the_one_before() -> None:
    data = MAGIC + ram_start({"pc.bios": PAGE})
    data += ram_part(page(0, ROM, "pc.bios")) + ram_part(page(0, ROM[::-1], "pc.bios"))
    reading = Reading(data)
    assert reading.prelude.contents == {"pc.bios": {0: ROM[::-1]}}
    assert len(reading.completed) == 1


def test_when_all_is_tracked_the_list_of_blocks_completes_it() -> None:
    reading = Reading(MAGIC + ram_start({"pc.ram": PAGE}))
    assert len(reading.completed) == 1
    assert reading.prelude.contents == {}


def test_the_end_of_the_stream_ends_the_reading() -> None:
    assert Reading(MAGIC + b"\x00").prelude == Prelude()
    assert Reading(MAGIC + FULL_SECTION + b"garbage").prelude == Prelude()


def test_a_stream_that_ends_anywhere_is_read_as_far_as_it_goes() -> None:
    """QEMU closes it when the migration is cancelled; or dies."""
    data = stream()
    whole = Reading(data)
    for at in [*range(0, 400), *range(400, len(data), 61), *range(len(data) - 60, len(data))]:
        reading = Reading(data[:at])
        assert bool(reading.completed) == (at >= whole.completed[0])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(stream())), st.integers(0, 255))
def test_a_stream_damaged_or_cut_anywhere_ends_with_a_typed_error_or_quietly(
    at: int, byte: int
) -> None:
    data = bytearray(stream()[:at] + bytes([byte]) + stream()[at + 1 :])
    for end in (at, at + 1, len(data)):
        with contextlib.suppress(exception.VmstateError):
            Reading(bytes(data[:end]))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_after_the_magic_never_crash_the_reader(data: bytes) -> None:
    with contextlib.suppress(exception.VmstateError):
        Reading(MAGIC + data)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"QEVM\0\0\0\2" + b"\0", "not a QEMU migration stream"),
        (b"HTTP/1.1", "not a QEMU migration stream"),
        (MAGIC + b"\x55", "type 0x55"),
        (MAGIC + b"\x07" + struct.pack(">I", 5000), "configuration section of 5000"),
        (MAGIC + subsection("configuration/unheard-of", b""), "unheard-of"),
        (
            MAGIC + b"\x01" + struct.pack(">I", 3) + named("block") + struct.pack(">II", 0, 1),
            "section 'block'",
        ),
        (MAGIC + ram_part(struct.pack(">Q", 0x40)), "flags 0x40"),
        (MAGIC + ram_part(struct.pack(">Q", 0x20)), "flags 0x20"),
        (MAGIC + ram_start({"a": 0, "b": PAGE}), "RAM block 'a'"),
        (
            MAGIC
            + b"\x02"
            + struct.pack(">IQ", RAM_ID, PAGE | 0x04)
            + named("big")
            + struct.pack(">QQ", 2 * PAGE, 0),
            "RAM block 'big'",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(data: bytes, names: str) -> None:
    with pytest.raises(exception.VmstateError, match=names):
        Reading(data)


# -- writing ----------------------------------------------------------------------------


class Stream:
    """Parses an activation stream by the documented format."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self.blocks: dict[str, int] = {}
        self.pages: dict[str, dict[int, bytes | None]] = {}
        assert self.take(8) == MAGIC
        assert self.take(1) == b"\x07"
        self.configuration = self.take(self.number("I"))
        assert self.take(1) == b"\x01"
        assert self.number("I") == RAM_ID
        assert self.name() == "ram"
        assert (self.number("I"), self.number("I")) == (0, 4)
        self.records()
        assert (self.take(1), self.number("I")) == (b"\x7e", RAM_ID)
        assert (self.take(1), self.number("I")) == (b"\x03", RAM_ID)
        self.records()
        assert (self.take(1), self.number("I")) == (b"\x7e", RAM_ID)
        self.devices = self._data[self._at :]

    def take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        assert len(data) == count
        self._at += count
        return data

    def number(self, width: str) -> int:
        size = struct.calcsize(">" + width)
        return int(struct.unpack(">" + width, self.take(size))[0])

    def name(self) -> str:
        return self.take(self.number("B")).decode()

    def records(self) -> None:
        while True:
            header = self.number("Q")
            offset, flags = header & ~0xFFF, header & 0xFFF
            if flags == 0x10:
                return
            if flags == 0x04:
                while offset > 0:
                    name = self.name()
                    self.blocks[name] = self.number("Q")
                    offset -= self.blocks[name]
                assert offset == 0
                continue
            name = self.name()
            assert flags in (0x02, 0x08)
            data = self.take(PAGE) if flags == 0x08 else None
            if data is None:
                assert self.take(1) == b"\0"
            self.pages.setdefault(name, {})[offset] = data


DEVICES = MAGIC + FULL_SECTION + b"\0"


def test_activation_stream_brings_back_all_but_main_memory() -> None:
    prelude = Reading(stream(), skip=("pc.ram", "vga.vram")).prelude
    prelude.blocks["vga.vram"] = 3 * PAGE
    video = bytearray(3 * PAGE)
    video[PAGE : 2 * PAGE] = ROM
    data = vmstate.activation_head(prelude) + vmstate.activation_tail({"vga.vram": video}, DEVICES)
    parsed = Stream(data)
    assert parsed.configuration == prelude.configuration
    assert parsed.blocks == {**BLOCKS, "vga.vram": 3 * PAGE}
    assert parsed.pages == {
        "pc.bios": {0: ROM, PAGE: None},
        "rom@etc": {0: None, PAGE: ROM[::-1]},
        "vga.vram": {0: None, PAGE: ROM, 2 * PAGE: None},
    }
    assert parsed.devices == DEVICES[8:] + b"\x06" + struct.pack(">I", 2) + b"{}"


PAGES_OF_BLOCK = st.dictionaries(
    st.integers(0, 6).map(lambda number: number * PAGE),
    st.one_of(st.none(), st.integers(0, 255).map(lambda byte: bytes([byte]) * PAGE)),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.0/@", min_size=1, max_size=20), PAGES_OF_BLOCK, min_size=1, max_size=4
    ),
    st.binary(min_size=4, max_size=200),
)
def test_activation_head_says_what_the_prelude_had(
    contents: dict[str, dict[int, Any]], configured: bytes
) -> None:
    blocks = {name: max(pages) + PAGE for name, pages in contents.items()}
    data = vmstate.activation_head(Prelude(configured, blocks, contents))
    parsed = Stream(data + vmstate.activation_tail({}, DEVICES))
    assert parsed.configuration == configured
    assert parsed.blocks == blocks
    assert parsed.pages == contents


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_a_block_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(exception.VmstateError, match="block name"):
        vmstate.activation_head(Prelude(b"", {name: PAGE}, {}))


# -- device state -----------------------------------------------------------------------


def test_a_whole_device_state_is_taken() -> None:
    vmstate.check_device_state(DEVICES)
    vmstate.check_device_state(MAGIC + b"\x01" + bytes(10))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC[:5],
        b"QEVM\0\0\0\4" + DEVICES[8:],
        MAGIC,
        MAGIC + b"\x04",
        MAGIC + b"\0",
        MAGIC + b"\x07" + bytes(20),
        DEVICES[:-1],
        DEVICES + b"\x01",
    ],
)
def test_what_is_no_device_state_is_refused_before_qemu_sees_it(data: bytes) -> None:
    with pytest.raises(exception.VmstateError, match="device state"):
        vmstate.check_device_state(data)
    with pytest.raises(exception.VmstateError):
        vmstate.activation_tail({}, data)
