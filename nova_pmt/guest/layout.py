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

"""Which RAM a guest has: QEMU's RAM blocks, where they lie in QEMU, how pages are numbered.

Pages of all tracked blocks share one numbering: a block's pages follow those of
the block before it, main memory first. The numbering is agreed in the handshake,
so both sides mean the same page by the same number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nova_pmt import exception
from nova_pmt.guest.monitor import Monitor

PAGE_SIZE = 4096

#: `` 0000000000000000-00000000bfffffff (prio 0, ram): pc.ram @00000000c0000000 KVM``
_FLAT_RANGE = re.compile(
    r"^\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (ram|rom|romd|nv-ram|ramd)\): "
    r"(\S+)(?: @([0-9a-f]{16}))?"
)
_RAM_BLOCK = re.compile(
    r"^\s*(?P<name>\S+)\s+(?P<psize>\d+) (?P<unit>[KMG])iB\s+0x[0-9a-f]+ "
    r"0x(?P<used>[0-9a-f]+) 0x(?P<total>[0-9a-f]+)"
)
_HVA = re.compile(r"is (0x[0-9a-f]+)")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class RamBlock:
    """One RAM block of QEMU.

    :param name: QEMU's name of it (``pc.ram``, ``ram-node0``, ``vga.vram``).
    :param length: bytes in use.
    :param page_size: bytes of the host pages behind it.
    """

    name: str
    length: int
    page_size: int


@dataclass(frozen=True)
class TrackedBlock:
    """A RAM block that changes while the guest runs, and so is in every checkpoint.

    :param name: QEMU's name of the block.
    :param length: bytes; a multiple of 4096.
    :param address: where it is mapped in QEMU; 0 where that is not known (standby).
    :param first_page: number of its first page.
    :param main: True for main memory, which is a file on the standby; False for
        others, such as video RAM, which the standby keeps aside until it activates.
    """

    name: str
    length: int
    address: int
    first_page: int
    main: bool

    @property
    def pages(self) -> int:
        return self.length // PAGE_SIZE

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "length": self.length,
            "first_page": self.first_page,
            "main": self.main,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrackedBlock:
        return cls(
            str(data["name"]), int(data["length"]), 0, int(data["first_page"]), bool(data["main"])
        )


@dataclass(frozen=True)
class Layout:
    """All tracked blocks of a guest."""

    blocks: tuple[TrackedBlock, ...]

    @property
    def page_count(self) -> int:
        return sum(block.pages for block in self.blocks)

    @property
    def main_blocks(self) -> tuple[TrackedBlock, ...]:
        return tuple(block for block in self.blocks if block.main)

    @property
    def memory_bytes(self) -> int:
        """Main memory, in bytes."""
        return sum(block.length for block in self.main_blocks)


def ram_blocks(monitor: Monitor) -> list[RamBlock]:
    """All RAM blocks, from HMP ``info ramblock``."""
    found = []
    for line in monitor.human("info ramblock").splitlines():
        match = _RAM_BLOCK.match(line)
        if match:
            size = int(match["psize"]) * _UNITS[match["unit"]]
            found.append(RamBlock(match["name"], int(match["used"], 16), size))
    if not found:
        raise exception.UnsupportedQemu("HMP 'info ramblock' lists no RAM block")
    return found


def mapped_ranges(text: str) -> dict[str, tuple[int, int]]:
    """Block name to (guest physical address, offset in the block) of one place where it is mapped.

    :param text: output of HMP ``info mtree -f``. Only writable RAM counts.
    """
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        match = _FLAT_RANGE.match(line)
        if match and match[3] == "ram":
            found.setdefault(match[4], (int(match[1], 16), int(match[5] or "0", 16)))
    return found


def _host_address(monitor: Monitor, guest_address: int) -> int:
    text = monitor.human(f"gpa2hva {guest_address:#x}")
    match = _HVA.search(text)
    if not match:
        raise exception.UnsupportedQemu(
            f"HMP 'gpa2hva {guest_address:#x}' gave no address: {text.strip()}"
        )
    return int(match[1], 16)


def discover(monitor: Monitor) -> Layout:
    """Find the tracked blocks of a running guest.

    Main memory is what QMP ``query-memdev`` lists; the RAM block of a memory
    backend bears its id (``pc.ram``, or ``ram-node0`` behind libvirt's NUMA cells).

    :raises nova_pmt.exception.UnsupportedMemory: a backend has 1 GiB pages or is
        not mapped as guest memory.
    """
    blocks = {block.name: block for block in ram_blocks(monitor)}
    places = mapped_ranges(monitor.human("info mtree -f"))
    backends = [str(entry.get("id", "")) for entry in monitor.execute("query-memdev")]
    main = []
    for backend in backends:
        names = [name for name in (backend, f"/objects/{backend}") if name in blocks]
        if not names or names[0] not in places:
            raise exception.UnsupportedMemory(
                f"memory backend '{backend}' is not mapped as guest memory"
            )
        main.append(names[0])
    if not main:
        raise exception.UnsupportedMemory("QEMU lists no memory backend ('query-memdev' is empty)")
    main.sort(key=lambda name: places[name][0])
    others: dict[str, tuple[int, int]] = {}
    for region, place in places.items():
        # A device's block is named after its region, behind the device's path.
        names = [name for name in blocks if name == region or name.endswith("/" + region)]
        if len(names) == 1 and names[0] not in main:
            others[names[0]] = place
    places.update(others)
    tracked: list[TrackedBlock] = []
    first = 0
    for name in main + sorted(others):
        block = blocks[name]
        if block.page_size >= 1 << 30:
            raise exception.UnsupportedMemory(f"RAM block '{name}' is backed by 1 GiB pages")
        guest_address, offset = places[name]
        address = _host_address(monitor, guest_address) - offset
        length = block.length & ~(PAGE_SIZE - 1)
        tracked.append(TrackedBlock(name, length, address, first, name in main))
        first += length // PAGE_SIZE
    return Layout(tuple(tracked))
