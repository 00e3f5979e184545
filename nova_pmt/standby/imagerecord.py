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

"""What is written down of the images that are ours: one small file for each server.

An image is a file at the path that the server's disk has on the other host as well, so it may be
there for any reason. Only one that a record names is ever overwritten or deleted. A record is
written before the images are made, and it says that they are consistent only while nobody
writes to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid as uuid_module
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from oslo_log import log

from nova_pmt.guest.disk.spec import DiskSpec

LOG = log.getLogger(__name__)

Role = Literal["standby", "primary"]
_VERSION = 1
#: Inode, size and time of the last change (ns) of a file.
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Image:
    """A disk's image.

    :param inode: of its file; None: it may not have been made.
    :param stamp: of its file when it was consistent.
    """

    disk: DiskSpec
    inode: int | None = None
    stamp: Stamp | None = None

    def is_at_its_path(self) -> bool:
        """Whether what is at the path is this image."""
        try:
            found = os.lstat(self.disk.path)
        except OSError:
            return False
        if not stat.S_ISREG(found.st_mode):
            return False
        # One that was begun and never written down has nothing in it yet.
        return found.st_ino == self.inode or (self.inode is None and not found.st_size)

    def is_unchanged(self) -> bool:
        """Whether nobody has written to it since it was consistent."""
        try:
            return self.stamp is not None and stamp(self.disk.path) == self.stamp
        except OSError:
            return False


def stamp(path: str) -> Stamp:
    """What tells whether a file is the same as before.

    :raises OSError: there is none.
    """
    found = os.lstat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class ImageRecord:
    """A server's images on this host.

    :param role: what they are here: the images of a primary are recorded so that they may be
        overwritten when it has lost, and are never deleted.
    :param directories: that were made for them, from the outermost on.
    :param consistent: generation and epoch of the checkpoint that they are at; None: no one.
    """

    uuid: str
    role: Role
    images: tuple[Image, ...]
    directories: tuple[str, ...] = ()
    consistent: tuple[int, int] | None = None

    def image(self, path: str) -> Image | None:
        """The image at a path, if it is ours."""
        for image in self.images:
            if image.disk.path == path and image.is_at_its_path():
                return image
        return None

    def with_stamps(self, generation: int, epoch: int) -> ImageRecord:
        """All images are as they were at that checkpoint.

        :raises OSError: one is not there.
        """
        return replace(
            self,
            images=tuple(
                replace(image, stamp=stamp(image.disk.path), inode=os.lstat(image.disk.path).st_ino)
                for image in self.images
            ),
            consistent=(generation, epoch),
        )

    def save(self, directory: str) -> None:
        """Write it so that after a crash the file is either the old or the new one, whole.

        :raises OSError: it cannot be written; the old one is untouched.
        """
        os.makedirs(directory, mode=0o700, exist_ok=True)
        path = _path(directory, self.uuid)
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with open(os.open(path + ".new", flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
        _sync_directory(directory)


def _path(directory: str, uuid: str) -> str:
    return os.path.join(directory, f"{uuid_module.UUID(uuid)}.json")


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(directory: str, uuid: str) -> ImageRecord | None:
    """The record of a server's images; None when there is none.

    One that cannot be read is set aside, with its reason in the log: its images are not ours then.

    :raises OSError: the directory cannot be read.
    """
    path = _path(directory, uuid)
    try:
        with open(path, encoding="utf-8") as file:
            return _parse(json.load(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        LOG.error("Record %s is unreadable (%s); kept as %s.broken", path, error, path)
        os.replace(path, path + ".broken")
        return None


def _parse(data: dict[str, Any]) -> ImageRecord:
    if data.pop("version") != _VERSION or data["role"] not in ("standby", "primary"):
        raise ValueError("not a record of this version")
    images = []
    for entry in data["images"]:
        inode, mark = entry["inode"], entry["stamp"]
        images.append(
            Image(
                DiskSpec.from_dict(entry["disk"]),
                None if inode is None else int(inode),
                None if mark is None else (int(mark[0]), int(mark[1]), int(mark[2])),
            )
        )
    at = data["consistent"]
    return ImageRecord(
        str(data["uuid"]),
        data["role"],
        tuple(images),
        tuple(str(path) for path in data["directories"]),
        None if at is None else (int(at[0]), int(at[1])),
    )


def note_primary(directory: str, uuid: str, disks: Sequence[DiskSpec]) -> None:
    """Record the images of a primary on this host.

    When it loses, a standby of the same server may be made over them.

    :param directory: of the records.
    :raises OSError: it cannot be written down.
    """
    before = load(directory, uuid)
    images = []
    for disk in disks:
        with contextlib.suppress(FileNotFoundError):
            images.append(Image(disk, os.lstat(disk.path).st_ino))
    directories = before.directories if before is not None else ()
    ImageRecord(uuid, "primary", tuple(images), directories).save(directory)


def forget(directory: str, uuid: str) -> None:
    """The images at a server's paths are not ours any more; nothing happens when none were.

    :raises OSError: the record cannot be deleted.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(directory, uuid))
        _sync_directory(directory)
