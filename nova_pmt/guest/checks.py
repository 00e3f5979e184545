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

"""What cannot be protected, told from a domain's XML before anything is changed.

Pure functions on XML: each returns the typed refusals it finds.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from nova_pmt import exception
from nova_pmt.exception import Refusal

GIB = 1 << 30
_UNITS = {"b": 1, "bytes": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
_UNITS |= {"g": GIB, "gib": GIB, "t": GIB << 10, "tib": GIB << 10}
TMPFS_MAGIC, HUGETLBFS_MAGIC = 0x01021994, 0x958458F6
#: Left to the standby host when it takes a guest in.
MEMORY_RESERVE_BYTES = 256 << 20


def _size(element: ET.Element, default_unit: str = "KiB") -> int:
    unit = element.get("unit", default_unit).lower()
    value = element.get("size") or (element.text or "0").strip()
    return int(value) * _UNITS.get(unit, 1 << 10)


def _devices(root: ET.Element) -> Iterator[Refusal]:
    devices = root.find("devices")
    if devices is None:
        return
    for interface in devices.findall("interface"):
        kind = interface.get("type")
        if kind in ("vhostuser", "vdpa", "hostdev"):
            mac = interface.find("mac")
            yield exception.UnsupportedDevice(
                f"network interface {mac.get('address') if mac is not None else '?'} is of type "
                f"'{kind}': another process or device writes guest memory, unseen by the tracker"
            )
    for hostdev in devices.findall("hostdev"):
        yield exception.UnsupportedDevice(
            f"host device of type '{hostdev.get('type')}' is passed through (VFIO or similar)"
        )
    for filesystem in devices.findall("filesystem"):
        driver = filesystem.find("driver")
        kind = driver.get("type") if driver is not None else "path"
        yield exception.UnsupportedDevice(f"shared file system ({kind}) cannot follow to a standby")
    for disk in devices.findall("disk"):
        target = disk.find("target")
        name = target.get("dev") if target is not None else "?"
        if disk.get("type") in ("vhostuser", "vhostvdpa", "nvme"):
            yield exception.UnsupportedDevice(
                f"disk {name} is of type '{disk.get('type')}': another process or device writes "
                "guest memory, unseen by the tracker"
            )
        elif disk.find("source") is not None and disk.find("readonly") is None:
            yield exception.DiskNotReplicated(
                f"disk {name} is writable, and disks are not replicated yet"
            )
    for driver in devices.findall("video/driver"):
        if driver.get("name") == "vhostuser":
            yield exception.UnsupportedDevice("the graphics card is a vhost-user device")
    for tag, what in (
        ("shmem", "memory shared with other guests"),
        ("tpm", "a TPM, whose state lies outside QEMU"),
        ("memory", "hot-pluggable memory (DIMM, virtio-mem or NVDIMM)"),
    ):
        if devices.find(tag) is not None:
            yield exception.UnsupportedDevice(f"the server has {what}")


def _memory(root: ET.Element) -> Iterator[Refusal]:
    for page in root.findall("memoryBacking/hugepages/page"):
        if _size(page) >= GIB:
            yield exception.UnsupportedMemory("memory is backed by huge pages of 1 GiB")


def _machine(root: ET.Element) -> Iterator[Refusal]:
    kind = root.find("os/type")
    arch = kind.get("arch") if kind is not None else None
    if arch != "x86_64":
        yield exception.Refusal(
            f"guest architecture is {arch}, not x86_64",
            code="UNSUPPORTED_ARCHITECTURE",
            cure="Only x86-64 guests on x86-64 hosts can be protected.",
        )
    if root.find("launchSecurity") is not None:
        yield exception.UnsupportedMemory(
            "memory is encrypted (launchSecurity)",
            cure="Confidential guests cannot be protected: their memory cannot be read.",
        )
    if root.find("os/nvram") is not None:
        yield exception.DiskNotReplicated(
            "UEFI variables (nvram) are writable, and not replicated yet"
        )


def refusals(xml: str) -> list[Refusal]:
    """Everything in a domain's XML for which protection must be refused."""
    root = ET.fromstring(xml)
    return [*_machine(root), *_memory(root), *_devices(root)]


def warnings(xml: str) -> list[str]:
    """What an operator should know, though it does not hinder protection."""
    root = ET.fromstring(xml)
    found = []
    if root.find("devices/interface") is not None:
        found.append(
            "network output is not held until commit in this release: a client may have seen "
            "what a failover takes back"
        )
    if "qemu:commandline" not in xml and "/qmp/" not in xml:
        found.append("no monitor of its own: pauses go through libvirt and are some ms longer")
    return found


def standby_memory(directory: str, needed_bytes: int) -> list[Refusal]:
    """Whether this host can hold a standby of this size.

    :param directory: libvirt's memory_backing_dir.
    """
    parent = directory
    while not os.path.isdir(parent) and parent != "/":
        parent = os.path.dirname(parent)
    if _file_system(parent) not in (TMPFS_MAGIC, HUGETLBFS_MAGIC):
        return [
            exception.UnsupportedMemory(
                f"memory_backing_dir {directory} is not on tmpfs or hugetlbfs",
                code="BACKING_NOT_IN_MEMORY",
                cure="Mount a tmpfs there, or set memory_backing_dir in /etc/libvirt/qemu.conf and "
                "[guest] memory_backing_dir to a directory on one (for instance /dev/shm/libvirt).",
            )
        ]
    found: list[Refusal] = []
    status = os.statvfs(parent)
    room = status.f_bavail * status.f_frsize
    if room < needed_bytes:
        found.append(
            exception.TooLittleMemory(
                f"{directory} has {room >> 20} MiB free, the standby needs {needed_bytes >> 20} MiB"
            )
        )
    available = _available_memory()
    if available < needed_bytes + MEMORY_RESERVE_BYTES:
        found.append(
            exception.TooLittleMemory(
                f"the host has {available >> 20} MiB of memory available, the standby needs "
                f"{(needed_bytes + MEMORY_RESERVE_BYTES) >> 20} MiB"
            )
        )
    return found


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


def _file_system(path: str) -> int:
    """Magic number of the file system, as statfs(2) gives it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return 0
    return ctypes.c_long.from_buffer(buffer).value
