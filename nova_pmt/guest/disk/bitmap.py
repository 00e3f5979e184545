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

"""What a disk of a guest got since the standby was lost, so that only that is copied again.

Three parts together tell what the standby's image lacks: a dirty bitmap in QEMU, which records
from the break on; the entries of the log that were not committed at the break; and which image
that holds for. The last two are the :class:`Note`, a file in the guest's directory. Order at a
break: delete the note, :func:`keep` the bitmaps, take the logs off, read what they have that is
not committed, write the note. A bitmap dies with its QEMU, so a note without bitmaps is void.

After the first commit of the next protection: delete the note, then :func:`drop` the bitmaps. If
that protection breaks before, leave both as they are: the bitmap has recorded all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nova_pmt import exception
from nova_pmt.guest.disk.discover import GuestDisk, image_node
from nova_pmt.guest.disk.spec import SECTOR
from nova_pmt.guest.monitor import Monitor, QmpCommandError

NAME = "nova-pmt-resync"
#: A copy of it that does not change while it is read.
FROZEN = "nova-pmt-copy"
GRANULARITY_BYTES = 64 << 10
NOTE = "resync.json"
MAX_RANGES = 10_000
_MAX_NOTE_BYTES = 16 << 20

Ranges = list[tuple[int, int]]


def _bitmaps(disk: GuestDisk, monitor: Monitor) -> dict[str, dict[str, Any]]:
    name = image_node(disk, monitor)
    for node in monitor.execute("query-named-block-nodes", flat=True):
        if node.get("node-name") == name:
            return {str(entry.get("name")): entry for entry in node.get("dirty-bitmaps", [])}
    raise exception.GuestError(f"QEMU has no block node '{name}'")


def _add(disk: GuestDisk, monitor: Monitor, name: str, *, disabled: bool) -> None:
    monitor.execute(
        "block-dirty-bitmap-add",
        node=image_node(disk, monitor),
        name=name,
        granularity=GRANULARITY_BYTES,
        persistent=False,
        disabled=disabled,
    )


def _remove(disk: GuestDisk, monitor: Monitor, name: str) -> None:
    try:
        monitor.execute("block-dirty-bitmap-remove", node=image_node(disk, monitor), name=name)
    except QmpCommandError:
        if name in _bitmaps(disk, monitor):
            raise


def keep(disk: GuestDisk, monitor: Monitor) -> None:
    """Record from now on what is written. One that records already goes on.

    :raises nova_pmt.exception.GuestError: QEMU refused.
    """
    if not has(disk, monitor):
        _remove(disk, monitor, NAME)
        _add(disk, monitor, NAME, disabled=False)


def has(disk: GuestDisk, monitor: Monitor) -> bool:
    """Whether a bitmap of ours records."""
    return bool(_bitmaps(disk, monitor).get(NAME, {}).get("recording"))


def drop(disk: GuestDisk, monitor: Monitor) -> None:
    """Take our bitmaps off the disk. Idempotent.

    :raises nova_pmt.exception.GuestError: QEMU refused.
    """
    thaw(disk, monitor)
    _remove(disk, monitor, NAME)


def freeze(disk: GuestDisk, monitor: Monitor) -> str:
    """Make a copy of the bitmap that can be exported, while the bitmap records on.

    :returns: its name.
    :raises nova_pmt.exception.GuestError: QEMU refused, or there is no bitmap.
    """
    thaw(disk, monitor)
    _add(disk, monitor, FROZEN, disabled=True)
    monitor.execute(
        "block-dirty-bitmap-merge", node=image_node(disk, monitor), target=FROZEN, bitmaps=[NAME]
    )
    return FROZEN


def thaw(disk: GuestDisk, monitor: Monitor) -> None:
    """Take that copy off. Idempotent.

    :raises nova_pmt.exception.GuestError: QEMU refused.
    """
    _remove(disk, monitor, FROZEN)


def coalesce(ranges: Iterable[tuple[int, int]], limit: int, size: int = 1 << 62) -> Ranges:
    """The same bytes, and if need be more, as few ranges (offset, length), ascending.

    :param limit: most ranges; those with the least between them become one.
    :param size: of the disk; what lies beyond is left out.
    """
    merged: list[list[int]] = []
    for offset, length in sorted(ranges):
        end = min(offset + length, size)
        if offset >= end:
            continue
        if merged and offset <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([offset, end])
    surplus = len(merged) - max(1, limit)
    if surplus > 0:
        by_gap = sorted(range(1, len(merged)), key=lambda at: merged[at][0] - merged[at - 1][1])
        joined = set(by_gap[:surplus])
        fewer: list[list[int]] = []
        for at, (start, end) in enumerate(merged):
            if at in joined:
                fewer[-1][1] = end
            else:
                fewer.append([start, end])
        merged = fewer
    return [(start, end - start) for start, end in merged]


@dataclass(frozen=True)
class Note:
    """Which image of the standby the bitmaps hold for, and what it lacks besides.

    :param generation: of the pair that broke.
    :param epoch: the last one that was committed then; the standby's image has it or a later one.
    :param ranges: by name of the disk, (offset, length) of uncommitted writes, in bytes.
    """

    generation: int
    epoch: int
    ranges: Mapping[str, Ranges] = field(default_factory=dict)

    def write(self, directory: str) -> None:
        """Put it into the guest's directory, whole or not at all.

        :raises OSError: it cannot be written.
        """
        data = {
            "generation": self.generation,
            "epoch": self.epoch,
            "ranges": {name: coalesce(ranges, MAX_RANGES) for name, ranges in self.ranges.items()},
        }
        path = os.path.join(directory, NOTE)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path + ".new", flags, 0o600), "w", encoding="ascii") as file:
            json.dump(data, file)
        os.replace(path + ".new", path)

    @classmethod
    def read(cls, directory: str) -> Note | None:
        """The note in the guest's directory; None when there is none that makes sense."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            with open(os.open(os.path.join(directory, NOTE), flags), "rb") as file:
                data = json.loads(file.read(_MAX_NOTE_BYTES))
            return cls._from_dict(data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> Note:
        generation, epoch = data["generation"], data["epoch"]
        ranges = {
            name: [(offset, length) for offset, length in entries]
            for name, entries in data["ranges"].items()
        }
        numbers = [
            generation,
            epoch,
            *(n for pairs in ranges.values() for pair in pairs for n in pair),
        ]
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ValueError("not a note")
        if any(n % SECTOR for pairs in ranges.values() for pair in pairs for n in pair):
            raise ValueError("ranges are not of whole sectors")
        return cls(generation, epoch, ranges)

    @staticmethod
    def delete(directory: str) -> None:
        """Remove it, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, NOTE))
