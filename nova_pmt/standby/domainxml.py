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

"""The standby's domain, made from the primary's migratable XML.

The guest must not see a difference; only what is the host's own changes: memory becomes
a shared file, disks are flat images, QEMU waits for an incoming migration, and a monitor of
ours is added.
"""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
PMT_NS = "https://opendev.org/x/nova-pmt/standby/1.0"
ET.register_namespace("qemu", QEMU_NS)
ET.register_namespace("pmt", PMT_NS)
# Other tools look for the prefix that Nova uses.
ET.register_namespace("nova", "http://openstack.org/xmlns/libvirt/nova/1.1")
_OURS = re.compile(r"^unix:.*/qmp/[0-9a-f-]{36}\.sock,")


@dataclass(frozen=True)
class Mark:
    """Written into a standby's XML, so that it is known for one after a crash.

    :param persistent: whether the primary's domain is defined, and not only running.
    """

    generation: int
    primary_host: str
    persistent: bool


def monitor_path(qmp_directory: str, uuid: str) -> str:
    """Where the second monitor of a domain listens."""
    return os.path.join(qmp_directory, f"{uuid}.sock")


def _arguments(root: ET.Element) -> list[str]:
    """Arguments on QEMU's command line that are not ours."""
    values = [arg.get("value", "") for arg in root.iter(f"{{{QEMU_NS}}}arg")]
    kept, at = [], 0
    while at < len(values):
        pair = values[at : at + 2]
        if len(pair) == 2 and (
            pair[0] == "-incoming" or (pair[0] == "-qmp" and _OURS.match(pair[1]))
        ):
            at += 2
            continue
        kept.append(values[at])
        at += 1
    return kept


def _set_arguments(root: ET.Element, values: list[str]) -> None:
    for old in root.findall(f"{{{QEMU_NS}}}commandline"):
        if old.find(f"{{{QEMU_NS}}}env") is None:
            root.remove(old)
        else:
            for arg in old.findall(f"{{{QEMU_NS}}}arg"):
                old.remove(arg)
    if values:
        commandline = root.find(f"{{{QEMU_NS}}}commandline")
        if commandline is None:
            commandline = ET.SubElement(root, f"{{{QEMU_NS}}}commandline")
        for value in values:
            ET.SubElement(commandline, f"{{{QEMU_NS}}}arg", {"value": value})


def _memory_in_file(root: ET.Element) -> None:
    backing = root.find("memoryBacking")
    if backing is None:
        backing = ET.Element("memoryBacking")
        # libvirt's schema is order-free here; after <currentMemory> is where it writes it itself
        root.insert(list(root).index(root.find("memory") or root[0]) + 1, backing)
    for tag in ("source", "access", "hugepages", "allocation", "discard"):
        for old in backing.findall(tag):
            backing.remove(old)
    ET.SubElement(backing, "source", {"type": "file"})
    ET.SubElement(backing, "access", {"mode": "shared"})
    for cell in root.findall("cpu/numa/cell"):
        cell.set("memAccess", "shared")


def _flat_disks(root: ET.Element) -> None:
    """Each disk's image is one file without a backing file; its path is the primary's."""
    for disk in root.findall("devices/disk"):
        for tag in ("backingStore", "mirror"):
            for old in disk.findall(tag):
                disk.remove(old)
        for source in disk.findall("source"):
            source.attrib.pop("index", None)
            for label in source.findall("seclabel"):
                source.remove(label)


def _host_details(root: ET.Element) -> None:
    """Take out what the primary's host chose and the standby's host must choose anew."""
    root.attrib.pop("id", None)
    for label in root.findall("seclabel"):
        root.remove(label)
    _flat_disks(root)
    for interface in root.findall("devices/interface"):
        target = interface.find("target")
        if target is not None and target.get("dev", "").startswith(("vnet", "macvtap")):
            interface.remove(target)
    for device in [*root.findall("devices/serial"), *root.findall("devices/console")]:
        device.attrib.pop("tty", None)
        source = device.find("source")
        if device.get("type") == "pty" and source is not None:
            device.remove(source)
    for graphics in root.findall("devices/graphics"):
        if graphics.get("autoport") == "yes":
            graphics.attrib.pop("port", None)
            graphics.attrib.pop("tlsPort", None)
        for listen in graphics.findall("listen"):
            if listen.get("address") not in (None, "0.0.0.0", "::", "127.0.0.1"):
                listen.set("address", "127.0.0.1")
                graphics.set("listen", "127.0.0.1")


def standby_xml(primary_xml: str, qmp_path: str, mark: Mark) -> str:
    """XML of a domain that waits for the state of the primary.

    :param primary_xml: the primary's XML, from libvirt with the flag for migration.
    :param qmp_path: where the standby's second monitor shall listen.
    """
    root = ET.fromstring(primary_xml)
    _memory_in_file(root)
    _host_details(root)
    _set_arguments(
        root,
        [*_arguments(root), "-qmp", f"unix:{qmp_path},server=on,wait=off", "-incoming", "defer"],
    )
    _mark(root, mark)
    return ET.tostring(root, encoding="unicode")


def _unmark(root: ET.Element) -> None:
    metadata = root.find("metadata")
    if metadata is not None:
        for old in metadata.findall(f"{{{PMT_NS}}}standby"):
            metadata.remove(old)


def _mark(root: ET.Element, mark: Mark) -> None:
    _unmark(root)
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.Element("metadata")
        root.insert(2, metadata)
    ET.SubElement(metadata, f"{{{PMT_NS}}}standby").text = json.dumps(asdict(mark))


def with_mark(xml: str, mark: Mark) -> str:
    """The XML with a mark; see :class:`Mark`."""
    root = ET.fromstring(xml)
    _mark(root, mark)
    return ET.tostring(root, encoding="unicode")


def definition_xml(live_xml: str) -> str:
    """What to define for a domain that took over, so that it can be started anew later."""
    root = ET.fromstring(live_xml)
    arguments = _arguments(root)
    values = [arg.get("value", "") for arg in root.iter(f"{{{QEMU_NS}}}arg")]
    monitor = [value for value in values if _OURS.match(value)]
    _set_arguments(root, [*arguments, *(["-qmp", monitor[0]] if monitor else [])])
    _host_details(root)
    _unmark(root)
    return ET.tostring(root, encoding="unicode")


def read_mark(xml: str) -> Mark | None:
    """The mark in a domain's XML; None for a domain that is no standby of ours."""
    element = ET.fromstring(xml).find(f"metadata/{{{PMT_NS}}}standby")
    if element is None or not element.text:
        return None
    try:
        return Mark(**json.loads(element.text))
    except (ValueError, TypeError):
        return None
