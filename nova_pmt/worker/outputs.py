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

"""What the guest puts out, from its worker's side: buffers of its NICs, logs of its disks.

Put on in this order: logs, then the first copy of the disks, then, just before checkpoint 1, the
network buffers. Taken off together, while the guest stands still, and only when it may go on
unprotected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from oslo_log import log

from nova_pmt import exception, unsafe
from nova_pmt.checkpoint.interfaces import OutputBuffer
from nova_pmt.guest.disk import bitmap, discover
from nova_pmt.guest.disk.changes import forget_changes, keep_changes
from nova_pmt.guest.disk.leftover import log_directory, remove_logs
from nova_pmt.guest.disk.log import DiskLog, LogSpace
from nova_pmt.guest.disk.source import DiskSource
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network import choose
from nova_pmt.guest.network.base import EgressBuffer
from nova_pmt.standby import imagerecord
from nova_pmt.standby.images import records_directory
from nova_pmt.worker.trace import Trace

LOG = log.getLogger(__name__)

MIB = 1 << 20


class Outputs:
    """See the module's text.

    :param xml: the domain's live XML.
    :param pid: its QEMU's.
    :param directory: where QEMU can make sockets.
    :raises nova_pmt.exception.Refusal: some output can be neither held nor replicated.
    """

    def __init__(
        self, conf: Any, uuid: str, xml: str, pid: int, monitor: Monitor, directory: str
    ) -> None:
        self._conf = conf
        self._uuid = uuid
        self._monitor = monitor
        self._directory = directory
        self._log_directory = log_directory(conf, uuid, pid)
        self._kinds = [
            (nic, choose.choose(conf.network.egress_buffer, nic, monitor))
            for nic in choose.nics(xml, pid)
        ]
        self.disks = discover.disks(xml, monitor)
        self._space = LogSpace(conf.disk.log_limit_mib * MIB)
        self.logs: dict[int, DiskLog] = {
            number: DiskLog(disk, monitor, self._log_directory, self._space)
            for number, disk in enumerate(self.disks)
            if not disk.spec.readonly
        }
        self._buffers: list[EgressBuffer] = []
        self._installed: list[DiskLog] = []
        self._trace = Trace.from_environment()
        self.armed = False
        self._dropped = 0

    @property
    def specs(self) -> list[dict[str, Any]]:
        """The disks, as the standby knows them."""
        return [disk.spec.to_dict() for disk in self.disks]

    # -- the images, for later ----------------------------------------------------------

    def record_images(self) -> None:
        """Note that the disks' images are a primary's: when it has lost, a standby may be made
        over them. The guest's protection does not depend on it."""
        if self.disks:
            specs = [disk.spec for disk in self.disks]
            self._quietly(
                "record of its images",
                lambda: imagerecord.note_primary(records_directory(self._conf), self._uuid, specs),
            )

    def forget_images(self) -> None:
        """Nobody may make a standby over them any more."""
        if self.disks:
            self._quietly(
                "record of its images",
                lambda: imagerecord.forget(records_directory(self._conf), self._uuid),
            )

    # -- putting on ---------------------------------------------------------------------

    def await_writes(self) -> None:
        """Make sure, before anything is copied, that somebody can tell of writes to the disks.

        :raises nova_pmt.exception.DiskLogError: nobody can.
        """
        if self.logs:
            self._space.watcher()

    def start_logs(self, generation: int) -> None:
        """Log the disks' writes from now on."""
        for disk_log in self.logs.values():
            self._installed.append(disk_log)
            disk_log.install(generation)

    def changes(self, images: object) -> bitmap.Note | None:
        """What is known of the writes since the standby's images were as they are.

        :param images: what the standby says of them.
        :returns: None when all must be copied.
        """
        note = bitmap.Note.read(self._log_directory)
        writable = [log.disk for log in self.logs.values()]
        if (
            note is not None
            and isinstance(images, dict)
            and images.get("generation") == note.generation
            and isinstance(images.get("epoch"), int)
            and images["epoch"] >= note.epoch
            and all(bitmap.has(disk, self._monitor) for disk in writable)
        ):
            return note
        self.forget_changes()
        return None

    def forget_changes(self) -> None:
        """No bitmap and no note are left."""
        forget_changes(self.disks, self._monitor, self._log_directory)

    @contextlib.contextmanager
    def source(self, note: bitmap.Note | None) -> Iterator[DiskSource]:
        """The disks, to be copied: all, or what changed."""
        ranges = None if note is None else note.ranges
        with DiskSource(self.disks, self._monitor, self._directory, ranges) as found:
            yield found

    def arm(self) -> Sequence[OutputBuffer]:
        """Hold what the NICs send from now on."""
        self.armed = True
        if unsafe.asked(unsafe.UNBUFFERED):
            self.armed = False
            return ()
        limit = self._conf.network.buffer_limit_mib * MIB
        for nic, kind in self._kinds:
            buffer = kind(nic, self._monitor, self._directory, limit)
            buffer.attach()
            self._buffers.append(buffer)
        held: list[OutputBuffer] = list(self._buffers)
        if self._trace is not None:
            held = [self._trace.wrap(buffer) for buffer in held]
        if unsafe.asked(unsafe.AT_ONCE):
            held = [unsafe.ReleasedAtOnce(buffer) for buffer in held]
        return held

    # -- taking off ---------------------------------------------------------------------

    def open(self, resume: Callable[[], None], *, keep: bool) -> None:
        """Let out what is held, and take everything off; the guest may go on unprotected.

        :param resume: lets the guest run on, if it ran.
        :param keep: keep in mind what the standby's images lack from here on.
        :raises nova_pmt.exception.GuestError: something is still on; the guest runs.
        """
        status = self._monitor.execute("query-status")["status"]
        stuck: list[str] = []
        try:
            if status == "running":
                self._monitor.execute("stop")
            # A write that failed, and of which QEMU told the guest instead of repeating it, may be
            # in the image or in the log alone.
            failed = status != "io-error" and any(log.broken for log in self._installed)
            if keep and not failed:
                self._quietly("changes", lambda: keep_changes(self._installed, self._monitor))
            else:
                self._quietly("changes", self.forget_changes)
            if not keep:
                self.forget_images()
            for disk_log in self._installed:
                if not self._quietly("write log", disk_log.uninstall):
                    stuck.append(f"the write log of disk {disk_log.disk.spec.name}")
            for buffer in self._buffers:
                if not self._open_buffer(buffer):
                    stuck.append(f"the buffer of {buffer.nic.alias}")
            self._installed, self._buffers, self.armed = [], [], False
        finally:
            # A request that failed in the log stopped the guest; it is repeated without one.
            if status in ("running", "io-error"):
                resume()
        if stuck:
            raise exception.GuestError(f"not taken off: {', '.join(stuck)}")

    def _open_buffer(self, buffer: EgressBuffer) -> bool:
        try:
            buffer.detach()
        except (exception.PmtError, OSError) as error:
            LOG.error("held packets are lost: %s", error)
            # The guest comes first: it must not stay cut off.
            return self._quietly("buffer", lambda: type(buffer).recover(buffer.nic, self._monitor))
        return True

    def _quietly(self, what: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except (exception.PmtError, OSError) as error:
            LOG.warning("%s: %s", what, error)
            return False
        return True

    def close(self) -> None:
        """Let go of all that this process has open; nothing leaks."""
        for buffer in self._buffers:
            buffer.close()
        for disk_log in self.logs.values():
            disk_log.close()
        self._space.close()
        if self._trace is not None:
            self._trace.close()

    def abandon(self) -> None:
        """The guest is gone from here: nothing of it is left."""
        self.close()
        remove_logs(self._conf, self._uuid)

    def summary(self) -> dict[str, Any]:
        """For the status; ``dropping``: since this was asked last."""
        network = [buffer.summary() for buffer in self._buffers]
        dropped = sum(nic.get("dropped_packets", 0) for nic in network)
        dropping, self._dropped = dropped > self._dropped, dropped
        return {
            "output_commit": self.armed,
            "dropping": dropping,
            "network": network,
            "disks": [disk_log.summary() for disk_log in self.logs.values()],
        }
