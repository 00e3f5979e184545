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

"""What cannot be protected is refused before anything is changed, with its reason and cure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nova_pmt.exception import Refusal
from nova_pmt.guest import checks
from tests.unit.fakes.domains import FOREIGN, HUGEPAGES, PLAIN, SAMPLES, with_device

MIB = 1 << 20


@pytest.mark.parametrize("name", SAMPLES)
def test_ordinary_domains_can_be_protected(name: str) -> None:
    """With a read-only CD-ROM, a bridge, a serial console, VNC."""
    assert checks.refusals(SAMPLES[name]) == []


DISK = "<disk type='{}' device='{}'>{}<target dev='vdb' bus='virtio'/>{}</disk>"
SOURCE = "<source file='/x'/>"
CONTROLLER = "<controller type='scsi' index='{}' model='{}'/>"
ON_SCSI = (
    "<disk type='file'><driver type='raw'/><source file='/x'/><target dev='sda' bus='scsi'/>"
    "<address type='drive' controller='{}' bus='0' target='0' unit='0'/></disk>"
)


def on_bus(bus: str) -> str:
    return DISK.format("file", "disk", SOURCE, "").replace("bus='virtio'", f"bus='{bus}'")


@pytest.mark.parametrize(
    "device",
    [
        DISK.format("file", "cdrom", SOURCE, "<readonly/>"),
        DISK.format("file", "disk", SOURCE, "<readonly/>"),
        DISK.format("file", "cdrom", "", "<readonly/>"),
        DISK.format("file", "floppy", "", ""),
        DISK.format("file", "disk", SOURCE, ""),
        DISK.format("file", "disk", SOURCE, "<driver name='qemu' type='qcow2' iothread='1'/>"),
        DISK.format("file", "disk", SOURCE, "<driver type='raw' error_policy='report'/>"),
        DISK.format("file", "disk", SOURCE, "<driver type='raw' rerror_policy='ignore'/>"),
        DISK.format("file", "cdrom", SOURCE, "<shareable/>").replace("virtio", "sata"),
        DISK.format("file", "cdrom", "<source startupPolicy='optional'/>", ""),
        DISK.format("network", "cdrom", "", "<readonly/>"),
        CONTROLLER.format(0, "virtio-scsi") + ON_SCSI.format(0),
        CONTROLLER.format(0, "lsilogic")
        + CONTROLLER.format(1, "virtio-transitional")
        + ON_SCSI.format(1),
        "<interface type='network'><source network='default'/></interface>",
        "<interface type='ethernet'><target dev='tap1'/></interface>",
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        "<video><driver name='qemu'/><model type='virtio'/></video>",
    ],
)
def test_harmless_devices_are_accepted(device: str) -> None:
    assert checks.refusals(with_device(device)) == []


@pytest.mark.parametrize(
    ("device", "code", "names"),
    [
        (
            "<interface type='vhostuser'><mac address='52:54:00:00:00:01'/></interface>",
            "UNSUPPORTED_DEVICE",
            "52:54:00:00:00:01",
        ),
        ("<interface type='vdpa'/>", "UNSUPPORTED_DEVICE", "vdpa"),
        ("<interface type='hostdev'/>", "UNSUPPORTED_DEVICE", "hostdev"),
        ("<hostdev mode='subsystem' type='pci' managed='yes'/>", "UNSUPPORTED_DEVICE", "VFIO"),
        ("<hostdev mode='subsystem' type='mdev'/>", "UNSUPPORTED_DEVICE", "mdev"),
        (
            "<filesystem type='mount'><driver type='virtiofs'/></filesystem>",
            "UNSUPPORTED_DEVICE",
            "virtiofs",
        ),
        ("<filesystem type='mount'/>", "UNSUPPORTED_DEVICE", "shared file system"),
        ("<shmem name='x'/>", "UNSUPPORTED_DEVICE", "shared with other guests"),
        ("<tpm model='tpm-crb'/>", "UNSUPPORTED_DEVICE", "TPM"),
        ("<memory model='dimm'/>", "UNSUPPORTED_DEVICE", "hot-pluggable"),
        (
            "<video><driver name='vhostuser'/><model type='virtio'/></video>",
            "UNSUPPORTED_DEVICE",
            "graphics card",
        ),
        (DISK.format("vhostuser", "disk", SOURCE, ""), "UNSUPPORTED_DEVICE", "vhostuser"),
        (DISK.format("vhostvdpa", "disk", SOURCE, "<readonly/>"), "UNSUPPORTED_DEVICE", "vdb"),
        (DISK.format("nvme", "disk", SOURCE, "<readonly/>"), "UNSUPPORTED_DEVICE", "nvme"),
        (DISK.format("network", "disk", SOURCE, ""), "SHARED_STORAGE", "network"),
        (DISK.format("network", "cdrom", SOURCE, "<readonly/>"), "SHARED_STORAGE", "vdb"),
        (DISK.format("volume", "disk", SOURCE, ""), "SHARED_STORAGE", "volume"),
        (DISK.format("block", "lun", SOURCE, ""), "UNSUPPORTED_DISK", "block"),
        (DISK.format("block", "disk", SOURCE, "<readonly/>"), "UNSUPPORTED_DISK", "image files"),
        (DISK.format("dir", "floppy", SOURCE, ""), "UNSUPPORTED_DISK", "dir"),
        (DISK.format("file", "disk", SOURCE, "<shareable/>"), "SHARED_STORAGE", "shareable"),
        (DISK.format("file", "disk", SOURCE, "<transient/>"), "UNSUPPORTED_DISK", "transient"),
        (DISK.format("file", "disk", SOURCE, "<mirror/>"), "UNSUPPORTED_DISK", "block job"),
        (
            DISK.format("file", "disk", SOURCE, "<throttlefilters/>"),
            "UNSUPPORTED_DISK",
            "throttle",
        ),
        (DISK.format("file", "disk", SOURCE, "<encryption/>"), "UNSUPPORTED_DISK", "encrypted"),
        (
            DISK.format("file", "disk", "<source file='/x'><encryption/></source>", ""),
            "UNSUPPORTED_DISK",
            "encrypted",
        ),
        (
            DISK.format("file", "disk", "<source file='/x'><slices/></source>", ""),
            "UNSUPPORTED_DISK",
            "part",
        ),
        (
            DISK.format("file", "disk", "<source file='/x'><dataStore/></source>", ""),
            "UNSUPPORTED_DISK",
            "second file",
        ),
        (
            DISK.format("file", "disk", "<source file='/x' fdgroup='f'/>", ""),
            "UNSUPPORTED_DISK",
            "descriptor",
        ),
        (DISK.format("file", "disk", SOURCE, "<driver type='vmdk'/>"), "UNSUPPORTED_DISK", "vmdk"),
        (DISK.format("file", "cdrom", SOURCE, "<driver type='luks'/>"), "UNSUPPORTED_DISK", "luks"),
        (
            DISK.format("file", "disk", SOURCE, "<driver type='raw' copy_on_read='on'/>"),
            "UNSUPPORTED_DISK",
            "copies",
        ),
        (
            DISK.format("file", "disk", SOURCE, "<driver type='raw' error_policy='ignore'/>"),
            "UNSUPPORTED_DISK",
            "ignores",
        ),
        (DISK.format("file", "lun", SOURCE, ""), "UNSUPPORTED_DISK", "lun"),
        (on_bus("ide"), "UNSUPPORTED_DISK", "ide"),
        (on_bus("sata"), "UNSUPPORTED_DISK", "sata"),
        (on_bus("usb"), "UNSUPPORTED_DISK", "usb"),
        (on_bus("fdc"), "UNSUPPORTED_DISK", "fdc"),
        (on_bus("sd"), "UNSUPPORTED_DISK", "sd"),
        (on_bus("scsi"), "UNSUPPORTED_DISK", "controller"),
        (
            CONTROLLER.format(0, "lsilogic") + ON_SCSI.format(0),
            "UNSUPPORTED_DISK",
            "lsilogic",
        ),
        ("<disk type='file'><source file='/x'/></disk>", "UNSUPPORTED_DISK", "[?]"),
    ],
)
def test_devices_that_cannot_follow_are_refused(device: str, code: str, names: str) -> None:
    (refusal,) = checks.refusals(with_device(device))
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert refusal.cure
    assert names.strip("[]") in refusal.message


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("arch='x86_64'", "arch='aarch64'", "UNSUPPORTED_ARCHITECTURE"),
        ("arch='x86_64'", "", "UNSUPPORTED_ARCHITECTURE"),
        ("  <clock", "  <launchSecurity type='sev'/>\n  <clock", "UNSUPPORTED_MEMORY"),
        ("    <boot", "    <nvram>/x.fd</nvram>\n    <boot", "DISK_NOT_REPLICATED"),
    ],
)
def test_machines_that_cannot_follow_are_refused(old: str, new: str, code: str) -> None:
    (refusal,) = checks.refusals(PLAIN.replace(old, new, 1))
    assert refusal.code == code


@pytest.mark.parametrize(
    "size",
    ["size='1048576' unit='KiB'", "size='1' unit='G'", "size='1048576'", "size='1024' unit='MiB'"],
)
def test_huge_pages_of_a_gigabyte_are_refused(size: str) -> None:
    xml = HUGEPAGES.replace("size='2048' unit='KiB'", size)
    (refusal,) = checks.refusals(xml)
    assert refusal.code == "UNSUPPORTED_MEMORY"
    assert "1 GiB" in refusal.message


def test_all_reasons_are_told_at_once() -> None:
    xml = with_device("<tpm model='tpm-crb'/>", with_device("<shmem name='x'/>"))
    assert len(checks.refusals(xml.replace("arch='x86_64'", "arch='riscv64'"))) == 3


def test_a_domain_without_devices_is_no_reason_to_fail() -> None:
    assert checks.refusals("<domain><os><type arch='x86_64'/></os></domain>") == []


def test_warnings_are_no_refusals() -> None:
    assert any("no monitor" in text for text in checks.warnings(PLAIN))
    assert checks.warnings(FOREIGN) == []
    assert len(checks.warnings("<domain/>")) == 1


def test_a_guest_that_will_see_write_errors_of_the_log_is_warned_of() -> None:
    driver = "<driver type='raw' error_policy='report'/>"
    disk = DISK.format("file", "disk", SOURCE, driver)
    (warning,) = checks.warnings(with_device(disk, FOREIGN))
    assert "vdb" in warning
    assert checks.warnings(with_device(disk.replace("'disk'", "'cdrom'"), FOREIGN)) == []


# -- where the images are ---------------------------------------------------------------


def image(path: object) -> str:
    return with_device(
        DISK.format("file", "disk", f"<source file='{path}'/>", ""),
        "<domain><devices>    <memballoon/></devices></domain>",
    )


def test_an_image_on_this_hosts_own_file_system_is_good(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"")
    (tmp_path / "link").symlink_to("image")
    assert checks.disk_problems(image(tmp_path / "image")) == []
    assert checks.disk_problems(image(tmp_path / "link")) == []
    assert checks.disk_problems("<domain/>") == []
    assert checks.disk_problems(image("")) == []


@pytest.mark.parametrize("magic", checks.SHARED_FILE_SYSTEMS)
def test_an_image_on_a_file_system_of_several_hosts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: int
) -> None:
    (tmp_path / "image").write_bytes(b"")
    monkeypatch.setattr(checks, "file_system", lambda _path: magic)
    (refusal,) = checks.disk_problems(image(tmp_path / "image"))
    assert refusal.code == "SHARED_STORAGE"
    assert checks.SHARED_FILE_SYSTEMS[magic] in refusal.message
    assert "vdb" in refusal.message


def test_an_image_that_is_gone_or_none_is_refused(tmp_path: Path) -> None:
    (refusal,) = checks.disk_problems(image(tmp_path / "gone"))
    assert refusal.code == "UNSUPPORTED_DISK"
    assert "gone" in refusal.message
    (refusal,) = checks.disk_problems(image("/dev/null"))
    assert refusal.code == "UNSUPPORTED_DISK"
    assert "regular" in refusal.message


# -- room on the standby's host ---------------------------------------------------------


def test_a_directory_on_tmpfs_with_room_is_good() -> None:
    assert checks.standby_memory("/dev/shm", 1 * MIB) == []


def test_a_directory_that_libvirt_has_yet_to_make_is_judged_by_its_parent() -> None:
    assert checks.standby_memory("/dev/shm/not/made/yet", 1 * MIB) == []


def test_a_directory_on_a_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.file_system("/dev/shm") == checks.TMPFS_MAGIC
    monkeypatch.setattr(checks, "file_system", lambda _path: 0xEF53)
    (refusal,) = checks.standby_memory(str(tmp_path), MIB)
    assert refusal.code == "BACKING_NOT_IN_MEMORY"
    assert "memory_backing_dir" in refusal.cure


def test_too_little_room_in_the_file_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs("/dev/shm")
    monkeypatch.setattr(checks, "_available_memory", lambda: 1 << 60)
    needed = free.f_bavail * free.f_frsize + (64 << 30)
    (refusal,) = checks.standby_memory("/dev/shm", needed)
    assert refusal.code == "TOO_LITTLE_MEMORY"
    assert "MiB free" in refusal.message


def test_too_little_memory_on_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_available_memory", lambda: 300 * MIB)
    (refusal,) = checks.standby_memory("/dev/shm", 64 * MIB)
    assert refusal.code == "TOO_LITTLE_MEMORY"
    assert "320 MiB" in refusal.message  # with what is left to the host


def test_this_host_has_some_memory_and_an_unknown_path_no_file_system() -> None:
    assert checks._available_memory() > 0
    assert checks.file_system("/nonexistent") == 0
