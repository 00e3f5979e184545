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

"""Nova is told of a failover: the server runs already, on its standby's host.

===========  ===================================================================================
step         what is done; each can be done twice
===========  ===================================================================================
rebind       Neutron binds its ports to the new host: the server's packets need that most
force_down   Nova takes the old host's compute service for down, or it would not evacuate
free         the standby server gives its room in Placement back, or there would be none
evacuate     Nova rebuilds the server on the new host, where our driver adopts what runs
await        until it is ACTIVE there
delete       the standby server goes; the domain stays
===========  ===================================================================================

Each step is written down before it begins. A manager that dies leaves it to another, which begins
it again. The old host's service is let up when its agent is heard: :class:`Settling`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from oslo_log import log

from nova_pmt import exception, faultpoint
from nova_pmt.manager.db.nova import Note, NovaNotes
from nova_pmt.openstack.clients import Server, Service

LOG = log.getLogger(__name__)

#: An evacuation to where the guest runs already takes seconds; after so long nobody is at it.
EVACUATES_S = 120.0
#: Nova ends an evacuation's task first, and writes the new host some 0.1 s later.
_WRITES_S = 5.0

STEPS = ("rebind", "force_down", "free", "evacuate", "await", "delete")


class Cloud(Protocol):
    """What is used of :class:`nova_pmt.openstack.clients.OpenStack`."""

    def server(self, uuid: str) -> Server | None: ...
    def service(self, host: str) -> Service | None: ...
    def force_down(self, service: str, down: bool) -> None: ...
    def free(self, uuid: str) -> None: ...
    def rebind(self, uuid: str, host: str) -> int: ...
    def evacuate(self, uuid: str, host: str) -> None: ...
    def reset_active(self, uuid: str) -> None: ...
    def delete(self, uuid: str) -> None: ...
    def standbys(self, uuid: str | None = None) -> list[Server]: ...


class Computes(Protocol):
    """What is used of :class:`nova_pmt.openstack.computeapi.ComputeAPI`."""

    def finish_evacuations(self, host: str) -> None: ...


class Failover:
    """Takes one server's failover a step further."""

    def __init__(
        self, cloud: Cloud, notes: NovaNotes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cloud = cloud
        self._notes = notes
        self._clock = clock
        #: By server: what is seen of an evacuation (which attempt, under way or ended), since when.
        self._seen: dict[str, tuple[tuple[int, int, str], float]] = {}
        self._steps: Mapping[str, Callable[[Note], str]] = {
            "rebind": self._rebind,
            "force_down": self._force_down,
            "free": self._free,
            "evacuate": self._evacuate,
            "await": self._await,
            "delete": self._delete,
        }

    def step(self, note: Note) -> str:
        """Do what the note says. After ``rebind`` only if the server runs where it says.

        :returns: the next step; the same one: it has to be waited for; empty: all is done.
        :raises nova_pmt.exception.PmtError: it failed, and is to be done again.
        """
        return self._steps[note.step](note)

    def _rebind(self, note: Note) -> str:
        try:
            self._cloud.rebind(note.uuid, note.target)
        except exception.NovaRefused as error:
            # Evacuation binds them as well, later.
            LOG.warning("%s: its ports stay bound where they were: %s", note.uuid, error)
        faultpoint.reach("nova.rebind")
        return "force_down"

    def _force_down(self, note: Note) -> str:
        server = self._cloud.server(note.uuid)
        if server is None or (server.host == note.target and server.status != "ERROR"):
            return "delete"  # somebody else told Nova
        service = self._cloud.service(note.source)
        if service is not None and not service.forced_down:
            # Whoever forced it down before us will let it up.
            self._notes.force(note.source, service.uuid)
            self._cloud.force_down(service.uuid, True)
        faultpoint.reach("nova.force_down")
        return "free"

    def _free(self, note: Note) -> str:
        # (Not the note's: it does not know of one if the answer got lost when it was made.)
        for standby in self._cloud.standbys(note.uuid):
            self._cloud.free(standby.uuid)
        faultpoint.reach("nova.free")
        return "evacuate"

    def _evacuate(self, note: Note) -> str:
        server = self._cloud.server(note.uuid)
        if server is None:
            return "delete"
        if server.host == note.target:
            return "await"
        if _evacuates(server):
            return "await"  # it was asked for, and the answer got lost
        if server.status not in ("ACTIVE", "ERROR"):
            # Nova evacuates nothing that is paused; and it would power off at once what it takes
            # for stopped, as it does when it saw the domain end before we forced the host down.
            self._cloud.reset_active(note.uuid)
        # (Any task state is fine with Nova: what the old host was at has ended with it.)
        self._cloud.evacuate(note.uuid, note.target)
        faultpoint.reach("nova.evacuate")
        return "await"

    def _await(self, note: Note) -> str:
        server = self._cloud.server(note.uuid)
        if server is None:
            return "delete"
        if _evacuates(server):
            if self._seen_s(note, "under way") < EVACUATES_S:
                return "await"
            # Its compute service, or a conductor, died in the middle: nobody goes on with it.
            self._cloud.reset_active(note.uuid)
            raise exception.NovaRefused(
                f"Nova has been at the evacuation of {note.uuid} for {EVACUATES_S:.0f} s: once more"
            )
        if server.host != note.target:
            if server.status != "ERROR" and self._seen_s(note, "ended") < _WRITES_S:
                return "await"
            # No room, as a rule: Nova puts the record into ERROR, and the server runs all the same.
            raise exception.NovaRefused(
                f"Nova has not taken over that {note.uuid} runs on {note.target}: "
                f"it is {server.status} on {server.host}. {server.fault}".strip()
            )
        self._seen.pop(note.uuid, None)
        if server.status == "ERROR":
            self._cloud.reset_active(note.uuid)  # its compute service was restarted in the middle
        faultpoint.reach("nova.await")
        return "delete"

    def _seen_s(self, note: Note, what: str) -> float:
        """For how long this is seen of this attempt."""
        now, key = self._clock(), (note.generation, note.attempts, what)
        if self._seen.get(note.uuid, (None, now))[0] != key:
            self._seen[note.uuid] = (key, now)
        return now - self._seen[note.uuid][1]

    def _delete(self, note: Note) -> str:
        for standby in self._cloud.standbys(note.uuid):
            self._cloud.delete(standby.uuid)
        faultpoint.reach("nova.delete")
        return ""


def _evacuates(server: Server) -> bool:
    """Nova is at it: ``rebuilding`` and what follows."""
    return server.task_state.startswith("rebuild")


#: Where a step begins again that failed: somebody may have let the old host up meanwhile.
AGAIN = {"evacuate": "force_down", "await": "force_down"}


class Settling:
    """Lets compute services up again that were forced down, when their hosts are back."""

    def __init__(self, cloud: Cloud, computes: Computes, notes: NovaNotes) -> None:
        self._cloud = cloud
        self._computes = computes
        self._notes = notes

    def sweep(self, alive: frozenset[str]) -> None:
        """Try it for each whose agent is heard.

        :raises nova_pmt.exception.DatabaseUnavailable: nothing was done.
        """
        forced = self._notes.forced()
        if not forced:
            return
        under_way = {note.source for note in self._notes.notes() if note.step}
        for host, service in forced.items():
            if host in alive and host not in under_way:
                self._let_up(host, service)

    def _let_up(self, host: str, service: str) -> None:
        try:
            # Nova refuses while servers that were evacuated from there are not cleaned up.
            self._computes.finish_evacuations(host)
        except exception.PmtError as error:
            LOG.info("nova-pmt-compute of %s: %s", host, error)  # a restart of it does the same
        try:
            self._cloud.force_down(service, False)
        except exception.PmtError as error:
            LOG.info("the compute service of %s stays down: %s", host, error)
            return
        faultpoint.reach("nova.settle")
        self._notes.unforce(host)
        again = self._cloud.service(host)
        if again is not None and again.forced_down:
            # By a failover that began between our look and this: it is still ours to let up.
            self._notes.force(host, again.uuid)
        LOG.info("the compute service of %s is up again", host)
