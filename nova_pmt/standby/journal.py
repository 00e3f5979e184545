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

"""Write logs that wait for their commit: taken in and checked, then applied in order.

Implements :class:`nova_pmt.replication.receiver.Disks` over the standby's images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nova_pmt import exception
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.disk.writelog import Entry, LogParser

if TYPE_CHECKING:
    from nova_pmt.standby.disks import StandbyDisks

#: Most that logs may take up in memory while they wait.
STAGING_BYTES = 1 << 30


#: Entries that are written at a time: some 50 ms.
SLICE_ENTRIES = 1024


class NoDisks:
    """Of a guest that has none."""

    count = 0

    def copy(self, disk: int, offset: int, data: memoryview) -> None:
        """Never called: there is no disk."""

    def stage(self, disk: int, part: memoryview) -> None:
        """Never called: there is no disk."""

    def whole(self) -> bool:
        """See the interface."""
        return True

    def apply(self) -> None:
        """Nothing to do."""

    def discard(self) -> None:
        """Nothing to do."""

    def summary(self) -> dict[str, object]:
        """Nothing to tell."""
        return {}


class Journal:
    """See the module's text.

    :param images: opened before the first call of :meth:`copy` or :meth:`apply`.
    :param breathe: called now and then while much is written, so that the peer hears of us.
    """

    def __init__(
        self,
        images: StandbyDisks,
        specs: Sequence[DiskSpec],
        breathe: Callable[[], None] = lambda: None,
    ) -> None:
        self._images = images
        self._breathe = breathe
        self._specs = tuple(specs)
        self._parsers = [LogParser(spec.size) for spec in specs]
        self._pending: list[list[Entry]] = [[] for _ in specs]
        self._readonly = [spec.readonly for spec in specs]
        self._waiting_bytes = 0
        self._applied_bytes = 0
        self.count = len(self._parsers)

    def copy(self, disk: int, offset: int, data: memoryview) -> None:
        """See the interface."""
        self._images.copy(disk, offset, data)

    def stage(self, disk: int, part: memoryview) -> None:
        """See the interface.

        :raises nova_pmt.exception.CheckpointCorrupt: it is no log.
        """
        self._waiting_bytes += len(part)
        if self._waiting_bytes > STAGING_BYTES:
            raise exception.PeerError(
                f"a checkpoint has more than {STAGING_BYTES >> 20} MiB of disk writes",
                code="STAGING_FULL",
                cure="Shorten [checkpoint] interval_ms, or lower [disk] log_limit_mib.",
            )
        if self._readonly[disk]:
            raise exception.CheckpointCorrupt(f"disk {disk} is read-only, and was written")
        try:
            self._pending[disk] += self._parsers[disk].feed(part)
        except exception.DiskLogError as error:
            raise exception.CheckpointCorrupt(
                f"the write log of disk {disk} cannot be read: {error.message}", cure=error.cure
            ) from error

    def whole(self) -> bool:
        """See the interface."""
        return all(parser.at_boundary for parser in self._parsers)

    def apply(self) -> None:
        """See the interface.

        :raises nova_pmt.exception.DiskImageError: an image cannot be written.
        """
        if not self._waiting_bytes:
            return
        for disk, entries in enumerate(self._pending):
            for at in range(0, len(entries), SLICE_ENTRIES):
                self._images.apply(disk, entries[at : at + SLICE_ENTRIES])
                self._breathe()
            entries.clear()
        self._applied_bytes += self._waiting_bytes
        self._waiting_bytes = 0

    def discard(self) -> None:
        """See the interface."""
        self._parsers = [LogParser(spec.size) for spec in self._specs]
        for entries in self._pending:
            entries.clear()
        self._waiting_bytes = 0

    def summary(self) -> dict[str, object]:
        """See the interface."""
        return {"disks": self.count, "disk_bytes_applied": self._applied_bytes}
