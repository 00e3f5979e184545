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

"""Which disks a running guest has: what libvirt says of them, and where they are in its QEMU."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

from nova_pmt import exception
from nova_pmt.exception import Refusal
from nova_pmt.guest import checks
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.monitor import Monitor, QmpCommandError

#: Names of the block nodes that are ours: the filter above a disk, and the file it writes to.
FILTER_PREFIX, FILE_PREFIX = "pmt-log-", "pmt-file-"
#: What QEMU must know for the replication of disks.
COMMANDS = (
    "blockdev-add",
    "blockdev-del",
    "qom-set",
    "nbd-server-start",
    "block-export-add",
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-merge",
)
#: Drivers of the block node that a disk of a format has in QEMU. libvirt 10 and newer leave the
#: node of the format out for raw images.
DRIVERS = {"qcow2": ("qcow2",), "raw": ("raw", "file")}
_PROBE = "pmt-probe"
#: A node's name has at most 31 characters, so nodes are named after the target, not the alias.
_TARGET = re.compile(r"[a-z]{2,6}[a-z0-9]{0,6}")
_ALIAS = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class GuestDisk:
    """A disk of a running guest.

    :param alias: libvirt's device alias (``virtio-disk0``).
    :param qom_path: of the object in QEMU that has the property ``drive``.
    :param node: block node of the image when it was looked for, below any filter of ours. An
        external snapshot puts another in its place: :func:`image_node` is what is there now.
    :param discard: discards of the guest reach the image, also while they are logged.
    """

    spec: DiskSpec
    alias: str
    qom_path: str
    node: str
    discard: bool = False

    @property
    def filter_node(self) -> str:
        """Name of the filter that logs its writes."""
        return FILTER_PREFIX + self.spec.name

    @property
    def file_node(self) -> str:
        """Name of the node of the filter's log."""
        return FILE_PREFIX + self.spec.name


def disks(xml: str, monitor: Monitor) -> tuple[GuestDisk, ...]:
    """The guest's disks that are replicated, in the order of the XML. Changes nothing.

    :param xml: of the running domain, with its aliases (not the one for migration).
    :raises nova_pmt.exception.Refusal: one of them cannot be replicated.
    :raises nova_pmt.exception.GuestError: QEMU has not what libvirt says.
    """
    for refusal in checks.disk_refusals(xml):
        raise refusal
    nodes = {
        str(node.get("node-name", "")): node
        for node in monitor.execute("query-named-block-nodes", flat=True)
    }
    found = []
    for disk in ET.fromstring(xml).findall("devices/disk"):
        source = disk.find("source")
        path = source.get("file") if source is not None else None
        if path:
            found.append(_disk(disk, path, nodes, monitor))
    return tuple(found)


def _disk(
    disk: ET.Element, path: str, nodes: dict[str, dict[str, Any]], monitor: Monitor
) -> GuestDisk:
    target, alias_element, driver = disk.find("target"), disk.find("alias"), disk.find("driver")
    name = target.get("dev", "") if target is not None else ""
    alias = alias_element.get("name", "") if alias_element is not None else ""
    if not _TARGET.fullmatch(name) or not _ALIAS.fullmatch(alias):
        raise exception.GuestError(f"libvirt names no target and alias of disk '{name}' ({path})")
    qom_path = f"/machine/peripheral/{alias}"
    if target is not None and target.get("bus") == "virtio":
        qom_path += "/virtio-backend"
    node = below_filters(attached_node(qom_path, monitor), monitor)
    info = nodes.get(node)
    if info is None:
        raise exception.GuestError(f"QEMU has no named block node behind disk {name} ('{node}')")
    options = driver.attrib if driver is not None else {}
    form = options.get("type", "raw")
    if info.get("drv") not in DRIVERS[form]:
        raise exception.UnsupportedDisk(
            f"disk {name} is {form} for libvirt, but '{info.get('drv')}' in QEMU",
            cure="End block jobs and remove filters on this disk, or detach it.",
        )
    file = str(info.get("file", path))
    if not file.startswith("json:") and file != path:
        raise exception.GuestError(f"disk {name} is {path} for libvirt, but {file} in QEMU")
    readonly = checks.disk_is_readonly(disk)
    if bool(info.get("ro")) != readonly:
        says = "read-only" if readonly else "writable"
        raise exception.GuestError(f"disk {name} is {says} for libvirt, but not in QEMU")
    image = info.get("image") or {}
    spec = {
        "name": name,
        "format": form,
        "path": path,
        "size": image.get("virtual-size"),
        "readonly": readonly,
        "cluster_bytes": image.get("cluster-size", 0) if form == "qcow2" else 0,
    }
    try:
        return GuestDisk(
            DiskSpec.from_dict(spec),
            alias,
            qom_path,
            node,
            options.get("discard") == "unmap" and not _discards_strangely(image),
        )
    except (TypeError, ValueError) as error:
        raise exception.UnsupportedDisk(f"disk {name} cannot be replicated: {error}") from error


