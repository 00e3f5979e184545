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

"""Where a protected server, and its standby, may go.

``nova.conf`` of the scheduler::

    [filter_scheduler]
    available_filters = nova.scheduler.filters.all_filters
    available_filters = nova_pmt.openstack.nova.filter.PMTStandbyFilter
    enabled_filters = ...,PMTStandbyFilter
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import nova.conf
from nova.scheduler import filters
from nova.scheduler import utils as _utils
from oslo_log import log

from nova_pmt.openstack import policy, settings
from nova_pmt.openstack.nova import lookup
from nova_pmt.openstack.nova.stats import (
    AGENT,
    BACKING_FREE_MIB,
    CPU_MODEL,
    MACHINE_TYPES,
    UP,
)

LOG = log.getLogger(__name__)

#: QEMU's own, beside the memory of the guest; as the agent of a standby's host counts.
OVERHEAD_MIB = 192

#: Of reasons that nobody reads, and not looked for.
_NO_ROOM, _NOT_YET = "it cannot have it", "?"
_NO_AGENT = "it has no nova-pmt-agent that is alive"

Reason = str
Stats = Mapping[str, Any]
_Kind = tuple[Any, Any]


def capable(stats: Stats, needed_mib: int) -> Reason:
    """Why a host cannot hold a standby that needs so much; empty: it can."""
    if stats.get(AGENT) != UP:
        return _NO_AGENT
    free_mib = _room_mib(stats)
    if free_mib < needed_mib:
        return f"its memory_backing_dir has {free_mib} MiB free, a standby needs {needed_mib} MiB"
    return ""


def _room_mib(stats: Stats) -> int:
    try:
        return int(stats.get(BACKING_FREE_MIB) or 0)
    except ValueError:
        return 0


def _told(stats: Stats) -> tuple[int, _Kind]:
    """Room for standbys (-1: no agent could make one), and which kind of host it is."""
    room_mib = _room_mib(stats) if stats.get(AGENT) == UP else -1
    return room_mib, (stats.get(CPU_MODEL), stats.get(MACHINE_TYPES))


def compatible(stats: Stats, cpu_model: str, machine_type: str) -> Reason:
    """Why a guest cannot go on on a host; empty: it can. What nobody told of is no reason.

    :param cpu_model: of the host where it runs.
    :param machine_type: of the guest.
    """
    if cpu_model and stats.get(CPU_MODEL, cpu_model) not in ("", cpu_model):
        return f"its CPU is {stats[CPU_MODEL]}, the server runs on {cpu_model}"
    if machine_type:
        types = stats.get(MACHINE_TYPES)
        if types and machine_type not in types.split(","):
            return f"its QEMU has no machine type {machine_type}"
    return ""


def _out_of_bounds(host: Any, bounds: lookup.Bounds) -> Reason:
    """Why Nova would not evacuate the server to a host, after its standby has gone on there."""
    if host.host in bounds.taken:
        return "another server of the server's anti-affinity group runs there"
    if bounds.zone:
        zones = {one.metadata.get("availability_zone") for one in host.aggregates or ()} - {None}
        if bounds.zone not in (zones or {nova.conf.CONF.default_availability_zone}):
            return (
                f"it is not in availability zone {bounds.zone}, which the server was asked for in"
            )
    return ""


class PMTStandbyFilter(filters.BaseHostFilter):
    """See the module's text. Servers that ask for nothing pass as if it were not there.

    :param honour: ``[nova] honour_property``; None: as nova-pmt.conf says.
    :param users: ``[nova] standby_user_id``; None: as nova-pmt.conf says.
    """

    RUN_ON_REBUILD = False

    def __init__(self, honour: str | None = None, users: Collection[str] | None = None) -> None:
        super().__init__()
        if honour is None or users is None:
            group = settings.load().nova
            honour = group.honour_property if honour is None else honour
            users = group.standby_user_id if users is None else users
        self._honour = honour
        self._users = frozenset(users)
        #: What hosts told, by name: the scheduler has the same dictionary until they tell anew.
        self._seen: dict[str, tuple[Any, int, _Kind]] = {}

    def filter_all(self, filter_obj_list: Iterable[Any], spec_obj: Any) -> Iterable[Any]:
        """See Nova."""
        standby_of = spec_obj.get_scheduler_hint(policy.HINT)
        specs = spec_obj.flavor.extra_specs or {}
        if not standby_of and not policy.wish(specs, _ASKS, self._honour).wanted:
            return filter_obj_list  # whatever its owner wrote
        if _utils.request_is_rebuild(spec_obj):
            return filter_obj_list
        if standby_of:
            return self._standby(list(filter_obj_list), spec_obj, str(standby_of))
        return self._protected(list(filter_obj_list), spec_obj, specs)

    # -- a standby ------------------------------------------------------------------------

    def _standby(self, hosts: list[Any], spec: Any, uuid: str) -> list[Any]:
        user = spec.user_id if "user_id" in spec else None
        if self._users and user not in self._users:
            # Else everybody could learn where somebody's server is not.
            LOG.info(
                "the hint %s is of the managers' user alone ([nova] standby_user_id in "
                "nova-pmt.conf), not of user %s: no host passes",
                *(policy.HINT, user),
            )
            return []
        # The scheduler's own notes of who is where may be minutes old: good for the cell only.
        cell = next((host.cell_uuid for host in hosts if uuid in (host.instances or ())), None)
        server = lookup.server(uuid, cell)
        if server is None or not server.host:
            LOG.info("standby of %s: no host passes: the server has no host now", uuid)
            return []
        own = next((host.stats for host in hosts if host.host == server.host), None)
        cpu_model = (lookup.host_stats(server) if own is None else own).get(CPU_MODEL) or ""
        needed_mib = spec.flavor.memory_mb + OVERHEAD_MIB
        bounds = lookup.bounds(uuid, server)
        bound = bool(bounds.zone or bounds.taken)
        own_host, own_cell = server.host, getattr(server.cell, "uuid", None)
        told = _Rejections(f"standby of {uuid}")
        seen, kinds = self._seen, dict[_Kind, Reason]()
        passing = []
        # With a thousand hosts each look into a dictionary counts.
        for host in hosts:
            name = host.host
            found = seen.get(name)
            if found is None or found[0] is not host.stats:
                found = seen[name] = (host.stats, *_told(host.stats or _NOTHING))
            _, room_mib, kind = found
            if room_mib < needed_mib:
                why = capable(host.stats or _NOTHING, needed_mib) if told.heard else _NO_ROOM
            else:
                why = kinds.get(kind, _NOT_YET)
                if why is _NOT_YET:
                    why = compatible(host.stats or _NOTHING, cpu_model, server.machine_type)
                    kinds[kind] = why
            if name == own_host:
                why = "the server itself runs there"
            elif own_cell is not None and host.cell_uuid not in (None, own_cell):
                why = "it is in another cell than the server"
            elif bound:
                why = _out_of_bounds(host, bounds) or why
            if not why:
                passing.append(host)
            elif told.heard:
                told.add(host, why)
        return passing

    # -- a server that may be protected ---------------------------------------------------

    def _protected(self, hosts: list[Any], spec: Any, specs: Mapping[str, str]) -> list[Any]:
        uuid = spec.instance_uuid
        named = _host_is_named(spec)
        metadata = lookup.new_server_metadata(uuid)
        new = metadata is not None
        if metadata is None:
            if named:
                return hosts  # an evacuation to its standby, or an administrator's word
            metadata = lookup.metadata(uuid)
        # Anybody can write the mark of a standby; what is one comes with the hint.
        asked = {name: value for name, value in metadata.items() if name != policy.STANDBY}
        if not policy.wish(specs, asked, self._honour).wanted:
            return hosts
        told = _Rejections(f"protected server {uuid}")
        needed_mib = spec.flavor.memory_mb + OVERHEAD_MIB
        partners = _Partners(needed_mib, _machine_type(spec))
        alive = []
        for host in hosts:
            stats = host.stats or _NOTHING
            if stats.get(AGENT) == UP:
                alive.append(host)
                partners.add(host, stats)
            else:
                told.add(host, _NO_AGENT)
        if not new or named:
            return alive  # its standby is there already; or the others are not to be seen
        passing = []
        for host in alive:
            if partners.has(host):
                passing.append(host)
            else:
                told.add(host, f"no other host could hold its standby ({needed_mib} MiB)")
        if not passing:
            LOG.info(
                "protected server %s: no host passes: of %d candidates %d have a live agent, and "
                "no two of them are such that one can have the server and the other a standby "
                "(%d MiB, the same CPU model, the machine type)",
                *(uuid, len(hosts), len(alive), needed_mib),
            )
        return passing


#: Whoever would be protected if they asked.
_ASKS = {policy.PROPERTY: policy.ACTIVE_MODES[0]}
_NOTHING: Stats = {}


class _Partners:
    """Hosts that could hold the standby of a server that is not there yet."""

    def __init__(self, needed_mib: int, machine_type: str) -> None:
        self._needed_mib = needed_mib
        self._machine_type = machine_type
        # By CPU model, "" where it is not known. Two are enough: one of them is another host.
        self._names: dict[str, set[str]] = {"": set()}
        self._of: dict[str, set[str]] = {}

    def add(self, host: Any, stats: Stats) -> None:
        """A host that might."""
        model = stats.get(CPU_MODEL) or ""
        names = self._names.get(model)
        if names is None:
            names = self._names[model] = set()
        if len(names) < 2 and not (
            capable(stats, self._needed_mib) or compatible(stats, "", self._machine_type)
        ):
            names.add(host.host)

    def has(self, host: Any) -> bool:
        """Another host could hold the standby of a server on this one."""
        model = host.stats.get(CPU_MODEL) or ""
        names = self._of.get(model)
        if names is None:
            of_it = self._names.values() if not model else (self._names[model], self._names[""])
            names = self._of[model] = set().union(*of_it)
        return len(names) > 1 or (len(names) == 1 and host.host not in names)


class _Rejections:
    """Tells of each in a line, where somebody reads them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.heard = LOG.isEnabledFor(logging.DEBUG)

    def add(self, host: Any, why: Reason) -> None:
        if self.heard:
            LOG.debug("%s: not %s: %s", self._what, host.host, why)


def _host_is_named(spec: Any) -> bool:
    destination = spec.requested_destination if "requested_destination" in spec else None
    named = destination is not None and "host" in destination and destination.host
    return bool(named or spec.force_hosts or spec.force_nodes)


def _machine_type(spec: Any) -> str:
    """That the image asks for; empty: that of its host."""
    if "image" not in spec or spec.image is None or "properties" not in spec.image:
        return ""
    return str(spec.image.properties.get("hw_machine_type") or "")
