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

"""The memory of a standby: files that its QEMU has mapped, and blocks that are kept aside."""

from __future__ import annotations

import mmap
import os
import re
from types import TracebackType

import numpy as np

from nova_pmt import exception
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages
from nova_pmt.guest import process
from nova_pmt.guest.layout import Layout, TrackedBlock

#: libvirt's file name for a memory backend of a domain: ``pc.ram``, ``ram-node0``.
_FILE = re.compile(r"/([^/]+?)(?: \(deleted\))?$")


class StandbyImage:
    """Main memory of a waiting QEMU, writable, and copies of its other tracked blocks.

    Implements :class:`nova_pmt.replication.receiver.Image`. Written only by whole,
    committed checkpoints (and by checkpoint 1, which nothing depends on before it is).

    :raises nova_pmt.exception.UnsupportedMemory: a block is not one shared mapping.
    """

    def __init__(self, layout: Layout, pid: int) -> None:
        self.page_count = layout.page_count
        self._maps: list[mmap.mmap] = []
        self._views: list[Pages] = []
        self.side: dict[str, bytearray] = {}
        try:
            for block in layout.blocks:
                self._views.append(self._main(block, pid) if block.main else self._aside(block))
        except BaseException:
            self.close()
            raise
        self._ends: PageNumbers = np.array(
            [block.first_page + block.pages for block in layout.blocks], np.int64
        )
        self._firsts = [block.first_page for block in layout.blocks]

    def _main(self, block: TrackedBlock, pid: int) -> Pages:
        candidates = [
            mapping
            for mapping in process.mappings(pid)
            if mapping.shared
            and mapping.inode
            and mapping.end - mapping.start == block.length
            and (match := _FILE.search(mapping.path))
            and match[1].endswith(block.name.rsplit("/", 1)[-1])
        ]
        if len(candidates) != 1:
            raise exception.UnsupportedMemory(
                f"{len(candidates)} mappings of the standby's QEMU look like block '{block.name}'"
            )
        mapping = candidates[0]
        fd = os.open(f"/proc/{pid}/map_files/{mapping.link}", os.O_RDWR | os.O_CLOEXEC)
        try:
            shared = mmap.mmap(fd, block.length, offset=mapping.offset)
        finally:
            os.close(fd)
        self._maps.append(shared)
        return np.frombuffer(shared, np.uint8).reshape(-1, PAGE_SIZE)

    def _aside(self, block: TrackedBlock) -> Pages:
        data = bytearray(block.length)
        self.side[block.name] = data
        return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)

    def write(self, numbers: PageNumbers, data: Pages) -> None:
        """Put pages in place."""
        if len(self._views) == 1:
            self._views[0][numbers] = data
            return
        owners = np.searchsorted(self._ends, numbers, side="right")
        for index, view in enumerate(self._views):
            mine = owners == index
            if mine.any():
                view[numbers[mine] - self._firsts[index]] = data[mine]

    def read(self, numbers: PageNumbers, out: Pages) -> None:
        """Copy pages, as they are, into ``out``."""
        owners = np.searchsorted(self._ends, numbers, side="right")
        for index, view in enumerate(self._views):
            mine = owners == index
            if mine.any():
                out[mine] = view[numbers[mine] - self._firsts[index]]

    def close(self) -> None:
        """Let go of the memory; it is QEMU's alone then."""
        self._views = []
        for shared in self._maps:
            try:
                shared.close()
            except BufferError:
                continue  # numpy still refers to it; it goes with the process
        self._maps = []

    def __enter__(self) -> StandbyImage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
