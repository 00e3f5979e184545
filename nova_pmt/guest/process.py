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

"""Facts about a QEMU process from /proc: its mappings, user, start time, a handle on its end."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nova_pmt import exception


@dataclass(frozen=True)
class Mapping:
    """One line of ``/proc/PID/maps``."""

    start: int
    end: int
    shared: bool
    offset: int
    device: str
    inode: int
    path: str

    @property
    def link(self) -> str:
        """Name below ``/proc/PID/map_files``."""
        return f"{self.start:x}-{self.end:x}"


def mappings(pid: int) -> list[Mapping]:
    """All mappings of a process, ascending.

    :raises nova_pmt.exception.GuestGone: there is no such process.
    """
    found = []
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                parts = line.split(maxsplit=5)
                start, end = (int(value, 16) for value in parts[0].split("-"))
                path = parts[5].strip() if len(parts) > 5 else ""
                found.append(
                    Mapping(
                        start,
                        end,
                        parts[1][3] == "s",
                        int(parts[2], 16),
                        parts[3],
                        int(parts[4]),
                        path,
                    )
                )
    except (FileNotFoundError, ProcessLookupError) as error:
        raise exception.GuestGone(f"process {pid} has ended") from error
    return found


def covering(pid: int, start: int, length: int) -> list[Mapping]:
    """The mappings behind an address range, ascending, without gaps.

    :raises nova_pmt.exception.GuestError: part of the range is not mapped.
    """
    found, at = [], start
    for mapping in mappings(pid):
        if mapping.start <= at < mapping.end:
            found.append(mapping)
            at = mapping.end
            if at >= start + length:
                return found
    raise exception.GuestError(f"{start:#x}+{length:#x} is not mapped in process {pid}")


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks after boot; names it for ever, with its pid."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rsplit(b")", 1)[1].split()[19])


#: ``PF_EXITING`` of a task's flags (include/linux/sched.h).
PF_EXITING = 0x4


def has_ended(pid: int, started: int) -> bool:
    """Whether a process has ended, or is past the point of no return of its exit.

    A killed QEMU closes its sockets before its process is gone, and the freeing of its memory
    lies between; from the kernel's flag on, none of its threads comes back to user space.

    :param started: its :func:`start_time`: another process with that pid is not it.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except OSError:
        return True
    return (
        int(fields[19]) != started or fields[0] in (b"Z", b"X") or bool(int(fields[6]) & PF_EXITING)
    )


def owner(pid: int) -> tuple[int, int]:
    """Effective user and group of a process."""
    status = os.stat(f"/proc/{pid}")
    return status.st_uid, status.st_gid


def is_qemu(pid: int) -> bool:
    """Whether the process is a QEMU system emulator."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            program = os.path.basename(file.read().split(b"\0", 1)[0])
    except OSError:
        return False
    return b"qemu" in program or program == b"kvm"