def _discards_strangely(image: dict[str, Any]) -> bool:
    """Whether discarded parts do not read as zeros: qcow2 of the old kind shows its backing file.

    The standby has no backing file, so such discards are left undone while they are logged.
    """
    data = (image.get("format-specific") or {}).get("data") or {}
    return bool(data.get("compat") == "0.10")


def image_node(disk: GuestDisk, monitor: Monitor) -> str:
    """The block node of the disk's image now, below any filter of ours.

    :raises nova_pmt.exception.GuestError: the disk was detached.
    """
    return below_filters(attached_node(disk.qom_path, monitor), monitor)


def attached_node(qom_path: str, monitor: Monitor) -> str:
    """The block node that a device works on now.

    :raises nova_pmt.exception.GuestError: there is no such device, or nothing is in it.
    """
    for device, node in attached(monitor).items():
        # A USB device is a bus, with the disk below it.
        if node and (device == qom_path or device.startswith(qom_path + "/")):
            return node
    raise exception.GuestError(f"QEMU has no disk with a medium at {qom_path}")


def attached(monitor: Monitor) -> dict[str, str]:
    """QOM path of each block device to the node that it works on; empty where there is none."""
    found = {}
    for entry in monitor.execute("query-block"):
        device = str(entry.get("qdev", ""))
        if device and not device.startswith("/"):
            device = f"/machine/peripheral/{device}"
        found[device] = str((entry.get("inserted") or {}).get("node-name", ""))
    return found


def below_filters(node: str, monitor: Monitor) -> str:
    """The node itself, or the one below it when it is a filter of ours.

    :raises nova_pmt.exception.GuestError: QEMU does not tell what is below.
    """
    return nodes_below(node, monitor)[0] if node.startswith(FILTER_PREFIX) else node


def nodes_below(filter_node: str, monitor: Monitor) -> list[str]:
    """The nodes below a filter of ours: the image's, its file's, then those of backing files.

    :raises nova_pmt.exception.GuestError: QEMU does not tell.
    """
    for entry in monitor.execute("query-blockstats", **{"query-nodes": True}):
        if entry.get("node-name") == filter_node:
            found: list[str] = []
            _collect(entry.get("parent"), found)
            if found and not found[0].startswith((FILTER_PREFIX, FILE_PREFIX)):
                return found
    raise exception.GuestError(f"QEMU does not tell what lies below block node '{filter_node}'")


def _collect(entry: Any, found: list[str]) -> None:
    """Names in an answer of ``query-blockstats``: ``parent`` is what QEMU calls a child there."""
    if isinstance(entry, dict):
        if entry.get("node-name"):
            found.append(str(entry["node-name"]))
        _collect(entry.get("parent"), found)
        _collect(entry.get("backing"), found)


def _loses_zeroes(version: tuple[int, int, int]) -> bool:
    """Whether this QEMU writes a wrong log when the guest writes zeros beside other things.

    Repaired upstream by commit a9c8ea95470c (January 2024).
    """
    return (
        version < (7, 2, 9) or (8, 0, 0) <= version < (8, 1, 5) or (8, 2, 0) <= version < (8, 2, 1)
    )


def warnings(monitor: Monitor) -> list[str]:
    """What an operator should know of this QEMU's logs. No feature tells it, only the version."""
    qemu = monitor.execute("query-version")["qemu"]
    version = (int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
    if not _loses_zeroes(version):
        return []
    return [
        f"QEMU {'.'.join(map(str, version))} logs writes of zeros wrongly when they meet other "
        "writes (repaired in 7.2.9, 8.1.5 and 8.2.1): the standby notices, and the pair "
        "synchronises again each time"
    ]


def problems(monitor: Monitor) -> list[Refusal]:
    """Why this QEMU cannot replicate disks. Leaves it as it was. Empty: it can."""
    found: list[Refusal] = []
    names = {entry["name"] for entry in monitor.execute("query-commands")}
    missing = [command for command in COMMANDS if command not in names]
    if missing:
        return [exception.UnsupportedQemu(f"QEMU has no command '{missing[0]}'")]
    try:
        # The schema lists drivers that a distribution left out, so try it on an empty disk.
        monitor.execute(
            "blockdev-add",
            driver="blklogwrites",
            file={"driver": "null-co", "size": 512},
            log={"driver": "null-co", "size": 512},
            **{"node-name": _PROBE},
        )
        monitor.execute("blockdev-del", **{"node-name": _PROBE})
    except QmpCommandError as error:
        found.append(
            exception.UnsupportedQemu(
                f"QEMU has not the block driver 'blklogwrites': {error.message}",
                cure="Use a QEMU that has it: Debian's and Ubuntu's have, Red Hat's leave it out.",
            )
        )
    return found
