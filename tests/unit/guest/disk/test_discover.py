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

"""A guest's disks are found in its QEMU, or it is told why not."""

from __future__ import annotations

import pytest

from nova_pmt import exception
from nova_pmt.guest.disk import discover
from tests.unit.fakes.blocks import DISKS, MIB, FakeBlocks


def test_disks_come_in_the_order_of_the_xml_with_all_that_is_needed() -> None:
    vda, sda, hda = discover.disks(DISKS, FakeBlocks())
    assert [disk.spec.name for disk in (vda, sda, hda)] == ["vda", "sda", "hda"]
    assert (vda.spec.format, vda.spec.path, vda.spec.size) == ("qcow2", "/images/a.qcow2", 64 * MIB)
    assert (vda.alias, vda.node) == ("virtio-disk0", "libvirt-3-format")
    assert vda.qom_path == "/machine/peripheral/virtio-disk0/virtio-backend"
    assert sda.qom_path == "/machine/peripheral/scsi0-0-0-0"
    assert (vda.discard, sda.discard) == (True, False)
    assert (vda.spec.cluster_bytes, sda.spec.cluster_bytes) == (65536, 0)
    assert [disk.spec.readonly for disk in (vda, sda, hda)] == [False, False, True]


def test_below_a_filter_that_is_left_is_the_image() -> None:
    qemu = FakeBlocks()
    (vda, *_) = discover.disks(DISKS, qemu)
    qemu.add_node(vda.filter_node, drv="blklogwrites", file="", size=0, children={"file": vda.node})
    qemu.devices[vda.qom_path] = vda.filter_node
    assert discover.disks(DISKS, qemu)[0] == vda
    assert discover.image_node(vda, qemu) == vda.node
    assert discover.nodes_below(vda.filter_node, qemu) == [vda.node, "libvirt-3-storage"]


def test_a_filter_with_nothing_below_is_an_error() -> None:
    qemu = FakeBlocks()
    qemu.add_node("pmt-log-vda", drv="blklogwrites", file="", size=0)
    with pytest.raises(exception.GuestError, match="what lies below"):
        discover.below_filters("pmt-log-vda", qemu)
    with pytest.raises(exception.GuestError, match="what lies below"):
        discover.below_filters("pmt-log-vdb", qemu)


def test_raw_images_may_come_without_a_node_of_their_format() -> None:
    """As libvirt 10 has them."""
    qemu = FakeBlocks()
    qemu.devices["scsi0-0-0-0"] = "libvirt-2-storage"
    assert discover.disks(DISKS, qemu)[1].node == "libvirt-2-storage"


def test_a_usb_drive_is_below_its_bus() -> None:
    qemu = FakeBlocks()
    qemu.devices["/machine/peripheral/usb-disk0/usb-disk0.0/legacy[0]"] = qemu.devices.pop(
        "ide0-0-0"
    )
    xml = DISKS.replace("ide0-0-0", "usb-disk0").replace("hda' bus='ide'", "hda' bus='usb'")
    assert discover.disks(xml, qemu)[2].node == "libvirt-1-format"


def test_discards_of_an_old_qcow2_are_left_undone() -> None:
    """They would show its backing file, which the standby's image has not."""
    qemu = FakeBlocks()
    qemu.nodes["libvirt-3-format"]["compat"] = "0.10"
    assert not discover.disks(DISKS, qemu)[0].discard


def test_what_the_xml_refuses_is_refused() -> None:
    with pytest.raises(exception.SharedStorage):
        discover.disks(
            DISKS.replace("type='file' device='disk'", "type='network'", 1), FakeBlocks()
        )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<alias name='virtio-disk0'/>", ""),
        ("name='virtio-disk0'", "name='../x'"),
        ("name='virtio-disk0'", "name='virtio-disk9'"),
        ("dev='vda'", "dev='../vda'"),
        ("dev='vda'", "dev='a-name-that-is-too-long'"),
        ("/images/a.qcow2", "/images/other.qcow2"),
        ("dev='hdb' bus='ide'/>", "dev='hdb' bus='ide'/><source file='/images/gone.iso'/>"),
        ("<readonly/>", "<!-- -->"),
    ],
)
def test_what_libvirt_and_qemu_do_not_agree_on_is_an_error(old: str, new: str) -> None:
    xml = DISKS.replace(old, new, 1)
    if old == "<readonly/>":
        xml = xml.replace("device='cdrom'", "device='disk'", 1).replace(
            "bus='ide'", "bus='scsi'", 1
        )
    with pytest.raises(exception.GuestError):
        discover.disks(xml, FakeBlocks())


@pytest.mark.parametrize("size", [0, None, "big", 1 << 61])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    qemu = FakeBlocks()
    qemu.nodes["libvirt-3-format"]["size"] = size
    with pytest.raises(exception.UnsupportedDisk, match="vda"):
        discover.disks(DISKS, qemu)


def test_a_filter_of_somebody_else_is_refused() -> None:
    qemu = FakeBlocks()
    qemu.nodes["libvirt-3-format"]["drv"] = "copy-on-read"
    with pytest.raises(exception.UnsupportedDisk, match="copy-on-read"):
        discover.disks(DISKS, qemu)


def test_a_path_that_qemu_tells_with_options_is_not_compared() -> None:
    qemu = FakeBlocks()
    qemu.nodes["libvirt-3-format"]["file"] = 'json:{"driver": "qcow2"}'
    assert discover.disks(DISKS, qemu)[0].spec.path == "/images/a.qcow2"


# -- whether this QEMU can --------------------------------------------------------------


def test_a_qemu_with_all_has_no_problems_and_is_left_as_it_was() -> None:
    qemu = FakeBlocks()
    before = dict(qemu.nodes)
    assert discover.problems(qemu) == []
    assert qemu.nodes == before


def test_a_qemu_without_the_filter_is_refused() -> None:
    qemu = FakeBlocks()
    qemu.fails["blockdev-add"] = "Driver 'blklogwrites' is not whitelisted"
    (problem,) = discover.problems(qemu)
    assert problem.code == "UNSUPPORTED_QEMU"
    assert "whitelisted" in problem.message


def test_a_qemu_without_a_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = FakeBlocks()
    monkeypatch.setattr(qemu, "_query_commands", lambda: [{"name": "blockdev-add"}])
    (problem,) = discover.problems(qemu)
    assert "blockdev-del" in problem.message


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ((6, 2, 0), False),
        ((7, 2, 8), False),
        ((7, 2, 9), True),
        ((8, 0, 5), False),
        ((8, 1, 4), False),
        ((8, 1, 5), True),
        ((8, 2, 0), False),
        ((8, 2, 1), True),
        ((9, 0, 0), True),
        ((10, 1, 0), True),
    ],
)
def test_a_qemu_that_logs_zeros_wrongly_is_warned_of(
    version: tuple[int, int, int], good: bool
) -> None:
    qemu = FakeBlocks()
    qemu.version = version
    assert discover.problems(qemu) == []
    assert (discover.warnings(qemu) == []) is good
