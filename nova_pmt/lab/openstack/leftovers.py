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
"""What a server, or its protection, has left behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from nova_pmt.lab import libvirtd
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.openstack import settings
from nova_pmt.lab.openstack.cloud import Cloud

#: Our driver's notes of standby servers, by host; the directories stay.
_NOTES = "pmt-standbys"
#: What Nova itself keeps among the instances, and that directory.
_KEPT = frozenset({"_base", "locks", "compute_nodes", "snapshots", _NOTES})
_STATE = "/var/lib/nova_pmt"


def find(cloud: Cloud, uuids: Iterable[str] = ()) -> list[str]:
    """What is there although no server is; in words.

    :param uuids: of servers that were there: they are to have no allocations.
    """
    found = [f"server {s.name} ({s.id})" for s in cloud.admin.compute.servers(all_projects=True)]
    found += [f"port {p.id} of {p.device_id}" for p in cloud.admin.network.ports() if p.device_id]
    for uuid in uuids:
        answer = cloud.admin.placement.get(f"/allocations/{uuid}").json()
        found += [f"allocation of {uuid} on {provider}" for provider in answer["allocations"]]
    for host in cloud.lab.computes:
        if host.powered:
            found += [f"{host.name}: {what}" for what in _of_host(host)]
    return found


def wait_none(cloud: Cloud, uuids: Iterable[str] = (), timeout: float = 120.0) -> list[str]:
    """What is still there after a while: some of it goes only some time after the server."""
    uuids = list(uuids)
    deadline = time.monotonic() + timeout
    while (left := attempt(lambda: find(cloud, uuids))) and time.monotonic() < deadline:
        time.sleep(1)
    return left


def attempt(look: Callable[[], list[str]]) -> list[str]:
    """What ``look`` finds; that it cannot look is a finding, too, so that it is asked again."""
    try:
        return look()
    except Exception as e:  # noqa: BLE001 - on a busy machine any question may fail once
        return [f"cannot be looked at: {type(e).__name__}: {e}"]


def _of_host(host: LabHost) -> list[str]:
    with host.libvirt() as connection:
        found = [f"domain {domain.name()}" for domain in connection.listAllDomains()]
    for pid, words in host.commands().items():
        # (libvirtd asks a QEMU without guest what it can do.)
        if words and "qemu-system" in words[0] and "-name" in words:
            found.append(f"process {pid} {words[words.index('-name') + 1]}")
        if any(word.endswith(("nova_pmt.cmd.worker", "qemu-storage-daemon")) for word in words[:4]):
            found.append(f"process {pid} {' '.join(words[:4])}")
    for directory, kept in (
        (f"{settings.NOVA_DIRECTORY}/instances", _KEPT),
        (f"{settings.NOVA_DIRECTORY}/instances/{_NOTES}/{host.name}", frozenset()),
        (libvirtd.MONITORS, frozenset()),
        (f"{_STATE}/pairs", frozenset()),
    ):
        found += [
            f"{directory}/{name}" for name in _names(host.path(directory)) if name not in kept
        ]
    # libvirt keeps the directories of memory files.
    backing = host.path(libvirtd.MEMORY_BACKING)
    found += [f"memory file {file.name}" for file in _files(backing)]
    taps = host.run(["sh", "-c", "ls /sys/class/net"]).stdout.split()
    found += [f"interface {name}" for name in taps if name.startswith("tap")]
    return found


def _names(directory: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(entry.name for entry in directory.iterdir())
    return []


def _files(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in directory.rglob("*") if path.is_file()]
    return []
