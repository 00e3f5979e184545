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


"""Standby servers on this host: Nova's reservation for a waiting domain that is the agent's.

A standby server has no domain of its own. What is made for it is what the agent's domain needs and
only Nova can make: the directory of the protected server, kernel and ramdisk, and its interfaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from nova import exception as nova_exception
from nova import objects
from nova.compute import task_states
from nova.network import model as network_model
from oslo_log import log

from nova_pmt import exception
from nova_pmt.guest import checks
from nova_pmt.openstack import policy
from nova_pmt.openstack.nova import private
from nova_pmt.openstack.nova.domains import Domains
from nova_pmt.openstack.nova.localagent import LocalAgent
from nova_pmt.openstack.nova.standbys import Note, Notes

LOG = log.getLogger(__name__)

_MOVING = frozenset(
    {
        task_states.RESIZE_PREP,
        task_states.RESIZE_MIGRATING,
        task_states.RESIZE_MIGRATED,
        task_states.RESIZE_FINISH,
        task_states.MIGRATING,
    }
)


class Refused(nova_exception.Invalid):
    """Our own; users and operators see its text in the server's fault."""


def refused(message: str) -> Refused:
    """An error of that text."""
    return Refused(message)


def _plain(vifs: Iterable[Any]) -> list[dict[str, Any]]:
    """Nova's VIFs as JSON has them."""
    plain: list[dict[str, Any]] = json.loads(network_model.NetworkInfo(vifs).json())
    return plain


