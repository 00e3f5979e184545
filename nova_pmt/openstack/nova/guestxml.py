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


"""The XML of a server that is protected, or may be some day; of no other.

Two things make its pauses short: memory that can be read from outside, and a second monitor.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from nova_pmt.standby.domainxml import QEMU_NS, monitor_path

#: In ``[guest] runtime_directory``; as :data:`nova_pmt.guest.domain.QMP_DIRECTORY`, which takes
#: libvirt with it.
QMP_DIRECTORY = "qmp"


def prepared(xml: str, uuid: str, *, qmp_directory: str | None) -> str:
    """The XML with what protection needs; nothing else changes.

    :param xml: as Nova has made it.
    :param qmp_directory: where second monitors listen; None: there is no such directory, and a
        guest with a monitor there could not start.
    """
    root = ET.fromstring(xml)
    _share_memory(root)
    if qmp_directory is not None:
        _second_monitor(root, monitor_path(qmp_directory, uuid))
    return ET.tostring(root, encoding="unicode")


def with_memory_of(xml: str, running: str) -> str:
    """The XML of a live migration's destination, with the kind of memory that the guest has.

    (A memfd; a file, once it has failed over.) Nova takes it for its own file-backed memory and
    leaves it out where the destination has none such; libvirt refuses another kind of memory there.

    :param xml: of the destination, as Nova has made it.
    :param running: of the domain that is migrated.
    """
    kept = ET.fromstring(running).find("memoryBacking")
    if kept is None or kept.find("source") is None:
        return xml
    root = ET.fromstring(xml)
    backing = root.find("memoryBacking")
    if backing is not None:
        root.remove(backing)
    _insert_backing(root, kept)
    return ET.tostring(root, encoding="unicode")


def _insert_backing(root: ET.Element, backing: ET.Element) -> None:
    place = root.find("currentMemory")
    if place is None:
        place = root.find("memory")
    root.insert(0 if place is None else list(root).index(place) + 1, backing)


def _share_memory(root: ET.Element) -> None:
    backing = root.find("memoryBacking")
    if backing is None:
        backing = ET.Element("memoryBacking")
        _insert_backing(root, backing)
    # libvirt's file-backed memory ([libvirt] file_backed_memory) can be read from outside as it is.
    if backing.find("source") is None:
        ET.SubElement(backing, "source", {"type": "memfd"})
    access = backing.find("access")
    if access is None:
        access = ET.SubElement(backing, "access")
    access.set("mode", "shared")


def _second_monitor(root: ET.Element, path: str) -> None:
    commandline = root.find(f"{{{QEMU_NS}}}commandline")
    if commandline is None:
        commandline = ET.SubElement(root, f"{{{QEMU_NS}}}commandline")
    for value in ("-qmp", f"unix:{path},server=on,wait=off"):
        ET.SubElement(commandline, f"{{{QEMU_NS}}}arg", {"value": value})
