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


"""The driver by itself, on Nova's fake libvirt: each of its methods that is not LibvirtDriver's."""

from __future__ import annotations

import inspect
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.functional_nova import cloud  # isort: skip - first of what imports Nova

from nova import exception as nova_exception
from nova import objects
from nova.compute import power_state, task_states
from nova.network import model as network_model
from nova.virt import event as virtevent
from nova.virt import hardware
from nova.virt.libvirt import LibvirtDriver, config
from nova.virt.libvirt.vif import LibvirtGenericVIFDriver

from nova_pmt import exception
from nova_pmt.openstack import policy
from nova_pmt.openstack.nova import driver as driver_module
from nova_pmt.openstack.nova import private
from nova_pmt.openstack.nova.driver import PMTDriver
from nova_pmt.openstack.nova.standbys import Note

SERVER = "11111111-1111-1111-1111-111111111111"
STANDBY = "22222222-2222-2222-2222-222222222222"
GUARDED = (
    "power_off",
    "power_on",
    "reboot",
    "suspend",
    "resume",
    "rescue",
    "snapshot",
    "volume_snapshot_create",
    "volume_snapshot_delete",
    "attach_volume",
    "detach_volume",
    "swap_volume",
    "extend_volume",
    "attach_interface",
    "detach_interface",
    "migrate_disk_and_power_off",
    "live_migration",
)


SIGNATURES = {
    name: inspect.signature(getattr(cloud.LibvirtDriver, name))
    for name in (*GUARDED, "unrescue", "pause", "unpause", "resume_state_on_host_boot")
}


def call(driver: PMTDriver, name: str, instance: Any) -> None:
    """Call it with all that this series of Nova gives it."""
    parameters = SIGNATURES[name].parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty][1:]
    getattr(driver, name)(*(instance if one == "instance" else one for one in needed))


class FakeAgent:
    """A :class:`nova_pmt.openstack.nova.localagent.LocalAgent`."""

    def __init__(self) -> None:
        self.roles: dict[str, str] = {}
        self.unprotected: list[str] = []
        self.broken: exception.PmtError | None = None
        self.verdicts = ("free", "")
        self.active: str | None = None
        self.here = True
        self.plug = False

    def presence(self) -> Any:
        return SimpleNamespace(plug=self.plug) if self.here else None

    def role(self, uuid: str) -> str | None:
        return self.roles.get(uuid)

    def was_primary(self, uuid: str) -> bool:
        return self.roles.get(uuid) == "primary"

    def unprotect(self, uuid: str) -> bool:
        if self.broken is not None:
            raise self.broken
        self.unprotected.append(uuid)
        return True

    def active_host(self, uuid: str) -> str | None:
        return self.active

    def verdict(self, uuid: str, dead: str = "") -> tuple[str, str]:
        return self.verdicts


