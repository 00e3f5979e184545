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


"""PMTDriver: Nova's libvirt driver, for hosts that have protected servers and standbys.

To a server that is neither it is LibvirtDriver. It makes the domains of servers that may be
protected ready for that; it lets protection end before Nova does what no pair lives through; it
takes a standby server for what the agent needs; and an evacuation to the host where the guest runs
already adopts the guest.
"""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import nova.conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova.compute import power_state, task_states
from nova.virt import event as virtevent
from nova.virt import hardware
from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.manager.rpcapi import ManagerAPI
from nova_pmt.openstack import policy, settings
from nova_pmt.openstack.nova import bus, guestxml, private
from nova_pmt.openstack.nova.domains import Domains
from nova_pmt.openstack.nova.localagent import LocalAgent
from nova_pmt.openstack.nova.standbys import Note, Notes
from nova_pmt.openstack.nova.standbyserver import Refused, StandbyServers, refused
from nova_pmt.openstack.nova.stats import HostStats

LOG = log.getLogger(__name__)

TRAIT = "CUSTOM_PMT"
#: How long an evacuation waits for an agent that has still to decide about a domain, in seconds.
SETTLE_S = 20.0
#: libvirt does not suspend a guest that stands still for a checkpoint at that moment, and says
#: nothing of it: how often it is tried, and how long after each time, in seconds.
_PAUSE_ATTEMPTS, _PAUSE_EVERY_S = 200, 0.01
#: Free memory in stats changes all the time, and each change is written to Nova's database.
_FREE_STEP_MIB = 64
#: A host that boots waits so long for managers that say whether its servers run elsewhere.
_BOOT_S, _BOOT_EVERY_S = 60.0, 2.0
#: A guest that has ended may have been shut down from inside, or have a standby that is about to go
#: on: how long that may take to be decided, and how often is asked, in seconds.
DECIDED_S, DECIDING_S = 60.0, 1.0
_CHECKPOINTS = frozenset({virtevent.EVENT_LIFECYCLE_PAUSED, virtevent.EVENT_LIFECYCLE_RESUMED})


