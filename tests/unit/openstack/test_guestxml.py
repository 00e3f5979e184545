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


from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from nova_pmt.openstack.nova import guestxml
from nova_pmt.standby import domainxml

UUID = "5d6c0c3e-5a1b-4c7d-9a53-0123456789ab"
PLAIN = f"""<domain type="kvm">
  <uuid>{UUID}</uuid>
  <memory>524288</memory>
  <vcpu>1</vcpu>
  <metadata><nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>
  <devices>
    <disk type="file"><source file="/x"/></disk>
    <interface type="bridge"><model type="virtio"/></interface>
  </devices>
</domain>
"""


def prepared(xml: str = PLAIN, directory: str | None = "/run/qmp") -> ET.Element:
    return ET.fromstring(guestxml.prepared(xml, UUID, qmp_directory=directory))


def test_memory_can_be_read_from_outside() -> None:
    root = prepared()
    assert [one.tag for one in root][:3] == ["uuid", "memory", "memoryBacking"]
    assert [one.attrib for one in root.find("memoryBacking") or []] == [
        {"type": "memfd"},
        {"mode": "shared"},
    ]


@pytest.mark.parametrize(
    ("backing", "left"),
    [
        ("<hugepages/>", ["hugepages", "source", "access"]),
        ('<source type="file"/><access mode="private"/>', ["source", "access"]),
    ],
)
def test_what_nova_says_of_memory_stays(backing: str, left: list[str]) -> None:
    root = prepared(PLAIN.replace("<vcpu>", f"<memoryBacking>{backing}</memoryBacking><vcpu>"))
    found = root.findall("memoryBacking")
    assert len(found) == 1
    assert [one.tag for one in found[0]] == left
    assert found[0].find("access").get("mode") == "shared"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_a_migration_keeps_the_kind_of_memory(kind: str) -> None:
    backing = f'<memoryBacking><source type="{kind}"/><access mode="shared"/></memoryBacking>'
    running = PLAIN.replace("<vcpu>", f"{backing}<vcpu>")
    for nova in ("", "<memoryBacking/>"):
        root = ET.fromstring(
            guestxml.with_memory_of(PLAIN.replace("<vcpu>", f"{nova}<vcpu>"), running)
        )
        assert [one.tag for one in root][:4] == ["uuid", "memory", "memoryBacking", "vcpu"]
        (found,) = root.findall("memoryBacking")
        assert [one.attrib for one in found] == [{"type": kind}, {"mode": "shared"}]


def test_a_migration_of_ordinary_memory_is_novas() -> None:
    assert guestxml.with_memory_of(PLAIN, PLAIN) == PLAIN


def test_the_second_monitor_is_one_that_a_standby_replaces() -> None:
    xml = guestxml.prepared(PLAIN, UUID, qmp_directory="/run/qmp")
    arguments = [one.get("value") for one in ET.fromstring(xml).iter(f"{{{domainxml.QEMU_NS}}}arg")]
    assert arguments == ["-qmp", f"unix:/run/qmp/{UUID}.sock,server=on,wait=off"]
    standby = domainxml.standby_xml(xml, "/other/x.sock", domainxml.Mark(1, "a", True))
    assert standby.count("-qmp") == 1


def test_without_its_directory_there_is_no_second_monitor() -> None:
    assert "commandline" not in guestxml.prepared(PLAIN, UUID, qmp_directory=None)


def test_the_directory_is_the_agents() -> None:
    domain = pytest.importorskip("nova_pmt.guest.domain")
    assert domain.QMP_DIRECTORY == guestxml.QMP_DIRECTORY
