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

"""QEMU's migration stream, as much of it as we must read and write.

Read once, from the prelude: the configuration section and the contents of the
RAM blocks that are not tracked (ROMs). Written once, at activation: a stream that
has these, the pages of tracked blocks other than main memory, and the device state.

Format (QEMU ``migration/savevm.c``, ``migration/ram.c``; unchanged from 2.x to 10.x in what
is used here), all big endian::

    "QEVM" be32 3
    07 be32 length, machine name          configuration section
    05 u8+name be32 version ...           subsection of the configuration
    08 be16 command be16 length data
    01 be32 id u8+name be32 instance be32 version data     section start
    02 be32 id data                       section part
    03 be32 id data                       section end
    04 as 01                              full section
    7e be32 id                            footer of a section
    06 be32 length JSON                   description
    00                                    end

RAM data is a list of be64, whose low 12 bits are flags: MEM_SIZE (the rest is the sum of
all block lengths; then per block u8+name, be64 length and, with x-ignore-shared, be64
address), ZERO (+1 byte), PAGE (+4096 bytes), EOS, CONTINUE (same block: no name follows).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from nova_pmt import exception
from nova_pmt.guest.layout import PAGE_SIZE

MAGIC = b"QEVM\0\0\0\3"
EOF, START, PART, END, FULL, SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND, FOOTER = (
    0x00,
    0x01,
    0x02,
    0x03,
    0x04,
    0x05,
    0x06,
    0x07,
    0x08,
    0x7E,
)
ZERO, MEM_SIZE, PAGE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
FLAGS = PAGE_SIZE - 1
RAM_SECTION, RAM_VERSION = 2, 4
MAX_NAME, MAX_CONFIGURATION, MAX_BLOCKS = 255, 4096, 4096
_ZERO_PAGE = bytes(PAGE_SIZE)


@dataclass
class Prelude:
    """What the standby needs to know once.

    :param configuration: data of the configuration section: the machine's name.
    :param blocks: every RAM block, name to length in bytes, in QEMU's order.
    :param contents: block to offset to page for the blocks that are not skipped;
        a page of None is all zeros.
    """

    configuration: bytes = b""
    blocks: dict[str, int] = field(default_factory=dict)
    contents: dict[str, dict[int, bytes | None]] = field(default_factory=dict)


class PreludeReader:
    """Reads the stream of an outgoing migration as far as the prelude needs it.

    :param stream: a buffered binary stream.
    :param skip: RAM blocks whose pages are of no interest (the tracked ones).
    :param on_complete: called once, when every page of all other blocks was seen.
    """

    def __init__(
        self, stream: BinaryIO, skip: frozenset[str], on_complete: Callable[[], None]
    ) -> None:
        self._stream = stream
        self._skip = skip
        self._on_complete = on_complete
        self._missing = -1
        self._block = ""
        self.prelude = Prelude()

    def _bytes(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def _number(self, width: str) -> int:
        return int(struct.unpack(">" + width, self._bytes(struct.calcsize(">" + width)))[0])

    def _name(self) -> str:
        return self._bytes(self._number("B")).decode("ascii", "replace")

    def read(self) -> None:
        """Read until the stream ends (QEMU closes it when the migration is cancelled).

        :raises nova_pmt.exception.VmstateError: it has a part that we do not know.
        """
        try:
            if self._bytes(8) != MAGIC:
                raise exception.VmstateError("this is not a QEMU migration stream, version 3")
            while self._part(self._number("B")):
                pass
        except EOFError:
            return

    def _part(self, kind: int) -> bool:
        if kind == CONFIGURATION:
            length = self._number("I")
            if length > MAX_CONFIGURATION:
                raise exception.VmstateError(f"configuration section of {length} bytes")
            self.prelude.configuration = self._bytes(length)
        elif kind == SUBSECTION:
            self._subsection()
        elif kind == COMMAND:
            self._number("H")
            self._bytes(self._number("H"))
        elif kind == FOOTER:
            self._number("I")
        elif kind in (START, PART, END):
            self._number("I")
            if kind == START:
                name = self._name()
                self._number("I")
                self._number("I")
                if name != "ram":
                    # Other iterable sections (block migration, VFIO) do not say how long they are.
                    raise exception.VmstateError(f"migration stream has a section '{name}'")
            self._ram()
        elif kind == FULL:
            return False  # device state: we cancel before it is complete
        elif kind != EOF:
            raise exception.VmstateError(f"migration stream has a part of type {kind:#x}")
        return kind != EOF

    def _subsection(self) -> None:
        name = self._name()
        self._number("I")
        if name.endswith("capabilities"):
            for _ in range(self._number("I")):
                self._name()
        elif name.endswith("target-page-bits"):
            self._number("I")
        elif name.endswith("uuid"):
            self._bytes(16)
        else:
            raise exception.VmstateError(f"configuration has a subsection '{name}'")

    def _ram(self) -> None:
        while True:
            header = self._number("Q")
            offset, flags = header & ~FLAGS, header & FLAGS
            if flags & EOS:
                return
            if flags & MEM_SIZE:
                self._mem_size(offset)
                continue
            if flags & ~(ZERO | PAGE | CONTINUE) or not flags & (ZERO | PAGE):
                raise exception.VmstateError(f"RAM record with flags {flags:#x}")
            if not flags & CONTINUE:
                self._block = self._name()
            page = self._bytes(PAGE_SIZE) if flags & PAGE else None
            if flags & ZERO:
                self._number("B")
            self._take(offset, page)

    def _mem_size(self, total: int) -> None:
        """The list of blocks. Whether addresses follow depends on a capability: we set it."""
        blocks = self.prelude.blocks
        while total > 0:
            name, length = self._name(), self._number("Q")
            self._number("Q")
            if length == 0 or length > total or len(blocks) >= MAX_BLOCKS:
                raise exception.VmstateError(f"RAM block '{name}' of {length} bytes")
            blocks[name] = length
            total -= length
        wanted = {name: size for name, size in blocks.items() if name not in self._skip}
        self.prelude.contents = {name: {} for name in wanted}
        self._missing = sum(-(-size // PAGE_SIZE) for size in wanted.values())
        self._completed()

    def _take(self, offset: int, page: bytes | None) -> None:
        contents = self.prelude.contents.get(self._block)
        if contents is None:
            return
        if offset not in contents:
            self._missing -= 1
            contents[offset] = page
            self._completed()
        else:
            contents[offset] = page

    def _completed(self) -> None:
        if self._missing == 0:
            self._on_complete()


def _block_name(name: str) -> bytes:
    encoded = name.encode()
    if not 0 < len(encoded) <= MAX_NAME:
        raise exception.VmstateError(f"RAM block name of {len(encoded)} bytes")
    return bytes([len(encoded)]) + encoded


def _pages(name: str, pages: Iterable[tuple[int, bytes | None]]) -> list[bytes]:
    out, prefix = [], _block_name(name)
    for offset, page in pages:
        flag = PAGE if page else ZERO
        out += [struct.pack(">Q", offset | flag), prefix, page or b"\0"]
    return out


def activation_head(prelude: Prelude) -> bytes:
    """The first part of the activation stream: it can be made long before the failover."""
    out = [MAGIC, bytes([CONFIGURATION]), struct.pack(">I", len(prelude.configuration))]
    out += [prelude.configuration, bytes([START]), struct.pack(">I", RAM_SECTION), b"\x03ram"]
    out += [struct.pack(">II", 0, RAM_VERSION)]
    out += [struct.pack(">Q", sum(prelude.blocks.values()) | MEM_SIZE)]
    for name, length in prelude.blocks.items():
        out += [_block_name(name), struct.pack(">Q", length)]
    out += [struct.pack(">QBI", EOS, FOOTER, RAM_SECTION), struct.pack(">BI", END, RAM_SECTION)]
    for name, pages in prelude.contents.items():
        out += _pages(name, sorted(pages.items()))
    return b"".join(out)


def activation_tail(side_blocks: Mapping[str, bytes | bytearray], device_state: bytes) -> bytes:
    """The rest of the activation stream.

    :param side_blocks: contents of tracked blocks other than main memory.
    :param device_state: what ``xen-save-devices-state`` wrote.
    :raises nova_pmt.exception.VmstateError: the device state is not what QEMU writes.
    """
    check_device_state(device_state)
    out: list[bytes] = []
    for name, data in side_blocks.items():
        view = memoryview(data)
        pages = (
            (at, None if page == _ZERO_PAGE else page)
            for at in range(0, len(data), PAGE_SIZE)
            for page in (bytes(view[at : at + PAGE_SIZE]),)
        )
        out += _pages(name, pages)
    out += [struct.pack(">QBI", EOS, FOOTER, RAM_SECTION), device_state[len(MAGIC) :]]
    out += [bytes([DESCRIPTION]), struct.pack(">I", 2), b"{}"]
    return b"".join(out)


def check_device_state(device_state: bytes) -> None:
    """See that this is a device state as ``xen-save-devices-state`` writes it.

    :raises nova_pmt.exception.VmstateError: it is not, or it was cut short.
    """
    if device_state[: len(MAGIC)] != MAGIC:
        raise exception.VmstateError("device state does not start with QEMU's magic")
    if len(device_state) <= len(MAGIC) + 1 or device_state[len(MAGIC)] not in (FULL, START):
        raise exception.VmstateError("device state has no section")
    if device_state[-1] != EOF:
        raise exception.VmstateError("device state was cut short")
