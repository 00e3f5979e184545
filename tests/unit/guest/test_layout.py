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

"""Which RAM a guest has, from what QEMU's monitors say about it."""

from __future__ import annotations

from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.guest.layout import PAGE_SIZE, Layout, TrackedBlock, discover, mapped_ranges
from nova_pmt.guest.monitor import Monitor

MIB = 1 << 20

#: As QEMU 7.2 prints it, without the last columns (address in the host, read-only).
RAMBLOCK = """\
 Block Name    PSize              Offset               Used              Total
 pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
 vga.vram    4 KiB  0x0000000008080000 0x0000000001000000 0x0000000001000000
 /rom@etc/acpi/tables    4 KiB  0x0000000009040000 0x0000000000020000 0x0000000000200000
 pc.bios    4 KiB  0x0000000008040000 0x0000000000040000 0x0000000000040000
 0000:00:02.0/virtio.rom    4 KiB  0x0000000009240000 0x0000000000040000 0x0000000000040000
"""
MTREE = """\
FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000affff (prio 1, ram): vga.vram KVM
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 KVM
  0000000000100000-0000000007ffffff (prio 0, ram): pc.ram @0000000000100000 KVM
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram KVM
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios KVM
"""


class Qemu(Monitor):
    """Answers as far as the layout asks."""

    def __init__(
        self, ramblock: str, mtree: str, memdevs: list[str], hva: dict[int, int] | None = None
    ) -> None:
        self._texts = {"info ramblock": ramblock, "info mtree -f": mtree}
        self._memdevs = memdevs
        self._hva = hva

    def execute(self, command: str, **arguments: Any) -> Any:
        if command == "query-memdev":
            return [{"id": name, "size": 1} if name else {"size": 1} for name in self._memdevs]
        assert command == "human-monitor-command"
        line = arguments["command-line"]
        if line.startswith("gpa2hva "):
            address = int(line.split()[1], 16)
            if self._hva is None:
                return f"No memory is mapped at address {address:#x}\r\n"
            return f"Host virtual address for {address:#x} (pc.ram) is {self._hva[address]:#x}\r\n"
        return self._texts[line]

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        raise NotImplementedError

    def saw_event(self, name: str) -> bool:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


HVA = {0: 0x7F1230000000, 0xA0000: 0x7F1220000000}


def test_main_memory_comes_first_and_video_memory_after_it() -> None:
    layout = discover(Qemu(RAMBLOCK, MTREE, ["pc.ram"], HVA))
    assert layout.blocks == (
        TrackedBlock("pc.ram", 128 * MIB, 0x7F1230000000, 0, True),
        TrackedBlock("vga.vram", 16 * MIB, 0x7F1220000000, 32768, False),
    )
    assert layout.page_count == 36864
    assert layout.memory_bytes == 128 * MIB
    assert layout.main_blocks == layout.blocks[:1]


def test_an_address_is_told_from_where_in_its_block_it_lies() -> None:
    ramblock = RAMBLOCK.splitlines()
    mtree = "  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @0000000002000000 KVM\n"
    layout = discover(Qemu("\n".join(ramblock[:2]), mtree, ["pc.ram"], {1 << 32: 0x7F0002000000}))
    assert layout.blocks[0].address == 0x7F0000000000


def test_numa_cells_are_in_the_order_of_guest_addresses() -> None:
    ramblock = """\
 Block Name    PSize  Offset  Used  Total  HVA RO
 ram-node1    2 MiB  0x0000000004000000 0x0000000004000000 0x0000000004000000 0x00007f00 rw
 ram-node0    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f00 rw
"""
    mtree = """\
  0000000000000000-0000000003ffffff (prio 0, ram): ram-node0
  0000000004000000-0000000007ffffff (prio 0, ram): ram-node1
"""
    hva = {0: 0x7F0010000000, 0x4000000: 0x7F0020000000}
    layout = discover(Qemu(ramblock, mtree, ["ram-node1", "ram-node0"], hva))
    assert [(b.name, b.first_page, b.address) for b in layout.blocks] == [
        ("ram-node0", 0, 0x7F0010000000),
        ("ram-node1", 16384, 0x7F0020000000),
    ]


def test_a_block_that_ends_within_a_page_is_tracked_as_far_as_whole_pages_go() -> None:
    ramblock = " x.ram    4 KiB  0x0 0x0000000000002100 0x0000000000003000 0x00007f00 rw\n"
    mtree = "  0000000000000000-0000000000001fff (prio 0, ram): x.ram\n"
    assert discover(Qemu(ramblock, mtree, ["x.ram"], {0: 4096})).blocks[0].pages == 2


@pytest.mark.parametrize(
    ("ramblock", "mtree", "memdevs", "kind", "names"),
    [
        ("", MTREE, ["pc.ram"], exception.UnsupportedQemu, "no RAM block"),
        (RAMBLOCK, "", ["pc.ram"], exception.UnsupportedMemory, "'pc.ram' is not mapped"),
        (RAMBLOCK, MTREE, ["mem0"], exception.UnsupportedMemory, "'mem0' is not mapped"),
        (RAMBLOCK, MTREE, [""], exception.UnsupportedMemory, "'' is not mapped"),
        (RAMBLOCK, MTREE, [], exception.UnsupportedMemory, "no memory backend"),
        (
            RAMBLOCK.replace("pc.ram    4 KiB", "pc.ram    1 GiB"),
            MTREE,
            ["pc.ram"],
            exception.UnsupportedMemory,
            "1 GiB pages",
        ),
    ],
)
def test_what_cannot_be_tracked_is_refused(
    ramblock: str, mtree: str, memdevs: list[str], kind: type[Exception], names: str
) -> None:
    with pytest.raises(kind, match=names):
        discover(Qemu(ramblock, mtree, memdevs, HVA))


def test_an_address_that_qemu_does_not_know_is_refused() -> None:
    with pytest.raises(exception.UnsupportedQemu, match="gpa2hva"):
        discover(Qemu(RAMBLOCK, MTREE, ["pc.ram"]))


def test_only_writable_ram_counts_as_mapped() -> None:
    assert mapped_ranges(MTREE) == {"pc.ram": (0, 0), "vga.vram": (0xA0000, 0)}


def test_blocks_survive_the_handshake_without_their_address() -> None:
    block = TrackedBlock("pc.ram", 8 * PAGE_SIZE, 0x1000, 3, True)
    back = TrackedBlock.from_dict(block.to_dict())
    assert back == TrackedBlock("pc.ram", 8 * PAGE_SIZE, 0, 3, True)
    assert Layout((back,)).page_count == 8
