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
"""Nova's operations on a protected server, one by one: the operator's guide has them in a table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from nova_pmt.lab.openstack.talker import Talker
from tests.integration.protected import Protected

if TYPE_CHECKING:
    from nova_pmt.lab.openstack import Cloud


def test_protected_by_its_property(web: Protected) -> None:
    server, pair = web.wait(), web.cloud.pmt.pair(web.uuid)
    assert pair is not None
    assert pair.primary_host == server.compute_host != pair.standby_host
    (standby,) = web.standbys()
    assert standby.status == "ACTIVE"
    assert standby.compute_host == pair.standby_host
    assert standby.project_id != server.project_id
    assert web.domains().keys() == {pair.primary_host, pair.standby_host}


def test_its_owner_does_not_see_the_standby(web: Protected) -> None:
    assert [s.id for s in web.cloud.demo.compute.servers()] == [web.uuid]


def test_stop_and_start(web: Protected) -> None:
    before = web.generation()
    web.act("stop_server")
    web.wait("SHUTOFF")
    web.wait_unprotected()
    assert "running" not in web.domains().values()
    web.act("start_server")
    web.wait_protected_anew(before)


@pytest.mark.parametrize("kind", ["HARD", "SOFT"])
def test_reboot(web: Protected, kind: str) -> None:
    boot, before = web.guest().boot_id(), web.generation()
    web.act("reboot_server", kind)
    time.sleep(2)
    web.wait()
    deadline = time.monotonic() + 300
    while web.guest().wait_ready(300).boot_id() == boot and time.monotonic() < deadline:
        time.sleep(1)
    assert web.guest().boot_id() != boot
    if kind == "HARD":
        web.wait_protected_anew(before)
    web.wait_protected()


def test_pause_and_unpause(web: Protected) -> None:
    with Talker(web.guest()) as talker:
        web.act("pause_server")
        web.wait("PAUSED")
        time.sleep(3)
        assert web.wait("PAUSED").status == "PAUSED"
        web.act("unpause_server")
        web.wait()
        talker.wait_answer(time.monotonic())
        talker.finish()
    web.wait_protected()


def test_suspend_and_resume(web: Protected) -> None:
    boot, before = web.guest().boot_id(), web.generation()
    web.act("suspend_server")
    web.wait("SUSPENDED")
    web.wait_unprotected()
    web.act("resume_server")
    web.wait_protected_anew(before)
    assert web.guest().boot_id() == boot


def test_snapshot(web: Protected) -> None:
    boot = web.guest().boot_id()
    compute = web.cloud.demo.compute
    image = compute.create_server_image(web.uuid, "snapshot", wait=True, timeout=600)
    web.wait_protected()
    assert web.guest().boot_id() == boot
    web.cloud.demo.image.delete_image(image.id)


def test_attach_and_detach_interface(web: Protected) -> None:
    boot = web.guest().boot_id()
    network = web.cloud.demo.network.find_network("guests")
    port = web.cloud.demo.network.create_port(network_id=network.id, name="second")
    web.act("create_server_interface", port_id=port.id)
    web.wait_protected()
    assert web.guest().boot_id() == boot
    web.cloud.demo.compute.delete_server_interface(port.id, server=web.uuid)
    deadline = time.monotonic() + 300
    while len(list(web.cloud.demo.network.ports(device_id=web.uuid))) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    web.wait_protected()
    web.cloud.demo.network.delete_port(port.id, ignore_missing=True)


def test_property_is_taken_away_and_set(web: Protected) -> None:
    boot, before = web.guest().boot_id(), web.generation()
    compute = web.cloud.demo.compute
    compute.delete_server_metadata(web.uuid, ["ft"])
    web.wait_unprotected()
    deadline = time.monotonic() + 300
    while web.standbys():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    compute.set_server_metadata(web.uuid, ft="pmt")
    web.wait_protected_anew(before)
    assert web.guest().boot_id() == boot


def test_console_and_diagnostics(web: Protected) -> None:
    output = web.cloud.demo.compute.get_server_console_output(web.uuid)["output"]
    assert "TICK " in output  # READY went when it was resumed: a new QEMU, a new log
    found = web.cloud.admin.compute.get_server_diagnostics(web.uuid)
    assert found.state in ("running", "paused")


def test_rebuild(web: Protected) -> None:
    boot, before = web.guest().boot_id(), web.generation()
    image = web.cloud.demo.image.find_image("guest")
    web.act("rebuild_server", image=image.id, name="web")
    time.sleep(2)
    web.wait_protected_anew(before)
    assert web.guest().boot_id() != boot


def test_shelve_and_unshelve(web: Protected) -> None:
    before = web.generation()
    web.act("shelve_server")
    web.wait("SHELVED_OFFLOADED")
    deadline = time.monotonic() + 300
    while web.standbys() or web.domains():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    web.act("unshelve_server")
    web.wait_protected_anew(before)


def test_live_migration_is_refused(web: Protected) -> None:
    boot, host = web.guest().boot_id(), web.wait().compute_host
    web.cloud.admin.compute.live_migrate_server(web.uuid, host=None, block_migration="auto")
    time.sleep(3)
    web.wait(host=host)
    web.wait_protected()
    assert web.guest().boot_id() == boot


def test_delete_leaves_nothing(cloud: Cloud, web: Protected) -> None:
    from nova_pmt.lab.openstack import leftovers

    servers = [web.uuid, *(str(standby.id) for standby in web.standbys())]
    cloud.demo.compute.delete_server(web.uuid)
    cloud.wait_gone(web.uuid)
    assert leftovers.wait_none(cloud, servers, 300) == []
