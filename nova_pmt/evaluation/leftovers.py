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

"""What is left on a host of a guest's older arrangements, when nothing should be.

Images of its disks and the records of them stay on purpose: the next standby there needs only what
has changed since.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from nova_pmt.exception import LabError
from nova_pmt.lab import LabGuest, LabHost, libvirtd

Part = Literal["primary", "standby", ""]

_RUNTIME = "/run/nova_pmt"
_RECORDS = "/var/lib/nova_pmt/pairs"
#: Programs of a pair, and how many of them each part has of one guest. (A standby's storage daemon
#: comes with its disks.)
_PROGRAMS: Mapping[str, Mapping[Part, int]] = {
    "qemu-system-x86_64": {"primary": 1, "standby": 1},
    "nova_pmt.cmd.worker": {"primary": 1, "standby": 1},
    "qemu-storage-daemon": {"standby": 1},
}
#: Ports of ``[replication] port_range``.
_PORTS = range(61152, 61408)
#: States in /proc/net/tcp of sockets that somebody has open, and their names.
_OPEN = {"01": "established", "02": "connecting", "08": "closed by its peer", "0A": "listening"}
_NAMESPACES = ("mnt", "net", "ipc", "uts")
_OBJECTS = '{"execute": "qom-list", "arguments": {"path": "/objects"}}'
#: What the egress buffers call their objects in QEMU.
_PREFIX = "nova-pmt-"


def interfaces(host: LabHost) -> frozenset[str]:
    """Names of a host's network interfaces."""
    lines = Path(f"/proc/{host.init_pid}/net/dev").read_text().splitlines()[2:]
    return frozenset(line.partition(":")[0].strip() for line in lines)


def leftovers(
    host: LabHost, guest: LabGuest, part: Part, before: frozenset[str] = frozenset()
) -> list[str]:
    """What is on the host that does not belong to its part in the guest's pair.

    :param part: empty: it has none.
    :param before: interfaces that the host had before there was any guest.
    """
    found = [
        *_processes(host, part),
        *_sockets(host, part),
        *_interfaces(host, part, before),
        *_objects(host, guest, part),
    ]
    if not part:
        found += _files(host, guest)
    return [f"{host.name}: {line}" for line in found]


def _processes(host: LabHost, part: Part) -> Iterable[str]:
    commands = host.commands()
    for program, allowed in _PROGRAMS.items():
        pids = [pid for pid, words in commands.items() if is_program(words, program)]
        most = allowed.get(part, 0)
        if len(pids) > most:
            yield f"{len(pids)} {program} (pids {sorted(pids)}), {most} expected"
    for kind in _NAMESPACES:
        # (A process that has ended meanwhile is not left over.)
        with contextlib.suppress(OSError):
            own = os.readlink(f"/proc/{host.init_pid}/ns/{kind}")
            for pid in commands:
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/ns/{kind}") != own:
                        yield f"process {pid} is in a {kind} namespace of its own"


def is_program(words: list[str], program: str) -> bool:
    """Whether a command line runs a program, or a Python module of that name."""
    return os.path.basename(words[0]) == program or program in words[1:4]


def _sockets(host: LabHost, part: Part) -> Iterable[str]:
    lines = Path(f"/proc/{host.init_pid}/net/tcp").read_text().splitlines()[1:]
    seen = []
    for line in lines:
        local, remote, state = line.split()[1:4]
        ports = {int(end.rpartition(":")[2], 16) for end in (local, remote)}
        if state in _OPEN and any(port in _PORTS for port in ports):
            seen.append(_OPEN[state])
    if part and "established" in seen:
        seen.remove("established")
    for state in seen:
        yield f"a replication socket that is {state}"


def _interfaces(host: LabHost, part: Part, before: frozenset[str]) -> Iterable[str]:
    """Taps of guests that are gone, and whatever an egress buffer has made."""
    if not before:
        return
    extra = sorted(interfaces(host) - before)
    taps = [name for name in extra if name.startswith("vnet")]
    for name in extra if not part else [name for name in extra if name not in taps[:1]]:
        yield f"network interface {name}"


def _objects(host: LabHost, guest: LabGuest, part: Part) -> Iterable[str]:
    """Filters of the egress buffer: two for each NIC of a primary, none anywhere else."""
    if not part:
        return  # there is no QEMU, or that is told already
    command = ["virsh", "qemu-monitor-command", guest.name, _OBJECTS]
    try:
        answer = json.loads(host.run(command, timeout=10).stdout)["return"]
    except (LabError, ValueError, KeyError) as error:
        yield f"its QEMU does not tell of its filters: {error}"
        return
    names = sorted(entry["name"] for entry in answer if entry["name"].startswith(_PREFIX))
    expected = 2 * len(guest.spec.macs) if part == "primary" else 0
    if len(names) != expected:
        yield f"filters {', '.join(names) or 'none'}, {expected} expected"


def _files(host: LabHost, guest: LabGuest) -> Iterable[str]:
    """Of a host without a part in the pair."""
    for pattern in (f"{_RUNTIME}/*/{guest.uuid}*", f"{_RECORDS}/{guest.uuid}*"):
        for path in _glob(host, pattern):
            inside = [path / name for name in os.listdir(path)] if path.is_dir() else [path]
            yield from (f"file {shown(host, file)}" for file in inside)
    for path in _glob(host, f"{libvirtd.MEMORY_BACKING}/**/*{guest.name}*"):
        yield f"memory {shown(host, path)}"


def _glob(host: LabHost, pattern: str) -> list[Path]:
    root = host.path("/")
    return sorted(root.glob(pattern.lstrip("/")))


def shown(host: LabHost, path: Path) -> str:
    """A path as the host has it."""
    return "/" + str(path.relative_to(host.path("/")))