class StandbyServers:
    """Makes and ends them.

    :param users: ids of the users whose servers may be standbys.
    """

    def __init__(
        self,
        host: str,
        libvirt: private.Seams,
        notes: Notes,
        domains: Domains,
        agent: LocalAgent,
        users: frozenset[str],
    ) -> None:
        self._host = host
        self._libvirt = libvirt
        self._notes = notes
        self._domains = domains
        self._agent = agent
        self._users = users

    def protected_of(self, instance: Any) -> str | None:
        """UUID of the server that it stands by for; None: it is an ordinary one.

        Anybody can write the mark to a server of theirs; it counts for those of the managers only.
        """
        if instance.user_id not in self._users:
            return None
        uuid = instance.metadata.get(policy.STANDBY)
        return str(uuid) if uuid else None

    def spawn(self, context: Any, instance: Any, uuid: str) -> None:
        """Make what the waiting domain needs. If it fails, what was made is undone in reverse.

        :param uuid: of the server that it stands by for.
        :raises nova.exception.Invalid: this host cannot hold it.
        """
        protected = self._instance(context, uuid)
        if protected is None:
            raise refused(f"there is no server {uuid} to stand by for")
        self.end_deleted(context)
        self._check(instance, protected)
        path = private.instance_directory(uuid)
        kind = checks.SHARED_FILE_SYSTEMS.get(checks.file_system(os.path.dirname(path)))
        if kind:
            raise refused(f"{os.path.dirname(path)} is on {kind}: servers there are not protected")
        network_info = self._network_info(context, protected)
        # (A directory that is there is what an evacuation left: the server is on another host, and
        # the file system is this host's own.)
        note = Note(
            standby=instance.uuid,
            protected=uuid,
            protected_id=protected.id,
            project_id=str(protected.project_id or ""),
            directory=True,
            vifs=_plain(network_info),
        )
        with contextlib.ExitStack() as undo:
            self._notes.write(note)
            undo.callback(self._notes.remove, note)
            if not os.path.isdir(path):
                os.makedirs(path)
                undo.callback(shutil.rmtree, path, ignore_errors=True)
            self._libvirt.fetch_boot_files(context, protected)
            for vif in network_info:
                undo.callback(self._unplug, protected, vif)
                self._libvirt.vif_driver.plug(protected, vif)
            undo.pop_all()
        LOG.info("Server %s stands by for %s", instance.uuid, uuid)

    def _check(self, instance: Any, protected: Any) -> None:
        uuid = protected.uuid
        if protected.host == self._host:
            raise refused(f"server {uuid} is on {self._host} itself: its standby cannot be")
        other = self._notes.of(uuid)
        if other is not None and other.state != "left":
            raise refused(f"{self._host} has a standby of {uuid} already: server {other.standby}")
        if self._domains.look(uuid) == "running":
            raise refused(f"a domain {uuid} runs on {self._host} already")
        if other is not None:
            self._notes.remove(other)  # what it told of is over

    def end(self, context: Any, note: Note) -> None:
        """The standby server is deleted. A domain that runs here is never touched.

        :raises nova.exception.Invalid: its domain waits and the agent does not end it; nothing was
            taken away.
        """
        if note.state == "adopted":
            self._notes.remove(note)
            return
        situation = self._domains.look(note.protected)
        if situation == "waiting" or (situation != "running" and self._agent.presence()):
            self._end_domain(note)
            situation = self._domains.look(note.protected)
        if situation == "running":
            protected = self._instance(context, note.protected)
            if protected is not None and protected.host == self._host:
                self._notes.remove(note)  # it was moved here, and Nova knows
                return
            LOG.warning(
                "%s runs here, and Nova does not know yet; it is left alone", note.protected
            )
            self._notes.become(note, "left")
            return
        if not self._may_come(context, note):
            for vif in reversed(network_model.NetworkInfo.hydrate(note.vifs)):
                self._unplug(self._stand_in(context, note), vif)
            if note.directory:
                shutil.rmtree(private.instance_directory(note.protected), ignore_errors=True)
        self._notes.remove(note)

    def end_deleted(self, context: Any) -> None:
        """End standby servers that Nova deleted without telling us: this host was down."""
        for note in self._notes:
            if note.state == "left" or self._instance(context, note.standby) is not None:
                continue
            try:
                self.end(context, note)
            except Refused as error:
                LOG.warning("%s is deleted, and still stands by: %s", note.standby, error)

    def _end_domain(self, note: Note) -> None:
        try:
            gone = self._agent.end_standby(note.protected)
        except exception.PmtError as error:
            if self._domains.look(note.protected) == "waiting":
                raise refused(f"the domain that waits for {note.protected}: {error}") from error
            return
        if not gone and self._domains.look(note.protected) == "waiting":
            raise refused(f"the domain that waits for {note.protected} does not end")

    def _may_come(self, context: Any, note: Note) -> bool:
        """Whether the server is on this host now, or on its way to another and perhaps to here."""
        protected = self._instance(context, note.protected)
        if protected is None:
            return False
        return protected.host == self._host or protected.task_state in _MOVING

    def replug(self, context: Any, note: Note) -> None:
        """Plug the interfaces that the protected server has now, and unplug those that it had."""
        protected = self._instance(context, note.protected)
        if protected is None:
            return
        now = self._network_info(context, protected)
        ids = {vif["id"] for vif in now}
        old = [vif for vif in network_model.NetworkInfo.hydrate(note.vifs) if vif["id"] not in ids]
        self._notes.write(replace(note, vifs=_plain([*now, *old])))
        for vif in now:
            self._libvirt.vif_driver.plug(protected, vif)
        for vif in old:
            self._unplug(protected, vif)
        self._notes.write(replace(note, vifs=_plain(now)))

    def _network_info(self, context: Any, protected: Any) -> Any:
        # What Nova remembers may be empty for a while (seen with 32); then Neutron is asked.
        return protected.get_network_info() or self._libvirt.network_info(context, protected)

    def _unplug(self, instance: Any, vif: Any) -> None:
        try:
            self._libvirt.vif_driver.unplug(instance, vif)
        except nova_exception.NovaException as error:
            LOG.warning("%s: VIF %s is not unplugged: %s", instance.uuid, vif.get("id"), error)

    def _instance(self, context: Any, uuid: str) -> Any | None:
        try:
            return objects.Instance.get_by_uuid(
                context.elevated(),
                uuid,
                expected_attrs=["info_cache", "flavor", "metadata", "system_metadata"],
            )
        except nova_exception.InstanceNotFound:
            return None

    def _stand_in(self, context: Any, note: Note) -> Any:
        """As much of the protected server as unplugging asks for; it may be deleted by now."""
        return objects.Instance(
            context, uuid=note.protected, id=note.protected_id, project_id=note.project_id
        )
