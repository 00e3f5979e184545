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

"""What a host sees, and the addresses it has."""

from __future__ import annotations

import pytest

from nova_pmt.exception import LabError
from nova_pmt.lab import Lab, libvirtd, network, paths, process, view


def test_addresses():
    assert network.MGMT.address(0) == "10.77.0.1"
    assert network.REPL.address(2) == "10.77.1.12"
    assert network.REPL.mac(2) == "02:00:0a:4d:01:0c"


def test_what_is_on_disk_and_what_is_not(tmp_path):
    assert view.on_disk(tmp_path, "/etc/nova_pmt/tls") == tmp_path / "etc/nova_pmt/tls"
    assert view.on_disk(tmp_path, "/etc/nova_pmt") == tmp_path / "etc/nova_pmt"
    assert view.on_disk(tmp_path, "/etc/nova_pmt_other") is None
    assert view.on_disk(tmp_path, "/run/libvirt") is None


def test_a_checkout_in_tmp_stays_visible(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "checkout", lambda: tmp_path.__class__("/tmp/work/nova_pmt"))
    kept = view.describe("ctl", tmp_path, tmp_path, compute=False, kvm=False)["keep"]
    assert "/tmp/work/nova_pmt" in kept


def test_hosts_have_no_kvm_unless_told(tmp_path):
    seen = view.describe("ctl", tmp_path, tmp_path, compute=False, kvm=False)
    assert "kvm" not in [name for name, *_ in seen["devices"]]


def test_host_uuids_differ_between_hosts_and_labs_and_stay():
    uuids = {libvirtd.host_uuid(lab, host) for lab in "ab" for host in ("compute1", "compute2")}
    assert len(uuids) == 4
    assert libvirtd.host_uuid("a", "compute1") in uuids


def test_configuration_is_a_compute_hosts(tmp_path):
    libvirtd.configure(tmp_path, "a", "compute1")
    text = (tmp_path / "etc/libvirt/qemu.conf").read_text()
    assert "user" not in text
    assert "seccomp" not in text
    assert "dynamic_ownership" not in text
    assert libvirtd.MEMORY_BACKING in text


def test_environment_finds_our_programs_and_has_no_foreign_tmp(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/somewhere")
    env = process.environment({"A": "b"})
    assert "TMPDIR" not in env
    assert env["A"] == "b"
    assert env["PATH"].split(":")[1:3] == ["/usr/local/sbin", "/usr/local/bin"]


@pytest.mark.parametrize("computes", [0, 81])
def test_labs_have_a_sane_number_of_hosts(computes):
    with pytest.raises(LabError):
        Lab(computes)


def test_without_rabbit_there_is_no_url():
    with pytest.raises(LabError, match="RabbitMQ"):
        _ = Lab(rabbit=False).transport_url


def test_url_has_a_password_that_differs():
    assert Lab().transport_url != Lab().transport_url
    assert Lab().transport_url.startswith("rabbit://")
    assert Lab().transport_url.endswith("@10.77.0.1:5672//")


def test_unknown_host_is_told_with_those_that_exist():
    with pytest.raises(LabError) as error:
        Lab(computes=2).host("compute3")
    assert "compute2" in error.value.cure
