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

"""The standby's images of the guest's disks: made, filled, kept in step, handed over.

The life of an image, with what its record says (see :mod:`nova_pmt.standby.imagerecord`):

==================  ==================================================================
after ...           the record says
==================  ==================================================================
``create``          standby, not consistent (or as it was, when they are kept)
``open``            standby, not consistent, however this process ends
``close``           standby, consistent at a generation and epoch
``release``         standby, not consistent: its QEMU is about to write
``became_primary``  primary: they are never deleted, and overwritten when it has lost
``remove``          nothing: there is none
==================  ==================================================================

While the domain waits, its QEMU has the same files open, inactive: it has read their headers and
holds no lock. So an image keeps its file for as long as there is one: it is made empty in place.

A flush of the guest is not waited for here. What the standby has is good while this host lives;
after a failover ``sync`` makes what the guest had flushed survive a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from oslo_log import log

from nova_pmt import exception
from nova_pmt.exception import Refusal
from nova_pmt.guest import checks, nbd
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.disk.writelog import Entry, is_zero
from nova_pmt.standby import imagerecord
from nova_pmt.standby.batches import batches
from nova_pmt.standby.imagerecord import Image, ImageRecord
from nova_pmt.standby.storagedaemon import StorageDaemon

LOG = log.getLogger(__name__)

#: Any one request, and the end of the storage daemon; a disk that is this slow is broken.
TIMEOUT_S = 30.0
#: Of a qcow2 image: for each cluster at most (8 in an L2 table, 2 of a reference count, and what
#: those take in the tables above), and at least. Clusters have 64 KiB unless somebody chose.
_CLUSTER_TABLES_BYTES, _TABLES_BYTES, _CLUSTER_BYTES = 11, 1 << 20, 1 << 16
#: Bytes that QEMU locks when it has an image open to write (``block/file-posix.c``): base 100, and
#: permissions WRITE, WRITE_UNCHANGED and RESIZE.
_WRITER_LOCKS = (101, 3)
_FLOCK = struct.Struct("hhqqi4x")


class StandbyDisks:
    """See the module's text. One thread at a time; :meth:`open` from one that stays.

    :param state_directory: of the records.
    :param owner: user and group ids of QEMU.
    :param runtime_directory: for sockets; made when it is not there.
    :raises OSError: the record cannot be read.
    """

    def __init__(
        self,
        disks: Sequence[DiskSpec],
        uuid: str,
        state_directory: str,
        owner: tuple[int, int],
        runtime_directory: str,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._disks = tuple(disks)
        self._uuid = uuid
        self._state_directory = state_directory
        self._owner = owner
        self._directory = os.path.join(runtime_directory, uuid)
        self._timeout_s = timeout_s
        self._record = imagerecord.load(state_directory, uuid)
        self._daemon: StorageDaemon | None = None
        self._failure: exception.DiskImageError | None = None

    # -- before anything is changed -----------------------------------------------------

    def check(self, to_copy: Sequence[int] | None = None) -> list[Refusal]:
        """Why the images cannot be made here; changes nothing.

        :param to_copy: how many bytes of each disk will be copied, when that is known. Otherwise
            there must be room for all that the guest may ever write.
        """
        found: list[Refusal] = []
        for disk in self._disks:
            found += self._path_problems(disk)
        if not found:
            found += self._space_problems(to_copy)
        return found

    def _path_problems(self, disk: DiskSpec) -> Iterator[Refusal]:
        directory = _existing_directory(disk.path)
        kind = checks.SHARED_FILE_SYSTEMS.get(checks.file_system(directory))
        if kind:
            yield exception.SharedStorage(
                f"disk {disk.name}: {directory} on the standby host is on {kind}"
            )
        elif os.path.lexists(disk.path):
            if self._ours(disk.path) is None:
                yield _stranger(disk)
            elif _is_in_use(disk.path):
                yield _in_use(disk)

    def _ours(self, path: str) -> Image | None:
        return self._record.image(path) if self._record is not None else None

    def _space_problems(self, to_copy: Sequence[int] | None) -> Iterator[Refusal]:
        needed: dict[int, int] = {}
        room: dict[int, int] = {}
        where: dict[int, str] = {}
        for index, disk in enumerate(self._disks):
            directory = _existing_directory(disk.path)
            device = os.stat(directory).st_dev
            status = os.statvfs(directory)
            room.setdefault(device, status.f_bavail * status.f_frsize)
            where.setdefault(device, directory)
            size = disk.size if to_copy is None else to_copy[index]
            if disk.format == "qcow2":
                clusters = disk.size // (disk.cluster_bytes or _CLUSTER_BYTES)
                size += clusters * _CLUSTER_TABLES_BYTES + _TABLES_BYTES
            needed[device] = needed.get(device, 0) + size
            if self._ours(disk.path) is not None:  # what it takes up now is for it
                room[device] += os.lstat(disk.path).st_blocks * 512
        for device, size in needed.items():
            if size > room[device]:
                yield exception.TooLittleDisk(
                    f"{where[device]} has {room[device] >> 20} MiB free, the images of the "
                    f"standby need {-(-size >> 20)} MiB"
                )

    @property
    def kept(self) -> tuple[int, int] | None:
        """Generation and epoch of the checkpoint that the images here are at, if they are."""
        record = self._record
        if (
            record is None
            or record.role != "standby"
            or record.consistent is None
            or tuple(image.disk for image in record.images) != self._disks
            or not all(image.is_unchanged() for image in record.images)
        ):
            return None
        return record.consistent

    # -- images -------------------------------------------------------------------------

    def create(self) -> None:
        """Images for the domain to start with: those that are kept, or empty ones.

        :raises nova_pmt.exception.ImageExists: something else is at one of the paths.
        :raises nova_pmt.exception.DiskImageError: they cannot be made.
        """
        if self.kept is None:
            self.recreate()
        else:
            with self._file_errors():
                for disk in self._disks:
                    self._own(disk)

    def recreate(self) -> None:
        """All images empty, whatever they held. The waiting domain may be there already.

        :raises nova_pmt.exception.ImageExists: something else is at one of the paths, or
            somebody uses it.
        :raises nova_pmt.exception.DiskImageError: they cannot be made.
        """
        known = [self._ours(disk.path) for disk in self._disks]
        for disk, image in zip(self._disks, known, strict=True):
            if image is None and os.path.lexists(disk.path):
                raise _stranger(disk)
            if image is not None and _is_in_use(disk.path):
                raise _in_use(disk)
        with self._file_errors():
            self._drop_others()
            images = tuple(
                Image(disk, None if image is None else image.inode)
                for disk, image in zip(self._disks, known, strict=True)
            )
            record = ImageRecord(self._uuid, "standby", images, self._directories())
            self._save(record)
            self._make_files(known)
            images = tuple(Image(disk, os.lstat(disk.path).st_ino) for disk in self._disks)
            self._save(replace(record, images=images))
        for disk in self._disks:
            self._format(disk)

    def _drop_others(self) -> None:
        """Delete images of ours that the server has no more."""
        if self._record is None or self._record.role != "standby":
            return
        wanted = {disk.path for disk in self._disks}
        for image in self._record.images:
            if image.disk.path not in wanted and image.is_at_its_path():
                os.unlink(image.disk.path)

    def _directories(self) -> tuple[str, ...]:
        """Those that were made for the images before, and those that will be."""
        before = self._record.directories if self._record is not None else ()
        found = [path for path in before if os.path.isdir(path)]
        for disk in self._disks:
            missing = []
            directory = os.path.dirname(disk.path)
            while not os.path.isdir(directory) and directory != "/":
                missing.append(directory)
                directory = os.path.dirname(directory)
            found += [path for path in reversed(missing) if path not in found]
        return tuple(found)

    def _make_files(self, known: Sequence[Image | None]) -> None:
        assert self._record is not None
        for directory in self._record.directories:
            if not os.path.isdir(directory):
                os.mkdir(directory)
                os.chmod(directory, 0o755)  # QEMU's user must get through, whatever our umask
        for disk, image in zip(self._disks, known, strict=True):
            if image is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                try:
                    os.close(os.open(disk.path, flags, 0o600))
                except FileExistsError:
                    raise _stranger(disk) from None
            self._own(disk)

    def _own(self, disk: DiskSpec) -> None:
        os.chmod(disk.path, 0o600)
        if os.geteuid() == 0:
            os.chown(disk.path, *self._owner)

    def _format(self, disk: DiskSpec) -> None:
        """Make it empty; ``qemu-img`` refuses when another process has it open to write."""
        command = ["qemu-img", "create", "-q", "-f", disk.format]
        if disk.format == "qcow2":
            command += ["-o", "lazy_refcounts=off"]
            if disk.cluster_bytes:
                command += ["-o", f"cluster_size={disk.cluster_bytes}"]
        try:
            done = subprocess.run(
                [*command, disk.path, str(disk.size)],
                capture_output=True,
                check=False,
                timeout=self._timeout_s,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise exception.DiskImageError(
                f"the image of disk {disk.name} cannot be made: {error}"
            ) from error
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip()
            raise exception.DiskImageError(f"the image of disk {disk.name} cannot be made: {words}")

    def reuse(self) -> None:
        """Go on with the images that are kept.

        :raises nova_pmt.exception.DiskImageError: there are none.
        """
        if self.kept is None:
            raise exception.DiskImageError(
                "the standby's images have changed since they were put away",
                cure="Nothing: the next synchronisation copies the disks in full.",
            )

    # -- writing ------------------------------------------------------------------------

    def open(self) -> None:
        """Start to write; from here on they are not consistent.

        :raises nova_pmt.exception.DiskImageError: they cannot be opened.
        """
        assert self._daemon is None
        record = self._record
        if record is None:
            raise exception.DiskImageError("the standby's images have not been made")
        with self._file_errors():
            self._save(replace(record, role="standby", consistent=None))
        self._failure = None
        self._daemon = StorageDaemon(self._disks, self._directory, self._owner, self._timeout_s)

    def copy(self, index: int, offset: int, data: memoryview) -> None:
        """Write a block of the first copy of a disk.

        :raises nova_pmt.exception.DiskImageError: it cannot be written.
        """
        operation = nbd.zero(offset, len(data)) if is_zero(data) else nbd.write(offset, data)
        with self._writing(index) as export:
            export.write_many((operation,))

    def apply(self, index: int, entries: Iterable[Entry]) -> None:
        """Write what a disk's log has, in its order.

        Takes some 40 us for each entry (of 4 KiB), in which this thread does nothing else.

        :raises nova_pmt.exception.DiskImageError: it cannot be written; a part of it may be.
        """
        with self._writing(index) as export:
            for batch in batches(entries):
                export.write_many(batch)

    def flush(self) -> None:
        """Have the daemon write its caches into the images.

        :raises nova_pmt.exception.DiskImageError: it cannot.
        """
        for index in range(len(self._disks)):
            with self._writing(index) as export:
                export.flush()

    @contextlib.contextmanager
    def _writing(self, index: int) -> Iterator[nbd.Export]:
        daemon, disk = self._daemon, self._disks[index]
        if daemon is None:
            raise exception.DiskImageError(f"the image of disk {disk.name} is not open")
        if self._failure is not None:
            raise self._failure
        try:
            yield daemon.exports[index]
        except nbd.NbdError as error:
            words = f": {daemon.last_words()}" if error.errno == errno.ECONNRESET else ""
            failure = exception.DiskImageError(
                f"the image of disk {disk.name} cannot be written: {error.message}{words}",
                disk=disk.name,
                path=disk.path,
                errno=error.errno,
            )
            if error.errno == errno.ENOSPC:
                failure.cure = (
                    f"Free space in {os.path.dirname(disk.path)} on the standby host; "
                    "protection resumes by itself."
                )
            self._failure = failure  # it lacks something now: nothing more is written to it
            raise failure from error

    # -- the end ------------------------------------------------------------------------

    def _stop(self) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is None:
            return
        if self._failure is not None:
            daemon.kill()
            raise self._failure
        try:
            daemon.stop()
        except exception.DiskImageError as error:
            self._failure = error
            raise

    def release(self) -> None:
        """Write everything, and let go of the images: the standby's QEMU takes them over.

        Takes some ms; does not wait for the disk below. Nothing happens when they are not open.

        :raises nova_pmt.exception.DiskImageError: they do not hold what was written to them.
        """
        self._stop()

    def became_primary(self) -> None:
        """The guest runs on them now. An error is only told in the log: the guest comes first."""
        try:
            imagerecord.note_primary(self._state_directory, self._uuid, self._disks)
            self._record = imagerecord.load(self._state_directory, self._uuid)
        except OSError as error:
            LOG.error("%s: images cannot be recorded as the primary's: %s", self._uuid, error)

    def sync(self) -> None:
        """Wait until the images are on the disk below; any thread, while the guest runs on them.

        :raises nova_pmt.exception.DiskImageError: the disk fails.
        """
        with self._file_errors():
            for disk in self._disks:
                descriptor = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def close(self, generation: int, epoch: int) -> None:
        """Put the images away: they are at this checkpoint, and outlive a power cut.

        Also after :meth:`release`, when the guest has not run on them after all.

        :raises nova_pmt.exception.DiskImageError: they are not; the record says so.
        """
        self._stop()
        if self._failure is not None:
            raise self._failure
        self.sync()
        with self._file_errors():
            if self._record is None:
                raise exception.DiskImageError("the standby's images have not been made")
            self._save(self._record.with_stamps(generation, epoch))

    def remove(self) -> None:
        """Delete the images, what was made for them, and their record.

        Only what the record names. Nothing happens when there is none.

        :raises nova_pmt.exception.ImageExists: they are a primary's, or in use; they stay.
        :raises nova_pmt.exception.DiskImageError: they cannot be deleted.
        """
        self._abandon()
        record = self._record
        if record is None:
            return
        images = [image for image in record.images if image.is_at_its_path()]
        if record.role != "standby" or any(_is_in_use(image.disk.path) for image in images):
            raise exception.ImageExists(
                f"the images of server {self._uuid} are in use on this host and stay",
                cure="Nothing, when the server runs here. Delete them by hand when it does not.",
            )
        with self._file_errors():
            for image in images:
                os.unlink(image.disk.path)
            for directory in reversed(record.directories):
                with contextlib.suppress(OSError):  # somebody else has put something there
                    os.rmdir(directory)
            imagerecord.forget(self._state_directory, self._uuid)
        self._record = None

    def _abandon(self) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.kill()

    def __enter__(self) -> StandbyDisks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the images as they are; when they were open they stay inconsistent."""
        self._abandon()

    # -- help ---------------------------------------------------------------------------

    def _save(self, record: ImageRecord) -> None:
        record.save(self._state_directory)
        self._record = record

    @contextlib.contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise exception.DiskImageError(
                f"the standby's images: {where}{error.strerror}", errno=error.errno
            ) from error


def _stranger(disk: DiskSpec) -> exception.ImageExists:
    return exception.ImageExists(f"disk {disk.name}: {disk.path} is there already, and not ours")


def _in_use(disk: DiskSpec) -> exception.ImageExists:
    return exception.ImageExists(
        f"disk {disk.name}: {disk.path} is in use on the standby host",
        cure="End the domain or program that has the image open on that host.",
    )


def _existing_directory(path: str) -> str:
    """The innermost directory above a path that is there."""
    directory = os.path.dirname(path)
    while not os.path.isdir(directory) and directory != "/":
        directory = os.path.dirname(directory)
    return directory


def _is_in_use(path: str) -> bool:
    """Whether a QEMU has the image open to write."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return True
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        start, length = _WRITER_LOCKS
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)
