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

"""What cannot be protected, told before anything is changed.

:func:`refusals` and :func:`warnings` are pure functions on a domain's XML;
:func:`disk_problems` and :func:`standby_memory` look at this host's file systems.
"""

from __future__ import annotations

import ctypes
import os
import stat
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from nova_pmt import exception
from nova_pmt.exception import Refusal

GIB = 1 << 30
_UNITS = {"b": 1, "bytes": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
_UNITS |= {"g": GIB, "gib": GIB, "t": GIB << 10, "tib": GIB << 10}
TMPFS_MAGIC, HUGETLBFS_MAGIC = 0x01021994, 0x958458F6
#: File systems that other hosts may have mounted too; names as statfs(2) and its kin give them.
#: FUSE is among them: GlusterFS, CephFS, sshfs and virtiofs all come as FUSE.
SHARED_FILE_SYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB2",
    0xFF534D42: "CIFS",
    0x00C36400: "CephFS",
    0x65735546: "FUSE",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0xAAD7AAEA: "PanFS",
    0xA501FCF5: "VxFS",
    0x5346414F: "AFS",
    0x01021997: "9p",
}
DISK_FORMATS = ("qcow2", "raw")
#: Buses whose devices let a filter be put above a disk while the guest runs.
WRITABLE_BUSES = ("virtio", "scsi")
#: Left to the standby host when it takes a guest in.
MEMORY_RESERVE_BYTES = 256 << 20


def _size(element: ET.Element, default_unit: str = "KiB") -> int:
    unit = element.get("unit", default_unit).lower()
    value = element.get("size") or (element.text or "0").strip()
    return int(value) * _UNITS.get(unit, 1 << 10)


def _disk_name(disk: ET.Element) -> str:
    target = disk.find("target")
    return target.get("dev", "?") if target is not None else "?"


def disk_is_readonly(disk: ET.Element) -> bool:
    """Whether a ``<disk>`` cannot be written: it is copied once."""
    return disk.find("readonly") is not None or disk.get("device") == "cdrom"


def _scsi_model(disk: ET.Element, devices: ET.Element) -> str:
    """Model of the controller that a disk on bus ``scsi`` hangs on."""
    address = disk.find("address")
    index = address.get("controller", "0") if address is not None else "0"
    for controller in devices.findall("controller[@type='scsi']"):
        if controller.get("index", "0") == index:
            return controller.get("model", "?")
    return "?"


def _disk(disk: ET.Element, devices: ET.Element) -> Iterator[Refusal]:
    """What hinders the replication of one ``<disk>``."""
    name, kind = _disk_name(disk), disk.get("type", "file")
    source = disk.find("source")
    if kind in ("vhostuser", "vhostvdpa", "nvme"):
        yield exception.UnsupportedDevice(
            f"disk {name} is of type '{kind}': another process or device writes guest memory, "
            "unseen by the tracker"
        )
        return
    if source is None:
        return  # an empty drive
    if kind in ("network", "volume"):
        yield exception.SharedStorage(f"disk {name} is of type '{kind}'")
        return
    if kind != "file":
        yield exception.UnsupportedDisk(
            f"disk {name} is of type '{kind}': only image files are replicated"
        )
        return
    if source.get("file"):
        yield from _file_disk(disk, source, name, devices)


def _file_disk(
    disk: ET.Element, source: ET.Element, name: str, devices: ET.Element
) -> Iterator[Refusal]:
    driver = disk.find("driver")
    options = driver.attrib if driver is not None else {}
    form = options.get("type", "raw")
    if form not in DISK_FORMATS:
        yield exception.UnsupportedDisk(f"disk {name} has format '{form}', not qcow2 or raw")
    if disk.find("encryption") is not None or source.find("encryption") is not None:
        yield exception.UnsupportedDisk(
            f"disk {name} is encrypted by QEMU",
            cure="Encrypt inside the guest instead, or leave the server unprotected.",
        )
    if disk.find("mirror") is not None:
        yield exception.UnsupportedDisk(
            f"a block job runs on disk {name}",
            cure="Wait for the end of the job ('virsh blockjob'), or abort it.",
        )
    for tag, what in (
        ("transient", "is transient: its changes lie in a file that libvirt made for them"),
        ("throttlefilters", "has throttle filters"),
    ):
        if disk.find(tag) is not None:
            yield exception.UnsupportedDisk(f"disk {name} {what}")
    for tag, what in (
        ("slices", "is a part of its file only"),
        ("dataStore", "keeps its data in a second file"),
    ):
        if source.find(tag) is not None:
            yield exception.UnsupportedDisk(f"disk {name} {what}")
    if source.get("fdgroup") is not None:
        yield exception.UnsupportedDisk(f"disk {name} was handed to libvirt as a descriptor")
    if options.get("copy_on_read") == "on":
        yield exception.UnsupportedDisk(f"disk {name} copies on read")
    if not disk_is_readonly(disk):
        yield from _writable_disk(disk, name, devices)


