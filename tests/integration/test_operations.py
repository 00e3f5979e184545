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
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from nova_pmt.lab.openstack.talker import Talker
from tests.integration.conftest import SPARE
from tests.integration.protected import Protected

if TYPE_CHECKING:
    from nova_pmt.lab.openstack import Cloud


@pytest.fixture(scope="session")
def larger(cloud: Cloud) -> str:
    """Id of a flavor with more memory. It stays: standby servers are made of it, too."""
    compute = cloud.admin.compute
    flavor = compute.create_flavor(name="ft-larger", ram=160, vcpus=1, disk=1)
    compute.create_flavor_extra_specs(flavor, {"ft:mode": "allowed"})
    return str(flavor.id)


@pytest.fixture
def spare(cloud: Cloud) -> Iterator[str]:
    """A third host, which takes part only here."""
    compute = cloud.admin.compute
    (service,) = compute.services(binary="nova-compute", host=SPARE)
    compute.enable_service(service)
    yield SPARE
    compute.disable_service(service)


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
    web.wait_without_standby()
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


def test_rescue_and_unrescue(web: Protected) -> None:
    before = web.generation()
    web.act("rescue_server")
    web.wait("RESCUE")
    web.wait_without_standby()
    web.act("unrescue_server")
    web.wait_protected_anew(before)


def test_resize_and_revert_and_confirm(web: Protected, larger: str) -> None:
    host, flavor, before = web.wait().compute_host, web.standbys()[0].flavor.id, web.generation()
    web.act("resize_server", larger)
    assert web.wait("VERIFY_RESIZE").compute_host != host
    web.wait_without_standby()
    web.act("revert_server_resize")
    web.wait_protected_anew(before)
    assert web.wait().compute_host == host
    assert [standby.flavor.id for standby in web.standbys()] == [flavor]
    before = web.generation()
    web.act("resize_server", larger)
    moved = web.wait("VERIFY_RESIZE").compute_host
    web.act("confirm_server_resize")
    web.wait_protected_anew(before)
    assert web.wait().compute_host == moved != host
    assert [standby.flavor.name for standby in web.standbys()] == ["ft-larger"]
    assert web.running() == [moved]


def test_cold_migration(web: Protected) -> None:
    """To the one other host: that of its standby, which moves."""
    host, before = web.wait().compute_host, web.generation()
    web.cloud.admin.compute.migrate_server(web.uuid)
    moved = web.wait("VERIFY_RESIZE").compute_host
    web.act("confirm_server_resize")
    web.wait_protected_anew(before)
    assert web.wait().compute_host == moved != host
    assert [standby.compute_host for standby in web.standbys()] == [host]
    assert web.running() == [moved]


def test_live_migration(web: Protected, spare: str) -> None:
    """To a host without its standby: the guest lives on, and is protected again."""
    boot, before = web.guest().boot_id(), web.generation()
    with Talker(web.guest()) as talker:
        web.cloud.admin.compute.live_migrate_server(web.uuid, host=spare, block_migration="auto")
        web.wait_on(spare)
        web.wait_protected_anew(before)
        talker.finish()
    assert web.guest().boot_id() == boot
    assert web.running() == [spare]
    # Back, for the tests that follow: its standby has the one host that it may not go to.
    before, away = web.generation(), web.standbys()[0].compute_host
    (back,) = {host.name for host in web.cloud.lab.computes} - {spare, away}
    web.cloud.admin.compute.live_migrate_server(web.uuid, host=back, block_migration="auto")
    web.wait_on(back)
    web.wait_protected_anew(before)
    assert web.guest().boot_id() == boot


def test_what_is_nothing_to_protection(web: Protected) -> None:
    before, compute = web.generation(), web.cloud.demo.compute
    compute.update_server(web.uuid, name="renamed")
    compute.add_tag_to_server(web.uuid, "tagged")
    compute.set_server_metadata(web.uuid, purpose="test")
    web.act("lock_server")
    web.act("unlock_server")
    web.cloud.admin.compute.trigger_server_crash_dump(web.uuid)
    web.stays_protected(before)


def test_reset_state(web: Protected) -> None:
    before = web.generation()
    for state in ("error", "active"):
        web.cloud.admin.compute.reset_server_state(web.uuid, state)
        web.wait(state.upper())
        web.stays_protected(before)


def test_a_standby_server_is_left_as_it_is(web: Protected) -> None:
    before, (standby,) = web.generation(), web.standbys()
    compute = web.cloud.admin.compute
    for action in ("stop_server", "pause_server", "reboot_server", "migrate_server"):
        getattr(compute, action)(standby.id, *(("HARD",) if action == "reboot_server" else ()))
        web.wait_task_over(standby.id)
        web.stays_protected(before)
    told = ""
    for action in compute.server_actions(standby.id):
        told += str(compute.get_server_action(action.request_id, standby.id).events)
    assert f"stands by for {web.uuid}" in told


def test_host_is_disabled(web: Protected) -> None:
    """Pairs stay; no new standby comes there. (And who deletes a standby gets another.)"""
    before, (standby,) = web.generation(), web.standbys()
    compute = web.cloud.admin.compute
    (service,) = compute.services(binary="nova-compute", host=standby.compute_host)
    compute.disable_service(service)
    try:
        web.stays_protected(before)
        compute.delete_server(standby.id)
        web.cloud.wait_gone(standby.id)
        time.sleep(20)
        pair = web.cloud.pmt.pair(web.uuid)
        assert pair is not None
        assert pair.state != "protected"
        assert [one for one in web.standbys() if one.status == "ACTIVE"] == []
    finally:
        compute.enable_service(service)
    web.wait_protected_anew(before)


def test_host_that_lives_is_forced_down(web: Protected) -> None:
    """By an operator, who then evacuates: no second copy."""
    boot, before = web.guest().boot_id(), web.generation()
    compute, host = web.cloud.admin.compute, web.wait().compute_host
    (service,) = compute.services(binary="nova-compute", host=host)
    compute.update_service_forced_down(service, forced=True)
    try:
        web.stays_protected(before)
        compute.evacuate_server(web.uuid, host=web.standbys()[0].compute_host)
        web.wait_task_over(web.uuid)
        assert web.wait(host=host).status == "ACTIVE"
        web.stays_protected(before)
    finally:
        compute.update_service_forced_down(service, forced=False)
    web.cloud.wait_computes(web.cloud.lab.computes)
    assert web.guest().boot_id() == boot
    assert web.running() == [host]


def test_live_migration_to_its_standbys_host_is_refused(web: Protected) -> None:
    from openstack.exceptions import BadRequestException

    before, (standby,) = web.generation(), web.standbys()
    compute = web.cloud.admin.compute
    for host in (standby.compute_host, None):  # (There is no third one.)
        with pytest.raises(BadRequestException, match="No valid host"):
            compute.live_migrate_server(web.uuid, host=host, block_migration="auto")
    log = web.cloud.lab.host(standby.compute_host).log_directory
    text = (log / f"{standby.compute_host}-nova-compute.log").read_text(errors="replace")
    assert f"{standby.compute_host} has the standby of {web.uuid}" in text
    web.wait_task_over(web.uuid)
    web.stays_protected(before)


def test_delete_leaves_nothing(cloud: Cloud, web: Protected) -> None:
    from nova_pmt.lab.openstack import leftovers

    servers = [web.uuid, *(str(standby.id) for standby in web.standbys())]
    cloud.demo.compute.delete_server(web.uuid)
    cloud.wait_gone(web.uuid)
    assert leftovers.wait_none(cloud, servers, 300) == []