@pytest.fixture
def driver(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> PMTDriver:
    path = tmp_path / "nova-pmt.conf"
    path.write_text(f"[nova]\nstandby_user_id = managers\n[guest]\nruntime_directory={tmp_path}\n")
    monkeypatch.setenv("NOVA_PMT_CONFIG", str(path))
    import nova.conf

    nova.conf.CONF.set_override("instances_path", str(tmp_path / "instances"))
    made = PMTDriver(None)
    made._name = "b"
    made.use(FakeAgent())
    made.domains = FakeDomains()
    made.standbys._domains = made.domains
    return made


class FakeDomains:
    def __init__(self) -> None:
        self.situations: dict[str, str] = {}
        self.by_user: list[bool] = []

    def look(self, uuid: str) -> str:
        return self.situations.get(uuid, "absent")

    def settled(self, uuid: str, timeout_s: float) -> str:
        return self.look(uuid)

    def paused_by_user(self, uuid: str) -> bool:
        return self.by_user.pop(0) if self.by_user else False


def server(host: str = "b", uuid: str = SERVER, user: str = "user", **more: Any) -> Any:
    extra_specs = {"ft:mode": more.pop("mode")} if "mode" in more else {}
    return objects.Instance(
        uuid=uuid,
        host=host,
        user_id=user,
        deleted=more.pop("deleted", False),
        task_state=more.pop("task_state", None),
        metadata=more.pop("metadata", {}),
        flavor=objects.Flavor(extra_specs=extra_specs),
        **more,
    )


def standby(host: str = "b") -> Any:
    return server(host, STANDBY, "managers", metadata={policy.STANDBY: SERVER})


def interface(driver: PMTDriver, made: Any, instance: Any) -> str:
    """The XML of an interface that Nova would have made as it is given."""
    with mock.patch.object(LibvirtGenericVIFDriver, "get_config", return_value=made):
        plain: str = driver.vif_driver.get_config(instance, *"1234").to_xml()
    return " ".join(plain.split())


def nic(model: str, **more: Any) -> Any:
    made = config.LibvirtConfigGuestInterface()
    made.net_type, made.mac_addr, made.model, made.source_dev = "bridge", "fa:1", model, "br"
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("plug", ["none", "no agent", "in the kernel"])
def test_there_is_no_vhost_where_the_kernel_cannot_hold_what_it_sends(
    driver: PMTDriver, plug: str
) -> None:
    driver.agent.plug, driver.agent.here = plug == "in the kernel", plug != "no agent"
    many = nic("virtio", driver_name="vhost", vhost_queues=2)
    one, old = nic("virtio"), nic("e1000")
    wanted = server(mode="pmt")
    if plug == "in the kernel":
        assert '<driver name="vhost" queues="2"/>' in interface(driver, many, wanted)
        assert "<driver" not in interface(driver, one, wanted)
    else:
        assert '<driver name="qemu" queues="2"/>' in interface(driver, many, wanted)
        assert '<driver name="qemu"/>' in interface(driver, one, wanted)
    assert "<driver" not in interface(driver, old, wanted)


def test_an_interface_of_a_server_that_cannot_be_protected_is_novas(driver: PMTDriver) -> None:
    assert "<driver" not in interface(driver, nic("virtio"), server())


def test_a_passed_through_device_is_novas(driver: PMTDriver) -> None:
    made = config.LibvirtConfigGuestHostdevPCI()
    made.domain = made.bus = made.slot = made.function = "0"
    assert "qemu" not in interface(driver, made, server(mode="pmt"))


def test_an_interface_that_is_attached_has_no_vhost_either(driver: PMTDriver) -> None:
    guest = mock.Mock(get_power_state=mock.Mock(return_value=power_state.RUNNING))
    with (
        mock.patch.object(driver._host, "get_guest", return_value=guest),
        mock.patch.object(LibvirtGenericVIFDriver, "plug"),
        mock.patch.object(LibvirtGenericVIFDriver, "get_config", return_value=nic("virtio")),
        mock.patch.object(driver, "_build_device_metadata", return_value=None),
        # (33 and 32 ask libvirt, which there is none of.)
        mock.patch.object(driver, "_get_mem_encryption_config", return_value=None, create=True),
        mock.patch.object(driver, "_get_guest_config_meta"),
        mock.patch.object(driver, "get_instance_driver_metadata"),
        mock.patch.object(objects.Instance, "get_network_info"),
        mock.patch.object(objects.Instance, "save"),
    ):
        driver.attach_interface(None, server(mode="pmt"), None, {"address": "fa:1"})
    (attached,) = (call.args[0] for call in guest.attach_device.call_args_list)
    assert attached.driver_name == "qemu"


@pytest.mark.parametrize(
    ("file_backed_mib", "kept"), [(0, {"source": "memfd", "access": "shared"}), (1024, {})]
)
def test_a_migrated_guest_keeps_the_memory_that_it_has(
    driver: PMTDriver, file_backed_mib: int, kept: dict[str, str]
) -> None:
    configured = mock.Mock(libvirt=mock.Mock(file_backed_memory=file_backed_mib))
    running = (
        "<domain><memory>1</memory><memoryBacking><source type='memfd'/><access mode='shared'/>"
        "</memoryBacking></domain>"
    )
    stripped = "<domain><memory>1</memory><memoryBacking/><os/></domain>"  # as Nova makes of it
    guest = mock.Mock(get_xml_desc=mock.Mock(return_value=running))
    with mock.patch.object(LibvirtDriver, "_live_migration_operation") as operation:
        driver._live_migration_operation(None, server(), "b", False, None, guest, [])
    with mock.patch.object(driver_module.nova.conf, "CONF", configured):
        operation.call_args.args[5].migrate("qemu+tcp://b/system", destination_xml=stripped)
    (call,) = guest.migrate.call_args_list
    root = ET.fromstring(call.kwargs["destination_xml"])
    assert [one.tag for one in root] == ["memory", "memoryBacking", "os"]
    backing = root.find("memoryBacking")
    assert backing is not None
    assert {one.tag: one.get("type") or one.get("mode") for one in backing} == kept


@pytest.mark.parametrize("name", GUARDED)
def test_protection_ends_before(driver: PMTDriver, name: str) -> None:
    driver.agent.roles[SERVER] = "primary"
    seen: list[str] = []
    with mock.patch.object(cloud.LibvirtDriver, name, autospec=True) as plain:
        plain.side_effect = lambda *_args, **_kwargs: seen.extend(driver.agent.unprotected)
        call(driver, name, server())
    assert seen == [SERVER]


#: What Nova takes for a refusal that leaves the server as it is, where it takes others for ruin.
ROLLED_BACK = ("suspend", "resume", "migrate_disk_and_power_off")


@pytest.mark.parametrize("name", sorted({*GUARDED} - {"live_migration"}))
def test_nothing_is_done_to_a_server_whose_protection_does_not_end(
    driver: PMTDriver, name: str
) -> None:
    driver.agent.broken = exception.HostUnreachable("no answer")
    with mock.patch.object(cloud.LibvirtDriver, name) as plain:
        with pytest.raises(nova_exception.NovaException, match="no answer") as caught:
            call(driver, name, server(mode="pmt"))
    rolled_back = isinstance(caught.value, nova_exception.InstanceFaultRollback)
    assert rolled_back == (name in ROLLED_BACK)
    assert not plain.called


def test_a_live_migration_that_cannot_begin_is_taken_back_by_nova(driver: PMTDriver) -> None:
    driver.agent.broken = exception.HostUnreachable("no answer")
    recovered = mock.Mock()
    moving = server(mode="pmt")
    with (
        mock.patch.object(cloud.LibvirtDriver, "live_migration") as plain,
        mock.patch("nova.compute.utils.add_instance_fault_from_exc") as fault,
    ):
        driver.live_migration("context", moving, "a", None, recovered, False, "data")
    assert not plain.called
    recovered.assert_called_once_with("context", moving, "a", "data")
    assert "no answer" in str(fault.call_args.args[2])


def test_a_server_that_cannot_be_deleted_now_keeps_its_ports(driver: PMTDriver) -> None:
    driver.agent.broken = exception.HostUnreachable("no answer")
    with mock.patch.object(cloud.LibvirtDriver, "destroy") as plain:
        with pytest.raises(nova_exception.InstancePowerOffFailure, match="no answer"):
            driver.destroy("context", server(mode="pmt"), [])
    assert not plain.called


def test_unrescue_asks_nobody(driver: PMTDriver) -> None:
    driver.agent.broken = exception.HostUnreachable("never asked")
    with mock.patch.object(cloud.LibvirtDriver, "unrescue", autospec=True) as plain:
        call(driver, "unrescue", server(mode="pmt"))
    assert plain.called


def test_a_standby_may_be_kept_for_a_while_by_nova_that_its_owner_deleted(
    driver: PMTDriver,
) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    doomed = standby()
    doomed.task_state = task_states.SOFT_DELETING
    with mock.patch.object(cloud.LibvirtDriver, "power_off") as plain:
        driver.power_off(doomed)
    assert not plain.called


@pytest.mark.parametrize(("verdict", "comes"), [("free", True), ("open", False)])
def test_an_evacuation_is_refused_before_nova_binds_its_ports(
    driver: PMTDriver, verdict: str, comes: bool
) -> None:
    driver.agent.verdicts = (verdict, "c")
    coming = server("a", mode="pmt", task_state=task_states.REBUILDING)
    with mock.patch.object(cloud.LibvirtDriver, "instance_exists") as plain:
        plain.return_value = False
        if comes:
            assert driver.instance_exists(coming) is False
        else:
            with pytest.raises(nova_exception.InstanceFaultRollback, match="may still go on"):
                driver.instance_exists(coming)


@pytest.mark.parametrize("verdict", ["elsewhere", "open"])
def test_a_server_that_goes_on_elsewhere_is_no_error_of_the_boot(
    driver: PMTDriver, verdict: str
) -> None:
    driver.agent.verdicts = (verdict, "c")
    booting = server(mode="pmt")
    with mock.patch.object(cloud.LibvirtDriver, "resume_state_on_host_boot") as plain:
        plain.side_effect = lambda *_args, **_kwargs: driver.before_start(booting)
        call(driver, "resume_state_on_host_boot", booting)
    assert plain.called


def test_a_host_that_boots_waits_for_managers(
    driver: PMTDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["unknown", "unknown", "free"]
    monkeypatch.setattr(driver.agent, "verdict", lambda _uuid: (answers.pop(0), ""))
    monkeypatch.setattr("nova_pmt.openstack.nova.driver._BOOT_EVERY_S", 0.0)
    with mock.patch.object(cloud.LibvirtDriver, "resume_state_on_host_boot") as plain:
        call(driver, "resume_state_on_host_boot", server(mode="pmt"))
    assert plain.called and not answers


def test_interfaces_that_cannot_be_plugged_do_not_keep_nova_compute_from_starting(
    driver: PMTDriver,
) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    with mock.patch.object(driver.standbys, "replug", side_effect=OSError("disk full")):
        driver.plug_vifs(standby(), [])


def deleted_while_away(driver: PMTDriver, servers: dict[str, Any]) -> Any:
    """Nova's database has these servers."""
    found = mock.patch.object(
        driver.standbys, "_instance", lambda _context, uuid: servers.get(uuid)
    )
    found.start()
    return found


def test_a_standby_that_nova_deleted_while_the_host_was_away_is_ended(driver: PMTDriver) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    driver.agent.here = False
    found = deleted_while_away(driver, {SERVER: server("a"), STANDBY: standby()})
    driver.standbys.end_deleted("context")
    assert driver.notes.get(STANDBY) is not None
    found.stop()
    found = deleted_while_away(driver, {SERVER: server("a")})
    driver.standbys.end_deleted("context")
    found.stop()
    assert list(driver.notes) == []


@pytest.mark.parametrize(("host", "left"), [("a", True), ("b", False)])
def test_a_standby_of_a_server_that_nova_knows_to_be_here_is_forgotten(
    driver: PMTDriver, host: str, left: bool
) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    driver.domains.situations[SERVER] = "running"
    found = deleted_while_away(driver, {SERVER: server(host)})
    driver.standbys.end("context", driver.notes.get(STANDBY))
    found.stop()
    assert [note.state for note in driver.notes] == (["left"] if left else [])


@pytest.mark.parametrize("name", GUARDED)
def test_nobody_is_asked_about_an_unprotected_server(driver: PMTDriver, name: str) -> None:
    driver.agent.broken = exception.HostUnreachable("never asked")
    with mock.patch.object(cloud.LibvirtDriver, name, autospec=True) as plain:
        call(driver, name, server())
    assert plain.called


#: Before a live migration Nova asks whether it can be: a standby never comes so far.
NEVER = {"live_migration"}


@pytest.mark.parametrize("name", [*sorted({*GUARDED} - NEVER), "unrescue", "pause", "unpause"])
def test_a_standby_server_is_left_as_it_is(driver: PMTDriver, name: str) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    with mock.patch.object(cloud.LibvirtDriver, name) as plain:
        with pytest.raises(nova_exception.NovaException, match="stands by for"):
            call(driver, name, standby())
    assert not plain.called


def test_what_is_left_of_a_server_that_went_elsewhere_has_no_pair(driver: PMTDriver) -> None:
    driver.agent.broken = exception.HostUnreachable("never asked")
    with mock.patch.object(cloud.LibvirtDriver, "destroy", autospec=True) as plain:
        driver.destroy("context", server("a", mode="pmt"), [])
    assert plain.called


@pytest.mark.parametrize("found", ["waiting", "running"])
def test_a_domain_of_a_standby_is_not_destroyed_as_what_an_evacuation_left(
    driver: PMTDriver, found: str
) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    driver.domains.situations[SERVER] = found
    with mock.patch.object(cloud.LibvirtDriver, "destroy") as plain:
        driver.destroy("context", server("a"), [])
    assert not plain.called
    with mock.patch.object(cloud.LibvirtDriver, "destroy", autospec=True) as plain:
        driver.destroy("context", server("a", deleted=True), [])
    assert plain.called  # Nova reaps what has no server any more


def test_a_pause_is_tried_until_the_guest_stands_still_for_it(driver: PMTDriver) -> None:
    driver.agent.roles[SERVER] = "primary"
    driver.domains.by_user = [False, False, True]
    with mock.patch.object(cloud.LibvirtDriver, "pause", autospec=True) as plain:
        driver.pause(server())
    assert plain.call_count == 3
    assert driver.agent.unprotected == []


def test_the_pause_of_an_unprotected_server_is_one_call(driver: PMTDriver) -> None:
    with mock.patch.object(cloud.LibvirtDriver, "pause", autospec=True) as plain:
        driver.pause(server())
    assert plain.call_count == 1


@pytest.mark.parametrize(
    ("role", "by_user", "told"),
    [
        ("primary", False, power_state.RUNNING),
        ("primary", True, power_state.PAUSED),
        (None, False, power_state.PAUSED),
    ],
)
def test_a_guest_that_stands_still_for_a_checkpoint_is_running(
    driver: PMTDriver, role: str | None, by_user: bool, told: int
) -> None:
    if role:
        driver.agent.roles[SERVER] = role
    driver.domains.by_user = [by_user]
    with mock.patch.object(cloud.LibvirtDriver, "get_info") as plain:
        plain.return_value = hardware.InstanceInfo(state=power_state.PAUSED)
        assert driver.get_info(server()).state == told


def test_the_state_of_a_standby_server_needs_no_domain(driver: PMTDriver) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    assert driver.get_info(standby()).state == power_state.RUNNING
    driver.notes.become(driver.notes.get(STANDBY), "adopted")
    assert driver.get_info(standby()).state == power_state.RUNNING


def test_a_standby_servers_domain_is_the_one_that_waits_and_no_other(driver: PMTDriver) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    driver.domains.situations[SERVER] = "waiting"
    assert driver.domain_of(standby()).uuid == SERVER
    for found in ("running", "stopped", "absent"):
        driver.domains.situations[SERVER] = found
        with pytest.raises(nova_exception.InstanceNotFound):
            driver.domain_of(standby())
    assert driver.domain_of(server()).uuid == SERVER


def test_events_of_checkpoints_are_dropped_and_all_others_pass(driver: PMTDriver) -> None:
    driver.agent.roles[SERVER] = "primary"
    passed: list[Any] = []
    driver.register_event_listener(passed.append)
    kinds = [
        virtevent.EVENT_LIFECYCLE_PAUSED,
        virtevent.EVENT_LIFECYCLE_RESUMED,
        virtevent.EVENT_LIFECYCLE_STARTED,
        virtevent.EVENT_LIFECYCLE_STOPPED,
    ]
    for uuid in (SERVER, STANDBY):
        for kind in kinds:
            driver.emit_event(virtevent.LifecycleEvent(uuid, kind))
            settle()
    told = [(event.get_instance_uuid(), event.get_transition()) for event in passed]
    assert told == [*((SERVER, kind) for kind in kinds[2:]), *((STANDBY, kind) for kind in kinds)]


@pytest.mark.parametrize(
    ("verdict", "passes"),
    [(("free", ""), 1), (("unknown", ""), 1), (("elsewhere", "a"), 0), (("open", "a"), 0)],
)
def test_nova_does_not_hear_that_a_guest_ended_which_goes_on_elsewhere(
    driver: PMTDriver, monkeypatch: pytest.MonkeyPatch, verdict: tuple[str, str], passes: int
) -> None:
    monkeypatch.setattr(driver_module, "DECIDED_S", 0.0)
    driver.agent.roles[SERVER] = "primary"
    driver.agent.verdicts = verdict
    passed: list[Any] = []
    driver.register_event_listener(passed.append)
    driver.emit_event(virtevent.LifecycleEvent(SERVER, virtevent.EVENT_LIFECYCLE_STOPPED))
    settle()
    assert len(passed) == passes


def test_nova_hears_of_a_shutdown_from_inside_once_that_is_decided(
    driver: PMTDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "DECIDING_S", 0.01)
    driver.agent.roles[SERVER] = "primary"
    driver.agent.verdicts = ("open", "a")
    passed: list[Any] = []
    driver.register_event_listener(passed.append)
    driver.emit_event(virtevent.LifecycleEvent(SERVER, virtevent.EVENT_LIFECYCLE_STOPPED))
    time.sleep(0.1)
    assert not passed
    driver.agent.verdicts = ("free", "")
    settle()
    assert len(passed) == 1


def settle() -> None:
    """Wait for the threads of events."""
    for thread in threading.enumerate():
        if "_stopped" in thread.name:
            thread.join(10)


@pytest.mark.parametrize(
    ("host", "note", "active", "there"),
    [
        ("a", True, None, False),
        ("a", False, "b", False),
        ("a", False, "a", True),
        ("a", False, None, True),
        ("b", False, None, True),
    ],
)
def test_a_domain_to_adopt_does_not_stand_in_an_evacuations_way(
    driver: PMTDriver, host: str, note: bool, active: str | None, there: bool
) -> None:
    if note:
        driver.notes.write(Note(STANDBY, SERVER))
    driver.agent.active = active
    driver.domains.situations[SERVER] = "running"
    with mock.patch.object(cloud.LibvirtDriver, "instance_exists", return_value=True):
        assert driver.instance_exists(server(host)) is there


@pytest.mark.parametrize(
    ("verdict", "text"),
    [(("elsewhere", "a"), "it runs on a"), (("open", "a"), "go on"), (("unknown", ""), "tells")],
)
def test_no_second_copy_is_started(driver: PMTDriver, verdict: tuple[str, str], text: str) -> None:
    driver.agent.verdicts = verdict
    driver.domains.situations[SERVER] = "stopped"
    with pytest.raises(nova_exception.Invalid, match=text):
        driver.before_start(server(mode="pmt"))
    driver.before_start(server())  # nobody's business
    driver.domains.situations[SERVER] = "running"
    driver.before_start(server(mode="pmt"))  # here it is


def test_a_rebuild_in_place_is_novas(driver: PMTDriver) -> None:
    with pytest.raises(NotImplementedError):
        driver.rebuild(**_rebuild(evacuate=False))


def test_a_standby_server_is_not_evacuated(driver: PMTDriver) -> None:
    with pytest.raises(nova_exception.Invalid, match="delete it"):
        driver.rebuild(**{**_rebuild(evacuate=True), "instance": standby("a")})


def _rebuild(evacuate: bool) -> dict[str, Any]:
    names = ("image_meta", "injected_files", "admin_password", "allocations", "bdms",
             "detach_block_devices", "attach_block_devices")  # fmt: skip
    return {"context": "context", "instance": server(), "evacuate": evacuate,
            **dict.fromkeys(names)}  # fmt: skip


def test_live_migration_to_the_standbys_host_is_refused_by_the_check(driver: PMTDriver) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    with pytest.raises(nova_exception.MigrationPreCheckError, match="nova-pmt failover"):
        driver.check_can_live_migrate_destination("context", server("a"), {}, {})
    with pytest.raises(nova_exception.MigrationPreCheckError, match="standby server"):
        driver.check_can_live_migrate_source("context", standby(), {})


def test_hosts_that_boot_do_not_start_standbys(driver: PMTDriver) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    with mock.patch.object(cloud.LibvirtDriver, "resume_state_on_host_boot") as plain:
        driver.resume_state_on_host_boot("context", standby(), [], [])
    assert not plain.called


def vif(name: str) -> network_model.VIF:
    return network_model.VIF(id=name, type="ovs")


def moved(driver: PMTDriver, host: str, task_state: str | None, *names: str) -> Any:
    """The protected server as Nova has it now."""
    found = SimpleNamespace(
        uuid=SERVER,
        host=host,
        task_state=task_state,
        get_network_info=lambda: network_model.NetworkInfo([vif(name) for name in names]),
    )
    return mock.patch.object(driver.standbys, "_instance", return_value=found)


def test_interfaces_are_plugged_as_they_are_now(driver: PMTDriver) -> None:
    driver.notes.write(Note(STANDBY, SERVER, vifs=[dict(vif("old")), dict(vif("both"))]))
    driver.vif_driver = mock.Mock()
    with moved(driver, "a", None, "both", "new"):
        driver._replug(SERVER)
    plugged = [one.args[1]["id"] for one in driver.vif_driver.plug.call_args_list]
    unplugged = [one.args[1]["id"] for one in driver.vif_driver.unplug.call_args_list]
    assert (plugged, unplugged) == (["both", "new"], ["old"])
    assert [one["id"] for one in driver.notes.get(STANDBY).vifs] == ["both", "new"]
    with pytest.raises(exception.NotProtected):
        driver._replug("another")


@pytest.mark.parametrize(
    ("host", "task_state", "left"),
    [("a", None, False), ("b", None, True), ("a", "resize_migrating", True)],
)
def test_files_of_a_server_that_has_come_here_outlive_its_standby(
    driver: PMTDriver, host: str, task_state: str | None, left: bool
) -> None:
    driver.notes.write(Note(STANDBY, SERVER, directory=True, vifs=[dict(vif("port"))]))
    directory = Path(private.instance_directory(SERVER))
    directory.mkdir(parents=True)
    driver.agent.here = False
    driver.vif_driver = mock.Mock()
    with moved(driver, host, task_state):
        driver.destroy(None, standby(), [])
    assert directory.exists() is left
    assert driver.vif_driver.unplug.called is not left
    assert driver.notes.get(STANDBY) is None


def test_a_domain_that_waits_and_does_not_end_keeps_its_standby_server(driver: PMTDriver) -> None:
    driver.notes.write(Note(STANDBY, SERVER))
    driver.domains.situations[SERVER] = "waiting"
    driver.agent.end_standby = mock.Mock(side_effect=exception.HostUnreachable("no answer"))
    with pytest.raises(nova_exception.Invalid, match="no answer"):
        driver.destroy(None, standby(), [])
    assert driver.notes.get(STANDBY) is not None
