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

"""What ``nova-pmt-status`` says of a compute host."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oslo_upgradecheck.upgradecheck import Code

from nova_pmt import exception
from nova_pmt.lab.certificates import Authority
from nova_pmt.status import host
from nova_pmt.status.finding import result

DAY = datetime.timedelta(days=1)
LONG = 365 * DAY


def conf(directory: Path, **tls: Any) -> Any:
    names = {"ca_file": "ca.pem", "cert_file": "cert.pem", "key_file": "key.pem"}
    paths = {key: str(directory / name) for key, name in names.items()}
    return SimpleNamespace(
        host="compute1", tls=SimpleNamespace(**{"insecure": False, **paths, **tls})
    )


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> Authority:
    monkeypatch.setattr("nova_pmt.lab.certificates.VALID", 10 * LONG)
    return Authority()


def test_good_certificates(tmp_path: Path, authority: Authority) -> None:
    authority.install(tmp_path, authority.issue("compute1", valid=LONG))
    assert result(host.certificates(conf(tmp_path))).code == Code.SUCCESS


@pytest.mark.parametrize(
    ("days", "code", "says"),
    [
        (400, Code.SUCCESS, "valid until"),
        (20, Code.WARNING, "in 19 days: renew it"),
        (-1, Code.FAILURE, "ended on"),
    ],
)
def test_certificates_come_to_an_end(
    tmp_path: Path, authority: Authority, days: int, code: Code, says: str
) -> None:
    # (cryptography makes no certificate that ends before it begins.)
    authority.install(tmp_path, authority.issue("compute1", valid=400 * DAY))
    now = datetime.datetime.now(datetime.timezone.utc) + (400 - days) * DAY
    found = result(host.certificates(conf(tmp_path), now))
    assert found.code == code
    assert says in str(found.details)


def test_a_clock_that_is_behind_is_noticed(tmp_path: Path, authority: Authority) -> None:
    authority.install(tmp_path, authority.issue("compute1", valid=LONG))
    now = datetime.datetime.now(datetime.timezone.utc) - DAY
    found = result(host.certificates(conf(tmp_path), now))
    assert found.code == Code.FAILURE
    assert "is the clock right?" in str(found.details)


def test_a_certificate_of_another_host(tmp_path: Path, authority: Authority) -> None:
    authority.install(tmp_path, authority.issue("compute2", valid=LONG))
    found = result(host.certificates(conf(tmp_path)))
    assert found.code == Code.FAILURE
    assert "names compute2, and this is compute1" in str(found.details)


def test_a_certificate_of_another_authority(tmp_path: Path, authority: Authority) -> None:
    authority.install(tmp_path, Authority().issue("compute1", valid=LONG))
    found = result(host.certificates(conf(tmp_path)))
    assert found.code == Code.FAILURE
    assert "is not of the authority" in str(found.details)


def test_a_key_that_others_can_read(tmp_path: Path, authority: Authority) -> None:
    authority.install(tmp_path, authority.issue("compute1", valid=LONG))
    (tmp_path / "key.pem").chmod(0o640)
    assert "chmod 600" in str(result(host.certificates(conf(tmp_path))).details)


def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    assert result(host.certificates(conf(tmp_path))).code == Code.FAILURE


def test_no_certificates_at_all_are_told_of(tmp_path: Path) -> None:
    assert result(host.certificates(conf(tmp_path, insecure=True))).code == Code.WARNING


@pytest.mark.parametrize(
    ("libvirt", "qemu", "code"),
    [
        (9_000_000, 7_002_022, Code.SUCCESS),
        (10_000_000, 8_002_002, Code.SUCCESS),
        (9_000_000, 7_002_000, Code.WARNING),
        (9_000_000, 8_000_004, Code.WARNING),
        (9_000_000, 8_001_005, Code.SUCCESS),
        (9_000_000, 8_002_000, Code.WARNING),
        (9_000_000, 9_000_000, Code.SUCCESS),
        (9_000_000, 6_001_000, Code.FAILURE),
        (7_000_000, 7_002_022, Code.FAILURE),
    ],
)
def test_versions_of_libvirt_and_qemu(libvirt: int, qemu: int, code: Code) -> None:
    assert result(host.versions(libvirt, qemu)).code == code


def test_a_kernel_that_can_do_all() -> None:
    assert result(host.kernel(lambda: None, lambda: "")).code == Code.SUCCESS


def test_a_kernel_without_pagemap_scan() -> None:
    def check() -> None:
        raise exception.UnsupportedKernel("kernel 6.1.0 has no PAGEMAP_SCAN")

    found = result(host.kernel(check, lambda: ""))
    assert found.code == Code.FAILURE
    assert "UNSUPPORTED_KERNEL" in str(found.details)


def test_a_kernel_that_cannot_hold_packets_does_for_some_servers() -> None:
    found = result(host.kernel(lambda: None, lambda: "no qdisc 'plug'"))
    assert found.code == Code.WARNING
    assert "vhost" in str(found.details)


def test_memory_that_libvirt_makes_elsewhere(tmp_path: Path) -> None:
    libvirt = tmp_path / "qemu.conf"
    libvirt.write_text('#memory_backing_dir = "/a"\nmemory_backing_dir = "/dev/shm/other"\n')
    found = result(host.memory("/dev/shm/libvirt", libvirt))
    assert found.code == Code.FAILURE
    assert "libvirt makes memory in /dev/shm/other" in str(found.details)


def test_memory_in_the_same_directory(tmp_path: Path) -> None:
    libvirt = tmp_path / "qemu.conf"
    libvirt.write_text('memory_backing_dir = "/dev/shm/libvirt/"\n')
    found = result(host.memory("/dev/shm/libvirt", libvirt))
    assert found.code == Code.SUCCESS, found.details


def test_memory_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nova_pmt.guest.checks.file_system", lambda _path: 0xEF53)
    found = result(host.memory(str(tmp_path), tmp_path / "absent"))
    assert found.code == Code.FAILURE
    assert "BACKING_NOT_IN_MEMORY" in str(found.details)


def test_programs_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_path", lambda: str(tmp_path))
    assert not host.is_compute_host()
    found = result(host.hypervisor("test:///absent"))
    assert found.code == Code.FAILURE
    assert "there is no program qemu-storage-daemon" in str(found.details)


def test_a_qemu_without_blklogwrites(tmp_path: Path) -> None:
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\necho Supported formats: qcow2 raw\n")
    program.chmod(0o755)
    assert not host._logs_writes(str(program))
    program.write_text("#!/bin/sh\necho Supported formats: blklogwrites qcow2 raw\n")
    assert host._logs_writes(str(program))
