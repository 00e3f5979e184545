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

"""Turning protection off leaves a domain exactly as libvirt and Nova expect it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest.monitor import LibvirtMonitor
from nova_pmt.lab import Disk, LabGuest, LabHost
from tests.functional.conftest import Boot
from tests.functional.pairs import protect
from tests.functional.test_disks import IMAGES, leftovers

DISKS = (
    Disk(f"{IMAGES}/unprotect/a.qcow2", size_mib=56),
    Disk(f"{IMAGES}/unprotect/b.raw", size_mib=56, format="raw", bus="scsi"),
)


@pytest.fixture(autouse=True)
def no_images(one: LabHost, two: LabHost) -> Iterator[None]:
    """Disks are empty, and gone at the end."""
    yield
    for host in one, two:
        shutil.rmtree(host.path(f"{IMAGES}/unprotect"), ignore_errors=True)


def facts(guest: LabGuest) -> dict[str, Any]:
    """Everything about a domain and its QEMU that protection could have changed."""
    connection = guest_domain.connect(guest.host.libvirt_uri)
    try:
        domain = guest_domain.Domain.find(connection, guest.uuid)
        with LibvirtMonitor(domain.handle, connection) as monitor:
            links = []
            for name in os.listdir(f"/proc/{guest.pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # QEMU opens and closes files
                    links.append(os.readlink(f"/proc/{guest.pid}/fd/{name}"))
            return {
                "capabilities": monitor.execute("query-migrate-capabilities"),
                "parameters": monitor.execute("query-migrate-parameters"),
                "block nodes": monitor.execute("query-named-block-nodes"),
                "block devices": monitor.execute("query-block"),
                "exports": monitor.execute("query-block-exports"),
                "objects": monitor.execute("qom-list", path="/objects"),
                "character devices": sorted(
                    device["label"] for device in monitor.execute("query-chardev")
                ),
                "status": monitor.execute("query-status"),
                "xml": domain.xml(),
                "state": domain.handle.state(),
                "userfaultfds": [link for link in links if "userfaultfd" in link],
                "left in the runtime directory": sorted(
                    os.listdir(guest.host.path(f"/run/nova_pmt/guests/{guest.uuid}"))
                    if guest.host.path(f"/run/nova_pmt/guests/{guest.uuid}").exists()
                    else []
                ),
            }
    finally:
        connection.close()


def _names(found: list[dict[str, Any]]) -> list[Any]:
    """What is there, without what changes by being used."""
    return [
        (
            entry.get("node-name"),
            entry.get("qdev"),
            entry.get("inserted", {}).get("node-name"),
            entry.get("dirty-bitmaps"),
        )
        for entry in found
    ]


@pytest.mark.parametrize("prepared", [True, False])
def test_unprotect_leaves_everything_as_it_was(
    one: LabHost, two: LabHost, boot: Boot, prepared: bool
) -> None:
    guest = boot(one, shared_memory=prepared, second_monitor=prepared, disks=DISKS)
    if prepared:  # otherwise there is nothing in them to copy
        guest.control("disk write rand 4 100 vda")
    facts(guest)  # libvirt's passthrough itself marks the domain: look once before
    before = facts(guest)
    with protect(guest, two) as pair:
        pair.protected().rounds(10)
        during = facts(guest)
        for what in ("userfaultfds", "block nodes", "objects", "character devices"):
            assert during[what] != before[what]
        pair.primary.command("unprotect")
        pair.primary.state("unprotected")
        pair.standby.state("cancelled")
    after = facts(guest)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    # libvirt gives the reason of a state as that of its last change; both mean "it runs"
    assert not changed or set(changed) == {"state"}
    assert after["state"][0] == before["state"][0] == 1
    assert guest.name not in two.guests()
    for host in one, two:
        assert not leftovers(host, guest)
    for disk in DISKS:
        assert one.path(disk.path).exists()
        assert not two.path(disk.path).exists()


def test_a_guest_is_protected_again_after_unprotect(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    for _ in range(3):
        with protect(guest, two) as pair:
            pair.protected().rounds(3)
            pair.primary.command("unprotect")
            pair.primary.state("unprotected")
    assert guest.verify().startswith("ok")


def test_a_worker_takes_over_what_a_dead_one_left_in_qemu(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one, disks=DISKS)
    facts(guest)
    before = facts(guest)
    client = guest.transactions(1)
    with protect(guest, two) as pair:
        pair.protected().rounds(3)
        client.request()
        pair.primary.kill()
        one.run(["virsh", "suspend", guest.name])  # so that there are no two while the test looks
        pair.standby.state("standby_active")
        two.run(["virsh", "destroy", guest.name])
    one.run(["virsh", "resume", guest.name])
    with protect(guest, two) as pair:
        pair.protected().rounds(10)
        pair.primary.command("unprotect")
        pair.primary.state("unprotected")
    after = facts(guest)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed.keys() - {"state", "block nodes", "block devices"}, changed
    for what in ("block nodes", "block devices"):  # but for the sizes of their images
        assert _names(after[what]) == _names(before[what])
    client.request()
    assert client.verify() == 2
    assert guest.verify().startswith("ok")
