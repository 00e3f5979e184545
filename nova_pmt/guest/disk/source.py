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

"""The disks of a running guest, read for their copy: through its own QEMU's NBD server.

Only QEMU may read images that it writes. The log must be on before anything is read: what the
guest writes from then on is in the log, so it does not matter what of it a block already has.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence

from nova_pmt import exception
from nova_pmt.guest import nbd
from nova_pmt.guest.disk import bitmap
from nova_pmt.guest.disk.discover import GuestDisk, image_node
from nova_pmt.guest.monitor import Monitor, QmpCommandError

SOCKET = "copy.sock"
#: Of one read.
BLOCK_BYTES = 1 << 20
_ZEROS = bytes(BLOCK_BYTES)
_EXPORT_PREFIX = "pmt-copy-"


class DiskSource:
    """Implements :class:`nova_pmt.checkpoint.interfaces.DiskSource`; a context manager.

    :param directory: of this guest; QEMU's user may make a socket there.
    :param ranges: by name of the disk, what must be copied besides what a kept dirty bitmap has
        (see :mod:`nova_pmt.guest.disk.bitmap`); None to copy all that is in use.
    """

    def __init__(
        self,
        disks: Sequence[GuestDisk],
        monitor: Monitor,
        directory: str,
        ranges: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        self._disks = tuple(disks)
        self._monitor = monitor
        self._directory = directory
        self._ranges = ranges
        self._exports: dict[int, nbd.Export] = {}
        self._extents: list[list[tuple[int, int]]] = [[] for _ in self._disks]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> DiskSource:
        """Start to serve the disks, and find out what must be copied.

        :raises nova_pmt.exception.GuestError: QEMU refused, or its NBD server is in use.
        """
        with contextlib.ExitStack() as stack:
            self._start_server()
            stack.callback(self._stop_server)
            for index, disk in enumerate(self._disks):
                if self._ranges is None or not disk.spec.readonly:
                    self._open(index, disk, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exports.clear()
        self._stack.close()

    # -- the server ---------------------------------------------------------------------

    def _start_server(self) -> None:
        path = os.path.join(self._directory, SOCKET)
        address = {"type": "unix", "data": {"path": path}}
        self.recover(self._disks, self._monitor, self._directory)
        try:
            self._monitor.execute("nbd-server-start", addr=address)
        except QmpCommandError as error:
            raise exception.GuestError(
                f"QEMU's NBD server cannot be used: {error.message}",
                code="NBD_SERVER_BUSY",
                cure="Wait for the end of the backup or storage migration of this server; "
                "protection resumes by itself.",
            ) from error

    def _stop_server(self) -> None:
        with contextlib.suppress(exception.GuestError):
            self.recover(self._disks, self._monitor, self._directory)

    @staticmethod
    def recover(disks: Sequence[GuestDisk], monitor: Monitor, directory: str) -> bool:
        """End what a dead worker left served. Idempotent; somebody else's server stays.

        :returns: whether there was something.
        :raises nova_pmt.exception.GuestError: QEMU refused.
        """
        path = os.path.join(directory, SOCKET)
        # QEMU does not tell whether its server is on. Ours is when somebody listens there.
        found = _listens(path)
        if found:
            monitor.execute("nbd-server-stop")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        for disk in disks:
            if not disk.spec.readonly:
                bitmap.thaw(disk, monitor)
        return found

    def _open(self, index: int, disk: GuestDisk, stack: contextlib.ExitStack) -> None:
        name = _EXPORT_PREFIX + disk.spec.name
        bitmaps: list[str] = []
        if self._ranges is not None:
            bitmaps.append(bitmap.freeze(disk, self._monitor))
        arguments = {"bitmaps": bitmaps} if bitmaps else {}
        self._monitor.execute(
            "block-export-add",
            type="nbd",
            id=name,
            name=name,
            writable=False,
            **{"node-name": image_node(disk, self._monitor)},
            **arguments,
        )
        export = nbd.Export(os.path.join(self._directory, SOCKET), name, bitmaps)
        stack.callback(export.close)
        if export.size != disk.spec.size:
            raise exception.GuestError(
                f"disk {disk.spec.name} has {export.size} bytes, and had {disk.spec.size}"
            )
        self._exports[index] = export
        if self._ranges is None:
            self._extents[index] = [
                (offset, length)
                for offset, length, flags in export.extents(0, export.size)
                if not flags & nbd.ZERO_READS
            ]
            return
        dirty = export.extents(0, export.size, f"qemu:dirty-bitmap:{bitmaps[0]}")
        changed = [(offset, length) for offset, length, flags in dirty if flags & nbd.DIRTY]
        changed += self._ranges.get(disk.spec.name, ())
        self._extents[index] = bitmap.coalesce(changed, len(changed), export.size)

    # -- what is read -------------------------------------------------------------------

    @property
    def total_bytes(self) -> int:
        """Of all extents."""
        return sum(length for extents in self._extents for _, length in extents)

    def extents(self, index: int) -> list[tuple[int, int]]:
        """What must be copied of a disk: (offset, length), ascending."""
        return self._extents[index]

    def read_into(self, index: int, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what the disk has at ``offset`` now.

        :raises nova_pmt.exception.GuestError: it could not be read.
        """
        self._exports[index].read_into(offset, view)

    def blocks(self) -> Iterator[tuple[int, int, memoryview]]:
        """Index of the disk, offset and data, block after block, each read when it is asked for.

        Blocks are at most 1 MiB, each in memory of its own. A full copy leaves out blocks of
        zeros: the standby's new image has them.

        :raises nova_pmt.exception.GuestError: a block could not be read.
        """
        for index, extents in enumerate(self._extents):
            for start, length in extents:
                for offset in range(start, start + length, BLOCK_BYTES):
                    data = bytearray(min(BLOCK_BYTES, start + length - offset))
                    self.read_into(index, offset, memoryview(data))
                    if self._ranges is None and _ZEROS.startswith(data):
                        continue
                    yield index, offset, memoryview(data)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