class PMTDriver(private.Seams):
    """See the module's text."""

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        self._conf = settings.load()
        self._server: Any = None
        self._serving = threading.Event()
        self._finishing = threading.Lock()
        self._began = time.monotonic()
        self.domains = Domains(self.connection, private.no_such_domain)
        self._know(nova.conf.CONF.host)

    def _know(self, host: str) -> None:
        self._name = host
        self.notes = Notes(private.notes_directory(host))
        self._transport = bus.transport(self._conf)
        agents = managers = None
        if self._transport is not None:
            agents = AgentAPI(self._transport)
            if self._conf.manager.enabled:
                managers = ManagerAPI(self._transport, timeout_s=self._conf.manager.call_timeout_s)
        self.use(LocalAgent(host, self._conf.guest.runtime_directory, agents, managers))

    def use(self, agent: LocalAgent) -> None:
        """The agent of this host, and the managers; tests bring others."""
        self.agent = agent
        self.standbys = StandbyServers(
            self._name,
            self,
            self.notes,
            self.domains,
            agent,
            frozenset(self._conf.nova.standby_user_id),
        )

    def init_host(self, host: str) -> None:
        self._know(host)
        super().init_host(host)
        if self._transport is None:
            LOG.warning("There is no nova-pmt.conf: no server of this host can be protected")

    def _begin_to_serve(self) -> None:
        """Answer managers; once.

        Not before Nova asks for this host's resources: until then it starts, and cleans up after
        evacuations itself. Two at once are in each other's way.
        """
        if self._transport is None or self._server is not None:
            return
        endpoint = bus.Endpoint(self._finish_evacuations, self._replug)
        self._server = bus.server(self._transport, self._name, endpoint)
        # In a thread: it waits for the message bus for as long as there is none.
        threading.Thread(target=self._serve, name="pmt-serve", daemon=True).start()

    def _serve(self) -> None:
        self._server.start()
        self._serving.set()
        LOG.info("nova-pmt-compute of %s is ready for managers", self._name)

    def cleanup_host(self, host: str) -> None:
        if self._serving.is_set():
            self._server.stop()
        super().cleanup_host(host)

    # -- what this host is -----------------------------------------------------------------

    def get_available_resource(self, nodename: str) -> dict[str, Any]:
        self._begin_to_serve()
        self.standbys.end_deleted(nova_context.get_admin_context())
        resources: dict[str, Any] = super().get_available_resource(nodename)
        stats = dict(resources.get("stats") or {})
        stats.update(self._stats().write())
        resources["stats"] = stats
        return resources

    def _stats(self) -> HostStats:
        standbys = sum(note.state == "waiting" for note in self.notes)
        seen = self.agent.presence()
        if seen is None:
            return HostStats(agent=False, standbys=standbys)
        free_mib = seen.backing_free_bytes >> 20
        return HostStats(
            agent=True,
            release=seen.release,
            cpu_model=seen.cpu_model,
            machine_types=frozenset(seen.machine_types),
            backing_free_mib=free_mib - free_mib % _FREE_STEP_MIB,
            standbys=max(standbys, seen.standbys),
            replication_mbit=seen.replication_mbit,
        )

    def update_provider_tree(
        self, provider_tree: Any, nodename: str, *args: Any, **kwargs: Any
    ) -> None:
        super().update_provider_tree(provider_tree, nodename, *args, **kwargs)
        if self.agent.presence() is not None:
            provider_tree.add_traits(nodename, TRAIT)
        else:
            provider_tree.remove_traits(nodename, TRAIT)

    # -- domains of servers that may be protected ---------------------------------------------

    def wish(self, instance: Any) -> policy.Wish:
        """What the server is to have."""
        metadata = dict(instance.metadata)
        if self.standbys.protected_of(instance) is None:
            metadata.pop(policy.STANDBY, None)
        return policy.wish(
            instance.flavor.extra_specs or {}, metadata, self._conf.nova.honour_property
        )

    def adapt_xml(self, instance: Any, xml: str) -> str:
        if not self.wish(instance).prepared:
            return xml
        directory = os.path.join(self._conf.guest.runtime_directory, guestxml.QMP_DIRECTORY)
        found = directory if os.path.isdir(directory) else None
        return guestxml.prepared(xml, instance.uuid, qmp_directory=found)

    def adapt_migration(self, xml: str, running: str) -> str:
        if nova.conf.CONF.libvirt.file_backed_memory:
            return xml  # it is Nova's own
        return guestxml.with_memory_of(xml, running)

    def adapt_interface(self, instance: Any, config: Any) -> None:
        """No vhost where the kernel cannot hold what it sends."""
        if getattr(config, "model", None) != "virtio" or not self.wish(instance).prepared:
            return
        seen = self.agent.presence()
        if seen is None or not seen.plug:
            config.driver_name = "qemu"

    def before_start(self, instance: Any) -> None:
        """One copy of a guest: another host may have gone on with it while this one was away."""
        if not self.wish(instance).prepared or self.domains.look(instance.uuid) == "running":
            return
        self._refuse_second_copy(instance, *self.agent.verdict(instance.uuid))

    def _refuse_second_copy(self, instance: Any, verdict: str, host: str) -> None:
        why = {
            "elsewhere": f"it runs on {host}",
            "open": f"its standby on {host} may still go on; wait until the managers have decided, "
            "or let go of the pair with 'nova-pmt unprotect'",
            "unknown": "no nova-pmt-manager tells whether it runs on another host",
        }.get(verdict)
        if why is not None:
            raise refused(f"Server {instance.uuid} is not started on {self._name}: {why}.")

    # -- standby servers -------------------------------------------------------------------------

    def domain_of(self, instance: Any) -> Any:
        note = self.notes.get(instance.uuid)
        if note is None:
            return instance
        if note.state == "waiting" and self.domains.look(note.protected) == "waiting":
            return SimpleNamespace(uuid=note.protected, name=note.protected)
        # Not the guest that went on: what is done to the standby server must not be done to it.
        raise nova_exception.InstanceNotFound(instance_id=instance.uuid)

    def spawn(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        protected = self.standbys.protected_of(instance)
        if protected is None:
            super().spawn(context, instance, *args, **kwargs)
        else:
            self.standbys.spawn(context, instance, protected)

    def get_info(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        if self.notes.get(instance.uuid) is not None:
            return hardware.InstanceInfo(state=power_state.RUNNING)
        info = super().get_info(instance, *args, **kwargs)
        if (
            info.state == power_state.PAUSED
            and self.agent.role(instance.uuid) == "primary"
            and not self.domains.paused_by_user(instance.uuid)
        ):
            info.state = power_state.RUNNING  # it stands still for a checkpoint
        return info

    def list_instance_uuids(self) -> list[str]:
        waiting = {note.protected: note for note in self.notes if note.state == "waiting"}
        found = []
        for uuid in super().list_instance_uuids():
            note = waiting.get(uuid)
            standby = note is not None and self.domains.look(uuid) == "waiting"
            found.append(note.standby if standby and note is not None else uuid)
        return found

    def plug_vifs(self, instance: Any, network_info: Any) -> None:
        note = self.notes.get(instance.uuid)
        if note is None:
            super().plug_vifs(instance, network_info)
        elif note.state == "waiting":  # nova-compute starts, perhaps with its host
            try:
                self.standbys.replug(nova_context.get_admin_context(), note)
            except Exception:  # managers have it done again before they protect
                LOG.exception("%s: its standby's interfaces are not plugged", note.protected)

    def unplug_vifs(self, instance: Any, network_info: Any) -> None:
        if self.notes.get(instance.uuid) is None:
            super().unplug_vifs(instance, network_info)

    def resume_state_on_host_boot(
        self, context: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.notes.get(instance.uuid) is not None:
            return
        if self.wish(instance).prepared:  # managers may boot later than this host
            while (
                time.monotonic() < self._began + _BOOT_S
                and self.agent.verdict(instance.uuid)[0] == "unknown"
            ):
                time.sleep(_BOOT_EVERY_S)
        try:
            super().resume_state_on_host_boot(context, instance, *args, **kwargs)
        except Refused as error:
            # It runs elsewhere, or may: nothing is wrong with its record.
            LOG.warning("%s", error)

    def instance_exists(self, instance: Any) -> bool:
        """Not when the domain is the one that an evacuation to this host shall adopt.

        :raises nova.exception.InstanceFaultRollback: it is being evacuated to this host, and must
            not be. Afterwards Nova binds its ports to this host, which nothing would take back.
        """
        if (
            instance.host not in (None, self._name)
            and instance.task_state == task_states.REBUILDING
        ):
            try:
                self._refuse_evacuation(instance)
            except Refused as error:
                raise nova_exception.InstanceFaultRollback(error) from error
        if instance.host != self._name and self.domains.look(instance.uuid) != "absent":
            if self.notes.of(instance.uuid) is not None:
                return False
            try:
                if self.agent.active_host(instance.uuid) == self._name:
                    return False
            except exception.PmtError as error:
                LOG.warning("%s: whether it went on here is not known: %s", instance.uuid, error)
        return bool(super().instance_exists(instance))

    def destroy(
        self, context: Any, instance: Any, network_info: Any, *args: Any, **kwargs: Any
    ) -> None:
        note = self.notes.get(instance.uuid)
        if note is not None:
            self.standbys.end(context, note)
            return
        if self._kept(instance):
            return
        try:
            self._unprotect(instance, "destroyed")
        except Refused as error:
            # The one error after which Nova leaves the ports to the guest, which runs on.
            raise nova_exception.InstancePowerOffFailure(reason=str(error)) from error
        super().destroy(context, instance, network_info, *args, **kwargs)

    def cleanup(
        self, context: Any, instance: Any, network_info: Any, *args: Any, **kwargs: Any
    ) -> None:
        note = self.notes.get(instance.uuid)
        if note is not None:
            self.standbys.end(context, note)
        elif not self._kept(instance):
            super().cleanup(context, instance, network_info, *args, **kwargs)

    def _kept(self, instance: Any) -> bool:
        """Whether the server's domain and files here are those of its standby.

        After a failover from this host nova-compute destroys, at its start, what the server left
        here; by then this host may be where its new standby is.
        """
        note = self.notes.of(instance.uuid)
        if note is None or instance.host == self._name:
            return False
        if instance.deleted:
            if note.state == "left":
                self.notes.remove(note)
            return False
        if self.domains.look(instance.uuid) == "stopped":
            self.undefine(instance)
        LOG.info("%s is left alone: server %s stands by for it", instance.uuid, note.standby)
        return True

    # -- adoption ------------------------------------------------------------------------------

    def rebuild(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        if self._standby(instance) is not None:
            raise refused("A standby server is not rebuilt: delete it, and there is a new one.")
        if not kwargs.get("evacuate"):
            # (Nova's default destroys and spawns: protection ends with the former.)
            return super().rebuild(context, instance, *args, **kwargs)
        if self._refuse_evacuation(instance) != "running":
            raise NotImplementedError  # it runs nowhere: Nova boots it anew
        self._adopt(instance, kwargs.get("network_info"))

    def _refuse_evacuation(self, instance: Any) -> str:
        """See that an evacuation to this host makes no second copy; how its domain is here.

        :raises nova.exception.Invalid: it might.
        """
        found = self.domains.settled(instance.uuid, SETTLE_S)
        if found == "waiting":
            raise refused(
                f"The standby of {instance.uuid} on {self._name} still waits: whether it goes on "
                "is not decided. Nothing was done to it; evacuate again when 'nova-pmt status' "
                "tells where the server runs."
            )
        if found != "running" and (
            self.wish(instance).prepared or self.notes.of(instance.uuid) is not None
        ):
            verdict = self.agent.verdict(instance.uuid, dead=instance.host or "")
            self._refuse_second_copy(instance, *verdict)
        return found

    def _adopt(self, instance: Any, network_info: Any) -> None:
        LOG.info("%s runs on %s already, and is adopted", instance.uuid, self._name)
        note = self.notes.of(instance.uuid)
        if note is not None and note.state == "left":
            self.notes.remove(note)
        elif note is not None:
            self.notes.become(note, "adopted")
        try:
            super().plug_vifs(instance, network_info or [])
        except Exception:  # the guest runs; Nova heals its network later
            LOG.exception("%s: its interfaces could not be plugged again", instance.uuid)
        instance.task_state = task_states.REBUILD_SPAWNING
        instance.save(expected_task_state=[task_states.REBUILDING])

    # -- before what no pair lives through --------------------------------------------------------

    def _standby(self, instance: Any) -> str | None:
        """UUID of the server that it stands by for."""
        note = self.notes.get(instance.uuid)
        return note.protected if note is not None else self.standbys.protected_of(instance)

    def _before(self, instance: Any, what: str) -> None:
        """An operation is about to begin that a pair does not live through.

        :param what: is done to the server, as a participle.
        :raises nova.exception.Invalid: it is a standby server, or protection does not end.
        """
        protected = self._standby(instance)
        if protected is not None:
            raise refused(
                f"Server {instance.uuid} stands by for {protected}, and cannot be {what}; delete "
                "it, and there is a new one."
            )
        self._unprotect(instance, what)

    def _before_or_back(self, instance: Any, what: str) -> None:
        """As :meth:`_before`, where Nova would take any other error for a server that is broken.

        :raises nova.exception.InstanceFaultRollback: the server stays as it is.
        """
        try:
            self._before(instance, what)
        except Refused as error:
            raise nova_exception.InstanceFaultRollback(error) from error

    def _unprotect(self, instance: Any, what: str) -> None:
        if instance.host not in (None, self._name):
            return  # what is left of it here has lost its pair
        if self.agent.role(instance.uuid) is None and not self.wish(instance).prepared:
            return
        try:
            if self.agent.unprotect(instance.uuid):
                LOG.info("%s is unprotected, since it is to be %s", instance.uuid, what)
        except exception.PmtError as error:
            raise refused(
                f"Server {instance.uuid} cannot be {what} while it is protected, and its "
                f"protection does not end: {error} {error.cure}"
            ) from error

    def power_off(self, instance: Any, *args: Any, **kwargs: Any) -> None:
        if self._standby(instance) is not None and instance.task_state == task_states.SOFT_DELETING:
            return  # Nova will destroy it when it reclaims what was deleted
        self._before(instance, "stopped")
        super().power_off(instance, *args, **kwargs)

    def power_on(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before(instance, "started")
        super().power_on(context, instance, *args, **kwargs)

    def reboot(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before(instance, "rebooted")  # (also SOFT: Nova ends QEMU and starts another)
        super().reboot(context, instance, *args, **kwargs)

    def suspend(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before_or_back(instance, "suspended")
        super().suspend(context, instance, *args, **kwargs)

    def resume(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before_or_back(instance, "resumed")
        super().resume(context, instance, *args, **kwargs)

    def rescue(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before(instance, "rescued")
        super().rescue(context, instance, *args, **kwargs)

    def unrescue(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        if self._standby(instance) is not None:  # (what is rescued has no pair)
            self._before(instance, "unrescued")
        super().unrescue(context, instance, *args, **kwargs)

    def snapshot(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before(instance, "imaged")
        super().snapshot(context, instance, *args, **kwargs)

    def volume_snapshot_create(
        self, context: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._before(instance, "snapshotted")
        super().volume_snapshot_create(context, instance, *args, **kwargs)

    def volume_snapshot_delete(
        self, context: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._before(instance, "snapshotted")
        super().volume_snapshot_delete(context, instance, *args, **kwargs)

    def attach_volume(
        self, context: Any, connection_info: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._before(instance, "given a volume")
        super().attach_volume(context, connection_info, instance, *args, **kwargs)

    def detach_volume(
        self, context: Any, connection_info: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._before(instance, "separated from a volume")
        super().detach_volume(context, connection_info, instance, *args, **kwargs)

    def swap_volume(
        self, context: Any, old: Any, new: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._before(instance, "given another volume")
        super().swap_volume(context, old, new, instance, *args, **kwargs)

    def extend_volume(
        self, context: Any, connection_info: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._before(instance, "given a larger volume")
        super().extend_volume(context, connection_info, instance, *args, **kwargs)

    def attach_interface(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before(instance, "given an interface")
        super().attach_interface(context, instance, *args, **kwargs)

    def detach_interface(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        self._before(instance, "separated from an interface")
        super().detach_interface(context, instance, *args, **kwargs)

    def migrate_disk_and_power_off(
        self, context: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._before_or_back(instance, "migrated or resized")
        return super().migrate_disk_and_power_off(context, instance, *args, **kwargs)

    def check_can_live_migrate_source(
        self, context: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._standby(instance) is not None:
            raise nova_exception.MigrationPreCheckError(
                reason=f"{instance.uuid} is a standby server: delete it, and there is a new one"
            )
        return super().check_can_live_migrate_source(context, instance, *args, **kwargs)

    def check_can_live_migrate_destination(
        self, context: Any, instance: Any, *args: Any, **kwargs: Any
    ) -> Any:
        note = self.notes.of(instance.uuid)
        if note is not None:
            raise nova_exception.MigrationPreCheckError(
                reason=f"{self._name} has the standby of {instance.uuid}: use 'nova-pmt failover' "
                "to move it there"
            )
        return super().check_can_live_migrate_destination(context, instance, *args, **kwargs)

    def live_migration(
        self,
        context: Any,
        instance: Any,
        dest: Any,
        post_method: Any,
        recover_method: Any,
        block_migration: bool = False,
        migrate_data: Any = None,
    ) -> None:
        try:
            self._before(instance, "migrated")
        except Refused as error:
            # As libvirt's own failures: Nova takes back what it did for it on both hosts. After an
            # exception it would not.
            LOG.error("%s is not migrated: %s", instance.uuid, error)
            private.add_fault(context, instance, error)
            recover_method(context, instance, dest, migrate_data)
            return
        super().live_migration(
            context, instance, dest, post_method, recover_method, block_migration, migrate_data
        )

    def pause(self, instance: Any) -> None:
        """Protection goes on: what stands still is kept as it stands."""
        if self._standby(instance) is not None:
            self._before(instance, "paused")
        super().pause(instance)
        if self.agent.role(instance.uuid) != "primary":
            return
        for _ in range(_PAUSE_ATTEMPTS):
            if self.domains.paused_by_user(instance.uuid):
                return
            time.sleep(_PAUSE_EVERY_S)
            super().pause(instance)
        raise refused(f"Server {instance.uuid} does not stand still: try again.")

    def unpause(self, instance: Any) -> None:
        if self._standby(instance) is not None:
            self._before(instance, "unpaused")
        super().unpause(instance)

    # -- events ----------------------------------------------------------------------------------

    def emit_event(self, event: Any) -> None:
        """Drops what checkpoints cause: each would cost several calls, many times a second."""
        if isinstance(event, virtevent.LifecycleEvent):
            uuid, transition = event.get_instance_uuid(), event.get_transition()
            if transition in _CHECKPOINTS and self.agent.role(uuid) is not None:
                return
            if transition == virtevent.EVENT_LIFECYCLE_STOPPED and self.agent.was_primary(uuid):
                # Managers are asked, and this is the thread of libvirt's events.
                threading.Thread(target=self._stopped, args=(event,), daemon=True).start()
                return
        super().emit_event(event)

    def _stopped(self, event: Any) -> None:
        """A guest that was protected has ended here: by itself, or it goes on elsewhere.

        Of the latter Nova must not hear: it would take the server for stopped, and stop it again
        where it was evacuated to.
        """
        uuid = event.get_instance_uuid()
        deadline = time.monotonic() + DECIDED_S
        verdict, host = self.agent.verdict(uuid)
        while verdict == "open" and time.monotonic() < deadline:
            time.sleep(DECIDING_S)  # its standby may be about to go on; or it was shut down
            verdict, host = self.agent.verdict(uuid)
        if verdict in ("open", "elsewhere"):
            LOG.info("%s has ended here and goes on, or may, on %s", uuid, host)
            return
        super().emit_event(event)

    # -- what managers ask -------------------------------------------------------------------------

    def _finish_evacuations(self) -> None:
        with self._finishing:
            self.finish_evacuations()

    def _replug(self, uuid: str) -> None:
        note: Note | None = self.notes.of(uuid)
        if note is None or note.state != "waiting":
            raise exception.NotProtected(f"{self._name} has no standby of server {uuid}")
        self.standbys.replug(nova_context.get_admin_context(), note)
