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

"""Write log of a disk of a running guest: QEMU's ``blklogwrites`` filter above the disk.

QEMU writes to the image first and to the log then, and completes the guest's request after both;
when it has stopped the guest all requests are done, so the log holds whole entries, exactly those
of the epoch. Positions are byte offsets in the log's file: the log is cut by looking at its size,
and what is committed is punched out of it, so that it only ever grows in name.

Sector 0 is QEMU's super block, which QEMU is told not to write (it does so on flushes, and those
pass the filter by). We keep there how far the log is committed, for whoever comes after our death.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from nova_pmt import exception
from nova_pmt.guest.disk.discover import (
    FILE_PREFIX,
    FILTER_PREFIX,
    GuestDisk,
    attached,
    image_node,
    nodes_below,
)
from nova_pmt.guest.disk.growth import Watcher
from nova_pmt.guest.disk.spec import SECTOR
from nova_pmt.guest.monitor import Monitor, QmpCommandError

#: Most bytes of a log that are read at once.
CHUNK_BYTES = 1 << 20
PAGE = 4096
#: fallocate(2): free the blocks, keep the size. Python's os module has no call for it.
PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
#: In writes: never. QEMU would write its super block over ours.
SUPER_BLOCK_INTERVAL = 1 << 62
_MAGIC = b"PMTLOG1\0"
_STATE = struct.Struct("<8sQQQ")  # magic, generation, epoch, released
SUFFIX = ".writelog"
IO_ERROR = "BLOCK_IO_ERROR"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _punch_hole(descriptor: int, start: int, end: int) -> None:
    if end > start and _libc.fallocate(descriptor, PUNCH_HOLE_KEEP_SIZE, start, end - start) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _attach(qom_path: str, node: str, monitor: Monitor) -> None:
    monitor.execute("qom-set", path=qom_path, property="drive", value=node)


def _delete_node(name: str, monitor: Monitor) -> None:
    try:
        monitor.execute("blockdev-del", **{"node-name": name})
    except QmpCommandError:
        if name in _nodes(monitor):
            raise


def _nodes(monitor: Monitor) -> dict[str, dict[str, Any]]:
    answer = monitor.execute("query-named-block-nodes", flat=True)
    return {str(node.get("node-name", "")): node for node in answer}


def _take_off(name: str, monitor: Monitor) -> bool:
    """Take the filter off the disk of this name, whatever became of the disk since.

    :returns: whether there was something to take off.
    """
    filter_node, file_node = FILTER_PREFIX + name, FILE_PREFIX + name
    nodes = _nodes(monitor)
    if filter_node in nodes:
        below = nodes_below(filter_node, monitor)
        devices = {node: path for path, node in attached(monitor).items()}
        device = devices.get(filter_node)
        if device:
            _attach(device, below[0], monitor)
            image = nodes.get(below[0], {}).get("image") or {}
            above = nodes[filter_node].get("image") or {}
            if image.get("virtual-size") != above.get("virtual-size"):
                # It was resized meanwhile, and the filter kept that from the guest.
                size = image.get("virtual-size")
                with contextlib.suppress(QmpCommandError):
                    monitor.execute("block_resize", size=size, **{"node-name": below[0]})
        _delete_node(filter_node, monitor)
        if not device and below[0] not in devices:
            # The disk was detached, and libvirt failed to close its image, which was ours, too.
            for node in below:
                with contextlib.suppress(QmpCommandError):
                    monitor.execute("blockdev-del", **{"node-name": node})
    if file_node in nodes:
        _delete_node(file_node, monitor)
    return bool({filter_node, file_node} & nodes.keys())


def recover_all(monitor: Monitor, directory: str) -> bool:
    """Take off all that a dead worker left, whatever disks the guest has by now. Idempotent.

    :param directory: where the guest's logs are.
    :returns: whether there was something to take off.
    :raises nova_pmt.exception.GuestError: QEMU refused.
    """
    names = set()
    for node in _nodes(monitor):
        for prefix in (FILTER_PREFIX, FILE_PREFIX):
            if node.startswith(prefix):
                names.add(node[len(prefix) :])
    for name in sorted(names):
        _take_off(name, monitor)
    left = [entry for entry in _listed(directory) if entry.endswith(SUFFIX)]
    for entry in left:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, entry))
    return bool(names or left)


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


class LogSpace:
    """What the logs of one guest's disks may hold together.

    :param limit_bytes: ``[disk] log_limit_mib``, in bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._logs: list[DiskLog] = []
        self._watcher: Watcher | None = None

    def add(self, log: DiskLog) -> None:
        self._logs.append(log)

    @property
    def used_bytes(self) -> int:
        return sum(log.used_bytes for log in self._logs)

    def watcher(self) -> Watcher:
        """What tells of writes to the logs, made when it is first asked for.

        :raises nova_pmt.exception.DiskLogError: the kernel has none left.
        """
        if self._watcher is None:
            try:
                self._watcher = Watcher()
            except OSError as error:
                raise exception.DiskLogError(
                    f"nobody tells of writes to the disks' logs: {error}",
                    cure="Raise the sysctl fs.inotify.max_user_instances, or choose the strategy "
                    "pmt.",
                ) from error
        return self._watcher

    def close(self) -> None:
        """Nobody tells of writes any more; the logs are closed already."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.close()


class DiskLog:
    """Implements :class:`nova_pmt.checkpoint.interfaces.WriteLog` for one disk.

    :param monitor: of the guest's QEMU.
    :param directory: of this guest, on tmpfs; its owner is QEMU's user.
    :param space: shared by the logs of a guest; None for a log that is only taken off.
    """

    def __init__(
        self,
        disk: GuestDisk,
        monitor: Monitor,
        directory: str,
        space: LogSpace | None = None,
    ) -> None:
        self.disk = disk
        self.path = os.path.join(directory, disk.spec.name + SUFFIX)
        self.generation = 0
        self.committed_epoch = 0
        self._monitor = monitor
        self._directory = directory
        self._space = space
        self._descriptor = -1
        self._cuts: dict[int, tuple[int, int]] = {}
        self._cut_end = SECTOR
        self._released = SECTOR
        self._peak = 0
        self._broken = ""
        self._watcher: Watcher | None = None
        self._on_output: Callable[[], None] = lambda: None
        self._first_at = 0.0
        if space is not None:
            space.add(self)

    # -- on and off ---------------------------------------------------------------------

    def install(self, generation: int = 0) -> None:
        """Log all writes from now on; the guest may be running.

        Takes off first what a dead worker left; its log is lost.

        :param generation: of the pair, kept in the log; see :meth:`left`.
        :raises nova_pmt.exception.DiskLogError: it did not work; what was done is undone.
        """
        self.uninstall()
        disk = self.disk
        try:
            self._create_file(generation)
            self._monitor.execute(
                "blockdev-add",
                driver="file",
                filename=self.path,
                locking="off",
                cache={"no-flush": True},
                **{"node-name": disk.file_node, "auto-read-only": False},
            )
            self._monitor.execute(
                "blockdev-add",
                driver="blklogwrites",
                file=image_node(disk, self._monitor),
                log=disk.file_node,
                # Flushes go on to the image, but not into the log: its order is what counts.
                cache={"no-flush": True},
                discard="unmap" if disk.discard else "ignore",
                **{
                    "node-name": disk.filter_node,
                    "log-sector-size": SECTOR,
                    "log-super-update-interval": SUPER_BLOCK_INTERVAL,
                },
            )
            # QEMU drains the disk's requests for that.
            _attach(disk.qom_path, disk.filter_node, self._monitor)
        except BaseException as error:
            with contextlib.suppress(exception.GuestError):
                self.uninstall()
            if isinstance(error, (OSError, QmpCommandError)):
                raise exception.DiskLogError(
                    f"the writes of disk {disk.spec.name} cannot be logged: {error}"
                ) from error
            raise

    def _create_file(self, generation: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o600)
        owner = os.stat(self._directory)
        os.fchown(self._descriptor, owner.st_uid, owner.st_gid)
        self.generation, self.committed_epoch = generation, 0
        self._cuts.clear()
        self._cut_end = self._released = SECTOR
        self._peak, self._broken = 0, ""
        self._remember()

    def unplug(self) -> None:
        """Take the filter off; the log is complete then, and can be read until :meth:`uninstall`.

        The guest may be running, paused, or stopped for an I/O error of the log: when it goes on,
        QEMU repeats the failed requests on the image. Idempotent.

        :raises nova_pmt.exception.GuestError: QEMU refused.
        """
        _take_off(self.disk.spec.name, self._monitor)

    def uninstall(self) -> None:
        """Leave the disk as if it had never been logged: no filter, no nodes, no file. Idempotent.

        :raises nova_pmt.exception.GuestError: QEMU refused.
        """
        self.unplug()
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Let go of what this process has open; the guest's writes are logged on."""
        self._watcher = None
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @classmethod
    def left(cls, disk: GuestDisk, monitor: Monitor, directory: str) -> DiskLog | None:
        """The log that a dead worker left, to :meth:`unplug` it and see what it has.

        :returns: None when it left none that can be read, or one that the disk's writes did not
            go to any more and so has not all; :meth:`recover` takes off the rest.
        """
        if disk.filter_node not in attached(monitor).values():
            return None
        log = cls(disk, monitor, directory)
        try:
            log._descriptor = os.open(log.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            state = os.pread(log._descriptor, _STATE.size, 0)
            magic, log.generation, log.committed_epoch, released = _STATE.unpack(state)
            log._released = log._cut_end = released
            if magic == _MAGIC and SECTOR <= released <= log._end() and not released % SECTOR:
                return log
        except (OSError, struct.error):
            pass
        log.close()
        return None

    @classmethod
    def recover(cls, disk: GuestDisk, monitor: Monitor, directory: str) -> bool:
        """Take off what a dead worker left. Idempotent.

        :returns: whether there was something to take off.
        :raises nova_pmt.exception.GuestError: QEMU refused.
        """
        log = cls(disk, monitor, directory)
        found = _take_off(disk.spec.name, monitor) or os.path.lexists(log.path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(log.path)
        return found

    # -- rounds -------------------------------------------------------------------------

    def cut(self, epoch: int) -> None:
        """End of the epoch's writes: called while the guest is stopped. One system call.

        The same epoch may be cut again, for all since the cut before it.
        """
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        start = self._cuts[epoch][0] if epoch in self._cuts else self._cut_end
        # Nothing logged yet: the file ends with our sector.
        self._cuts[epoch] = (start, max(end, start))
        self._cut_end = max(end, start)
        self._first_at = 0.0

    def segment_bytes(self, epoch: int) -> int:
        """Length of the log between the cut before and the epoch's."""
        start, end = self._cuts.get(epoch, (0, 0))
        return end - start

    def segments(self, epoch: int) -> Iterator[memoryview]:
        """The log between the cut before and the epoch's, in parts of at most 1 MiB.

        Each part is memory of its own. Not called in a pause.

        :raises nova_pmt.exception.DiskLogError: the log cannot be read.
        """
        return self._parts(*self._cuts.get(epoch, (0, 0)))

    def _parts(self, start: int, end: int) -> Iterator[memoryview]:
        while start < end:
            try:
                data = os.pread(self._descriptor, min(CHUNK_BYTES, end - start), start)
            except OSError as error:
                raise exception.DiskLogError(f"{self.path} cannot be read: {error}") from error
            if not data:
                raise exception.DiskLogError(f"{self.path} ends at byte {start}, not {end}")
            start += len(data)
            yield memoryview(data)

    def release(self, epoch: int) -> None:
        """The epoch is committed: frees its part of the log.

        :raises nova_pmt.exception.DiskLogError: the file system cannot free parts of a file.
        """
        _, end = self._cuts.pop(epoch, (0, 0))
        for older in [number for number in self._cuts if number < epoch]:
            del self._cuts[older]
        self.committed_epoch = max(epoch, self.committed_epoch)
        before, self._released = self._released, max(end, self._released)
        self._peak = max(self._peak, self._end() - before)
        try:
            self._remember()
            # Whole pages are freed only by a hole that covers them. Ours starts where the page
            # starts in which the last one ended, or a page would be lost with each release.
            _punch_hole(self._descriptor, max(PAGE, before - before % PAGE), self._released)
        except OSError as error:
            raise exception.DiskLogError(
                f"{self.path} cannot be freed in parts: {error}",
                cure="Put [disk] log_directory on tmpfs.",
            ) from error
        self._await_output()

    # -- output that begins a round -----------------------------------------------------

    def watch(self, on_output: Callable[[], None]) -> None:
        """Have ``on_output`` called, from any thread, with the first write after each cut.

        Told of once an epoch was released: what was written between its cut and that is told then.

        :raises nova_pmt.exception.DiskLogError: the kernel does not tell.
        """
        assert self._space is not None
        self._watcher, self._on_output = self._space.watcher(), on_output
        self._await_output()

    def _await_output(self) -> None:
        watcher = self._watcher
        if watcher is None:
            return
        try:
            watcher.arm(self._descriptor, self._notice)
        except OSError as error:
            raise exception.DiskLogError(
                f"nobody tells of writes to {self.path}: {error}",
                cure="Raise the sysctl fs.inotify.max_user_watches, or choose the strategy pmt.",
            ) from error
        if self._end() > self._cut_end:
            self._notice()

    def _notice(self) -> None:
        """Something was written: by the guest, or by us, which does not count. Any thread."""
        watcher = self._watcher
        if watcher is None:
            return
        try:
            if self._end() <= self._cut_end:
                watcher.arm(self._descriptor, self._notice)
                if self._end() <= self._cut_end:
                    return
            if not self._first_at:
                self._first_at = time.perf_counter()
                if self._end() <= self._cut_end:
                    self._first_at = 0.0  # it was of an epoch that was cut just now
                else:
                    self._on_output()
        except OSError as error:
            if self._watcher is not None:  # else it was closed meanwhile
                self._broken = f"nobody tells of writes to disk {self.disk.spec.name}: {error}"

    @property
    def waiting_since(self) -> float:
        """``time.perf_counter`` when the first write since the last cut was seen; 0: none was."""
        return self._first_at

    def _remember(self) -> None:
        state = _STATE.pack(_MAGIC, self.generation, self.committed_epoch, self._released)
        os.pwrite(self._descriptor, state.ljust(SECTOR, b"\0"), 0)

    def unreleased(self) -> Iterator[memoryview]:
        """All entries that are not committed, in parts of at most 1 MiB.

        To be called after :meth:`unplug`, or while the guest is stopped: its last entry may be
        half written otherwise.
        """
        return self._parts(self._released, self._end())

    # -- how it is ----------------------------------------------------------------------

    def _end(self) -> int:
        return max(SECTOR, os.lseek(self._descriptor, 0, os.SEEK_END))

    @property
    def used_bytes(self) -> int:
        """What is logged and not committed, at this moment. Any thread."""
        try:
            return max(0, self._end() - self._released)
        except OSError:  # it is closed
            return 0

    @property
    def pressure(self) -> float:
        """How full the space of the guest's logs is, or what its file system has left; 0 to 1."""
        if self._descriptor < 0 or self._space is None:
            return 0.0
        used = self._space.used_bytes
        status = os.fstatvfs(self._descriptor)
        room = min(self._space.limit_bytes, used + status.f_bavail * status.f_frsize)
        return min(1.0, used / room) if room else 1.0

    @property
    def broken(self) -> str:
        """Why it cannot go on: a write to the log or the image failed. Empty while it can."""
        if not self._broken and self._monitor.saw_event(IO_ERROR):
            with contextlib.suppress(exception.GuestError):
                event = self._monitor.wait_event(
                    IO_ERROR, 0, operation="write", **{"node-name": self.disk.filter_node}
                )
                reason = event["data"].get("reason", "no reason given")
                self._broken = f"a write to disk {self.disk.spec.name} or its log failed: {reason}"
        if not self._broken and self._descriptor >= 0 and not os.fstat(self._descriptor).st_nlink:
            # (By an older worker of this guest, say: what is written is in no log any more.)
            self._broken = f"somebody took the write log of disk {self.disk.spec.name} away"
        return self._broken

    def summary(self) -> dict[str, Any]:
        """For the status. Any thread."""
        used = self.used_bytes
        self._peak = max(self._peak, used)
        return {
            "disk": self.disk.spec.name,
            "log_bytes": used,
            "log_peak_bytes": self._peak,
            "written_bytes": self._released - SECTOR + used,
        }
