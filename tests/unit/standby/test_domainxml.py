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

"""The standby's domain: the guest sees no difference; what is the host's own is chosen anew."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from nova_pmt.guest.checks import refusals
from nova_pmt.standby import domainxml
from nova_pmt.standby.domainxml import (
    PMT_NS,
    QEMU_NS,
    Mark,
    definition_xml,
    monitor_path,
    read_mark,
    standby_xml,
    with_mark,
)
from tests.unit.fakes.domains import (
    FOREIGN,
    HUGEPAGES,
    NOVA,
    NUMA,
    PLAIN,
    SAMPLES,
    UUID,
    with_device,
)

MARK = Mark(3, "one", True)
QMP = monitor_path("/run/nova_pmt/qmp", UUID)
OURS = ["-qmp", f"unix:{QMP},server=on,wait=off", "-incoming", "defer"]


def made(xml: str, mark: Mark = MARK) -> ET.Element:
    return ET.fromstring(standby_xml(xml, QMP, mark))


def arguments(root: ET.Element) -> list[str | None]:
    return [arg.get("value") for arg in root.iter(f"{{{QEMU_NS}}}arg")]


def canonical(xml: str) -> str:
    return ET.canonicalize(xml, strip_text=True)


@pytest.mark.parametrize("name", SAMPLES)
def test_memory_is_a_shared_file_and_qemu_waits(name: str) -> None:
    root = made(SAMPLES[name])
    backing = root.findall("memoryBacking")
    assert len(backing) == 1
    assert backing[0].find("source[@type='file']") is not None
    assert backing[0].find("access[@mode='shared']") is not None
    assert len(backing[0].findall("source")) == len(backing[0].findall("access")) == 1
    for gone in ("hugepages", "allocation", "discard"):
        assert backing[0].find(gone) is None
    assert arguments(root)[-4:] == OURS
    assert len(root.findall(f"{{{QEMU_NS}}}commandline")) == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_the_guest_sees_no_difference(name: str) -> None:
    before, after = ET.fromstring(SAMPLES[name]), made(SAMPLES[name])
    for same in ("name", "uuid", "memory", "currentMemory", "vcpu", "os", "features", "clock"):
        assert canonical(ET.tostring(after.find(same), encoding="unicode")) == canonical(
            ET.tostring(before.find(same), encoding="unicode")
        )
    for disk in before.findall("devices/disk"):
        for tag in ("backingStore", "source"):
            for old in disk.findall(tag):
                disk.remove(old)
    for disk in after.findall("devices/disk"):
        for old in disk.findall("source"):
            disk.remove(old)
    for path in ("devices/disk", "devices/video", "devices/memballoon", "cpu/model"):
        ours, theirs = after.findall(path), before.findall(path)
        assert [canonical(ET.tostring(e, encoding="unicode")) for e in ours] == [
            canonical(ET.tostring(e, encoding="unicode")) for e in theirs
        ]
    mac = after.find("devices/interface/mac")
    assert mac is not None and mac.get("address") == "52:54:00:12:34:56"


@pytest.mark.parametrize("name", SAMPLES)
def test_what_the_primarys_host_chose_is_left_out(name: str) -> None:
    root = made(SAMPLES[name])
    assert root.get("id") is None
    assert root.find("seclabel") is None
    for path in ("devices/serial", "devices/console"):
        device = root.find(path)
        assert device is not None
        assert device.get("type") == "pty" and device.get("tty") is None
        assert device.find("source") is None
        assert device.find("target") is not None
    graphics = root.find("devices/graphics")
    assert graphics is not None
    assert graphics.get("port") is None
    listen = graphics.find("listen")
    assert listen is not None
    assert (listen.get("address"), graphics.get("listen")) == ("127.0.0.1", "127.0.0.1")


DISK = """\
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
  <source file='/images/a.qcow2' index='4'>
    <seclabel model='dac' relabel='no'/>
  </source>
  <backingStore type='file' index='3'>
    <format type='raw'/>
    <source file='/images/_base/x'/>
    <backingStore/>
  </backingStore>
  <mirror type='file' job='copy'/>
  <target dev='vda' bus='virtio'/>
  <serial>0123</serial>
  <boot order='1'/>
  <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/>
</disk>
"""


def test_disks_are_flat_images_at_the_same_path() -> None:
    disk = made(with_device(DISK)).findall("devices/disk")[-1]
    assert disk.find("backingStore") is None
    assert disk.find("mirror") is None
    source = disk.find("source")
    assert source is not None
    assert source.attrib == {"file": "/images/a.qcow2"}
    assert list(source) == []
    assert [element.tag for element in disk] == [
        "driver",
        "source",
        "target",
        "serial",
        "boot",
        "address",
    ]
    driver = disk.find("driver")
    assert driver is not None
    assert driver.get("type") == "qcow2"
    assert driver.get("discard") == "unmap"


def test_the_definition_after_a_failover_has_flat_images_too() -> None:
    root = ET.fromstring(definition_xml(with_device(DISK)))
    assert root.find("devices/disk/backingStore") is None
    assert [s.attrib for s in root.findall("devices/disk/source")] == [
        {"file": "/srv/cd.iso"},
        {"file": "/images/a.qcow2"},
    ]


def test_tap_devices_of_libvirt_are_named_anew_and_those_of_nova_stay() -> None:
    assert made(PLAIN).find("devices/interface/target") is None
    target = made(NOVA).find("devices/interface/target")
    assert target is not None and target.get("dev") == "tap0c1f2d3e-45"


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1"])
def test_graphics_that_listen_anywhere_go_on_doing_so(address: str) -> None:
    root = made(PLAIN.replace("192.0.2.10", address))
    listen = root.find("devices/graphics/listen")
    assert listen is not None and listen.get("address") == address


def test_a_fixed_port_of_graphics_is_kept() -> None:
    root = made(PLAIN.replace("port='5903' autoport='yes'", "port='5910' autoport='no'"))
    graphics = root.find("devices/graphics")
    assert graphics is not None and graphics.get("port") == "5910"


def test_every_numa_cell_is_shared() -> None:
    cells = made(NUMA).findall("cpu/numa/cell")
    assert [cell.get("memAccess") for cell in cells] == ["shared", "shared"]
    assert [cell.get("memory") for cell in cells] == ["65536", "65536"]


def test_what_else_is_said_of_memory_stays() -> None:
    assert made(SAMPLES["memfd"]).find("memoryBacking/locked") is not None
    root = made(HUGEPAGES.replace("<discard/>", "<nosharepages/>"))
    assert root.find("memoryBacking/nosharepages") is not None


def test_arguments_and_environment_of_others_stay_as_they_are() -> None:
    root = made(FOREIGN)
    assert arguments(root) == [
        "-global",
        "virtio-net-pci.tx=bh",
        "-qmp",
        "unix:/run/somebody.sock,server=on,wait=off",
        *OURS,
    ]
    env = root.findall(f"{{{QEMU_NS}}}commandline/{{{QEMU_NS}}}env")
    assert [(e.get("name"), e.get("value")) for e in env] == [("MALLOC_PERTURB_", "1")]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_standby_of_what_was_a_standby_is_the_same(name: str) -> None:
    """After a failover the roles change: nothing may pile up."""
    once = standby_xml(SAMPLES[name], QMP, MARK)
    assert canonical(standby_xml(once, QMP, MARK)) == canonical(once)
    live = once.replace("<domain ", "<domain id='9' ", 1)
    assert canonical(standby_xml(live, QMP, MARK)) == canonical(once)
    assert refusals(once) == []


@pytest.mark.parametrize("name", SAMPLES)
def test_the_definition_of_a_standby_that_took_over_can_be_started(name: str) -> None:
    live = standby_xml(SAMPLES[name], QMP, MARK).replace("<domain ", "<domain id='9' ", 1)
    root = ET.fromstring(definition_xml(live))
    assert "-incoming" not in arguments(root)
    assert arguments(root)[-2:] == OURS[:2]
    assert root.get("id") is None
    assert read_mark(definition_xml(live)) is None
    assert canonical(definition_xml(definition_xml(live))) == canonical(definition_xml(live))


def test_the_definition_of_a_domain_without_our_monitor_gets_none() -> None:
    root = ET.fromstring(definition_xml(FOREIGN))
    assert arguments(root)[-1] == "unix:/run/somebody.sock,server=on,wait=off"
    assert ET.fromstring(definition_xml(PLAIN)).find(f"{{{QEMU_NS}}}commandline") is None


def test_libvirt_can_read_the_prefixes() -> None:
    """libvirt looks for the namespace, but people look for the prefix."""
    xml = standby_xml(NOVA, QMP, MARK)
    assert "<qemu:commandline>" in xml and "<pmt:standby>" in xml
    assert "<nova:instance" in xml and "ns0:" not in xml


# -- the mark ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_a_mark_is_read_as_it_was_written(name: str) -> None:
    assert read_mark(SAMPLES[name]) is None
    assert read_mark(with_mark(SAMPLES[name], MARK)) == MARK
    assert read_mark(standby_xml(SAMPLES[name], QMP, MARK)) == MARK


def test_a_new_mark_replaces_the_old_one() -> None:
    xml = with_mark(with_mark(NOVA, MARK), Mark(4, "two", False))
    assert read_mark(xml) == Mark(4, "two", False)
    root = ET.fromstring(xml)
    assert len(root.findall(f"metadata/{{{PMT_NS}}}standby")) == 1
    assert len(root.findall("metadata")) == 1


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"generation": 1}', '{"other": 1}', "7"])
def test_a_mark_that_is_none_of_ours_is_none(text: str) -> None:
    xml = with_mark(PLAIN, MARK)
    root = ET.fromstring(xml)
    element = root.find(f"metadata/{{{PMT_NS}}}standby")
    assert element is not None
    element.text = text
    assert read_mark(ET.tostring(root, encoding="unicode")) is None


def test_the_domain_with_a_mark_is_otherwise_the_same() -> None:
    root = ET.fromstring(with_mark(PLAIN, MARK))
    domainxml._unmark(root)
    metadata = root.find("metadata")
    assert metadata is not None
    root.remove(metadata)
    assert canonical(ET.tostring(root, encoding="unicode")) == canonical(PLAIN)
