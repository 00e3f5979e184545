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

"""The domain XML says what the spec asks for, and nothing that nobody asked for."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

import pytest

from nova_pmt.lab import Disk, GuestSpec, Workload, domain_xml

QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"


def parsed(spec: GuestSpec) -> ET.Element:
    return ET.fromstring(domain_xml(spec))


def test_default_guest_is_emulated_and_has_shared_memory():
    domain = parsed(GuestSpec("g"))
    assert domain.get("type") == "qemu"
    assert domain.findtext("memory") == "128"
    assert domain.find("memoryBacking/source").get("type") == "memfd"
    assert domain.find("memoryBacking/access").get("mode") == "shared"


def test_private_memory_is_libvirts_default():
    assert parsed(GuestSpec("g", shared_memory=False)).find("memoryBacking") is None


def test_plain_guest_has_nothing_of_ours():
    text = domain_xml(GuestSpec("g", shared_memory=False, second_monitor=False))
    assert "qemu:" not in text
    assert "nova_pmt" not in text


def test_second_monitor_is_named_by_the_uuid():
    spec = GuestSpec("g")
    arguments = [a.get("value") for a in parsed(spec).iter(f"{QEMU}arg")]
    assert arguments == ["-qmp", f"unix:{spec.monitor_path},server=on,wait=off"]
    assert spec.uuid in spec.monitor_path


@pytest.mark.parametrize(("vga", "model"), [(False, "none"), (True, "vga")])
def test_video(vga, model):
    assert parsed(GuestSpec("g", vga=vga)).find("devices/video/model").get("type") == model


def test_no_usb_and_no_balloon():
    domain = parsed(GuestSpec("g", machine="pc"))
    assert domain.find("devices/controller[@type='usb']").get("model") == "none"
    assert domain.find("devices/memballoon").get("model") == "none"


def test_nic_is_on_the_data_bridge_with_address_and_mtu():
    domain = parsed(GuestSpec("g", ip="10.77.2.77", mtu=1400))
    nic = domain.find("devices/interface")
    assert nic.find("source").get("bridge") == "br-data"
    assert nic.find("mtu").get("size") == "1400"
    assert "guest_ip=10.77.2.77/24" in domain.findtext("os/cmdline")


def test_without_nic_no_interface_and_no_address():
    domain = parsed(GuestSpec("g", nic=False))
    assert domain.find("devices/interface") is None
    assert "guest_ip" not in domain.findtext("os/cmdline")


def test_disk():
    disk = parsed(GuestSpec("g", disks=(Disk("/x/y.raw", format="raw"),))).find("devices/disk")
    assert disk.find("source").get("file") == "/x/y.raw"
    assert disk.find("driver").get("type") == "raw"
    assert disk.find("driver").get("discard") == "unmap"
    assert disk.find("readonly") is None


def test_disks_are_named_by_bus_and_order():
    disks = (
        Disk("/a"),
        Disk("/b", bus="scsi", readonly=True),
        Disk("/c", discard="ignore"),
        Disk("/d", bus="scsi"),
    )
    spec = GuestSpec("g", disks=disks)
    domain = parsed(spec)
    targets = [(t.get("dev"), t.get("bus")) for t in domain.findall("devices/disk/target")]
    assert targets == [("vda", "virtio"), ("sda", "scsi"), ("vdb", "virtio"), ("sdb", "scsi")]
    assert spec.disk_names == ("vda", "sda", "vdb", "sdb")
    assert [d.find("readonly") is not None for d in domain.iter("disk")] == [0, 1, 0, 0]
    (controller,) = domain.findall("devices/controller[@type='scsi']")
    assert controller.get("model") == "virtio-scsi"
    assert "scsi_disks=2" in domain.findtext("os/cmdline").split()


def test_without_scsi_disk_no_controller_and_no_modules():
    domain = parsed(GuestSpec("g", disks=(Disk("/a"),)))
    assert domain.find("devices/controller[@type='scsi']") is None
    assert "scsi" not in domain.findtext("os/cmdline")


def test_more_nics_have_addresses_of_their_own():
    spec = GuestSpec("g", extra_nics=2)
    assert spec.mac == spec.macs[0] == GuestSpec("g").mac
    assert len(set(spec.macs)) == 3
    macs = [m.get("address") for m in parsed(spec).findall("devices/interface/mac")]
    assert tuple(macs) == spec.macs


def test_workload_goes_to_the_kernel_command_line_as_numbers():
    spec = GuestSpec("g", workload=Workload(dirty_pages=1500, dirty_full=True))
    words = parsed(spec).findtext("os/cmdline").split()
    assert {"dirty_pages=1500", "dirty_full=1", "tick_ms=10", "buffer_mib=32"} <= set(words)


def test_only_an_emulated_guest_has_options_of_the_emulator():
    assert parsed(GuestSpec("g")).find("features/tcg") is not None
    kvm = parsed(GuestSpec("g", accel="kvm"))
    assert kvm.get("type") == "kvm"
    assert kvm.find("features/tcg") is None


def test_mac_is_of_the_name_and_uuid_is_new():
    one, two = GuestSpec("same"), GuestSpec("same")
    assert one.mac == two.mac != GuestSpec("other").mac
    assert one.mac.startswith("52:54:00:")
    assert one.uuid != two.uuid


def test_names_are_quoted():
    name = "a<b&c'd"
    domain = parsed(GuestSpec(name))
    assert domain.findtext("name") == name
    assert domain.find("devices/serial/source").get("path").endswith(f"{name}-console.log")


def test_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GuestSpec("g").name = "h"  # type: ignore[misc]