def _writable_disk(disk: ET.Element, name: str, devices: ET.Element) -> Iterator[Refusal]:
    if disk.find("shareable") is not None:
        yield exception.SharedStorage(f"disk {name} is shareable: another server may write to it")
    target = disk.find("target")
    bus = target.get("bus", "?") if target is not None else "?"
    model = _scsi_model(disk, devices) if bus == "scsi" else "virtio"
    if bus not in WRITABLE_BUSES or not model.startswith("virtio"):
        on = f"on a '{model}' controller" if bus in WRITABLE_BUSES else f"on bus '{bus}'"
        yield exception.UnsupportedDisk(
            f"disk {name} is writable and {on}: its writes cannot be logged",
            cure="Put the disk on bus virtio, or on bus scsi with a virtio-scsi controller "
            "(image properties hw_disk_bus and hw_scsi_model), or detach it.",
        )
    if _error_policy(disk) == "ignore":
        yield exception.UnsupportedDisk(
            f"disk {name} ignores write errors (error_policy='ignore'): a write that is missing "
            "in its log would go unseen",
            cure="Remove error_policy from the disk's <driver>, or set it to 'stop'.",
        )
    if disk.get("device", "disk") != "disk":
        yield exception.UnsupportedDisk(f"{disk.get('device')} {name} is writable")


def _error_policy(disk: ET.Element) -> str:
    driver = disk.find("driver")
    return driver.get("error_policy", "") if driver is not None else ""


def disk_refusals(xml: str) -> list[Refusal]:
    """What hinders the replication of the disks in a domain's XML; part of :func:`refusals`."""
    devices = ET.fromstring(xml).find("devices")
    return [] if devices is None else list(_disks(devices))


def _disks(devices: ET.Element) -> Iterator[Refusal]:
    for disk in devices.findall("disk"):
        yield from _disk(disk, devices)


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
    yield from _disks(devices)
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
    found = []
    if "qemu:commandline" not in xml and "/qmp/" not in xml:
        found.append("no monitor of its own: pauses go through libvirt and are some ms longer")
    for disk in ET.fromstring(xml).findall("devices/disk"):
        if _error_policy(disk) == "report" and not disk_is_readonly(disk):
            found.append(
                f"disk {_disk_name(disk)} reports write errors to the guest (error_policy="
                "'report'): it sees one when the disk's log is full, and not only its host"
            )
    return found


def disk_problems(xml: str) -> list[Refusal]:
    """Which disks of a domain on this host lie where they cannot be replicated from.

    :param xml: of a domain that passed :func:`refusals`.
    """
    found: list[Refusal] = []
    for disk in ET.fromstring(xml).findall("devices/disk"):
        source = disk.find("source")
        path = source.get("file") if source is not None else None
        if disk.get("type", "file") == "file" and path:
            found += _image_problems(_disk_name(disk), path)
    return found


def _image_problems(name: str, path: str) -> list[Refusal]:
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return [
            exception.UnsupportedDisk(
                f"the image of disk {name} cannot be found: {path}: {error.strerror}",
                cure="Bring the image back to its path, or detach the disk.",
            )
        ]
    if not regular:
        return [
            exception.UnsupportedDisk(
                f"disk {name}: {path} is no regular file: only image files are replicated"
            )
        ]
    kind = SHARED_FILE_SYSTEMS.get(file_system(path))
    if kind:
        return [exception.SharedStorage(f"the image of disk {name}, {path}, is on {kind}")]
    return []


def standby_memory(directory: str, needed_bytes: int) -> list[Refusal]:
    """Whether this host can hold a standby of this size.

    :param directory: libvirt's memory_backing_dir.
    """
    parent = directory
    while not os.path.isdir(parent) and parent != "/":
        parent = os.path.dirname(parent)
    if file_system(parent) not in (TMPFS_MAGIC, HUGETLBFS_MAGIC):
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


def file_system(path: str) -> int:
    """Magic number of the file system, as statfs(2) gives it."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return 0
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF
