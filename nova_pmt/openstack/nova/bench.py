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

"""A cloud that is only in the scheduler's memory and database, for ``nova-pmt-bench filter``."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import oslo_messaging
from nova import config as nova_config
from nova import context as nova_context
from nova import objects
from nova.conf import CONF
from nova.db.api import api as api_api
from nova.db.api import models as api_models
from nova.db.main import api as main_api
from nova.db.main import models as main_models
from nova.scheduler import filters, host_manager
from nova.scheduler.filters import affinity_filter, compute_capabilities_filter

from nova_pmt.openstack import policy
from nova_pmt.openstack.nova.filter import PMTStandbyFilter
from nova_pmt.openstack.nova.stats import HostStats

MEMORY_MIB = 4096
#: One host in so many has no agent, and one in so many another CPU.
_NO_AGENT, _OTHER_CPU = 10, 7


@dataclass(frozen=True)
class Sample:
    """One request, filtered without our filter and with it, one right after the other.

    :param without_ms: how long it took without.
    :param added_ms: how much longer with it.
    :param added_cpu_ms: processor time of that: other load on the machine counts less in it.
    :param passing: hosts that passed ours.
    """

    without_ms: float
    added_ms: float
    added_cpu_ms: float
    passing: int


class Cloud:
    """Hosts as the scheduler holds them; their servers in a database of SQLite, in memory.

    :func:`prepare` comes first.

    :param hosts: how many.
    :param pairs: protected servers, each with a standby; the first hosts have them.
    """

    def __init__(self, hosts: int, pairs: int) -> None:
        self._context = nova_context.get_admin_context()
        self._flavor = _flavor({policy.MODE: "allowed"})
        self._plain = _flavor({})
        cell = objects.CellMapping(
            self._context,
            uuid=str(uuid.uuid4()),
            name="cell1",
            transport_url="none:///",
            database_connection=CONF.database.connection,
        )
        cell.create()
        with nova_context.target_cell(self._context, cell) as context:
            main_models.BASE.metadata.create_all(main_api.get_engine(context=context))
        self.hosts = [_host(number, cell.uuid) for number in range(hosts)]
        self._servers = [self._server(cell, number % hosts) for number in range(pairs)]
        self._requests = [self._being_made() for _ in range(pairs)]
        # As a service that made its filters when it started.
        self._others = [
            compute_capabilities_filter.ComputeCapabilitiesFilter(),
            affinity_filter.ServerGroupAntiAffinityFilter(),
            affinity_filter.ServerGroupAffinityFilter(),
        ]
        self._ours = PMTStandbyFilter("allowed", ())
        self._handler = filters.HostFilterHandler()

    def request(self, kind: str, number: int) -> Any:
        """Whose scheduling is measured.

        :param kind: ``unprotected``, ``protected`` or ``standby``.
        """
        if kind == "unprotected":
            return self._spec(str(uuid.uuid4()), self._plain)
        if kind == "protected":
            return self._spec(self._requests[number % len(self._requests)], self._flavor)
        of = self._servers[number % len(self._servers)]
        return self._spec(str(uuid.uuid4()), self._flavor, {policy.HINT: [of]})

    def measure(self, kind: str, number: int) -> Sample:
        """Filter for one request; which of the two goes first alternates."""
        spec = self.request(kind, number)
        ways = [self._others, [*self._others, self._ours]]
        took, cpu, passing = [0.0, 0.0], [0.0, 0.0], 0
        for index in (0, 1) if number % 2 else (1, 0):
            start, cpu_start = time.perf_counter(), time.thread_time()
            found = self._handler.get_filtered_objects(ways[index], self.hosts, spec)
            cpu[index] = (time.thread_time() - cpu_start) * 1e3
            took[index] = (time.perf_counter() - start) * 1e3
            if index == 1:
                passing = len(found or [])
        return Sample(took[0], took[1] - took[0], cpu[1] - cpu[0], passing)

    def _spec(self, of: str, flavor: Any, hints: dict[str, list[str]] | None = None) -> Any:
        return objects.RequestSpec(
            self._context,
            instance_uuid=of,
            flavor=flavor,
            image=objects.ImageMeta(properties=objects.ImageMetaProps()),
            scheduler_hints=hints or {},
            requested_destination=None,
            force_hosts=None,
            force_nodes=None,
            instance_group=None,
            user_id="user",
            project_id="project",
        )

    def _instance(self, **more: Any) -> Any:
        return objects.Instance(
            self._context,
            uuid=str(uuid.uuid4()),
            project_id="project",
            user_id="user",
            metadata={policy.PROPERTY: "pmt", "role": "database"},
            flavor=self._flavor,
            old_flavor=None,
            new_flavor=None,
            system_metadata={"image_hw_machine_type": "q35", "image_base_image_ref": "image"},
            security_groups=objects.SecurityGroupList(objects=[]),
            numa_topology=None,
            pci_requests=None,
            vcpu_model=None,
            **more,
        )

    def _server(self, cell: Any, host: int) -> str:
        state = self.hosts[host]
        instance = self._instance(host=state.host, node=state.nodename, compute_id=host + 1)
        state.instances[instance.uuid] = instance
        objects.InstanceMapping(
            self._context,
            instance_uuid=instance.uuid,
            project_id="project",
            cell_mapping=cell,
            queued_for_delete=False,
        ).create()
        with nova_context.target_cell(self._context, cell) as context:
            instance._context = context
            instance.create()
        self._spec(instance.uuid, self._flavor).create()
        return str(instance.uuid)

    def _being_made(self) -> str:
        instance = self._instance()
        objects.BuildRequest(
            self._context,
            instance=instance,
            instance_uuid=instance.uuid,
            project_id="project",
            block_device_mappings=objects.BlockDeviceMappingList(),
            tags=objects.TagList(),
        ).create()
        return str(instance.uuid)


def prepare() -> None:
    """Nova's options, and new databases in this process's memory."""
    nova_config.parse_args(
        ["nova-pmt-bench"], default_config_files=[], configure_db=False, init_rpc=False
    )
    # Cells ask for options of the message bus.
    oslo_messaging.get_rpc_transport(CONF, url="fake://")
    objects.register_all()
    for group in ("database", "api_database"):
        CONF.set_override("connection", "sqlite://", group)
    main_api.configure(CONF)
    api_api.configure(CONF)
    api_models.BASE.metadata.create_all(api_api.get_engine())


def _flavor(extra_specs: dict[str, str]) -> Any:
    return objects.Flavor(
        id=1,
        flavorid="1",
        name="m1.medium",
        memory_mb=MEMORY_MIB,
        vcpus=2,
        root_gb=40,
        ephemeral_gb=0,
        swap=0,
        rxtx_factor=1.0,
        vcpu_weight=None,
        disabled=False,
        is_public=True,
        description=None,
        extra_specs=extra_specs,
        projects=[],
        created_at=None,
        updated_at=None,
        deleted_at=None,
        deleted=False,
    )


def _host(number: int, cell: str) -> Any:
    name = f"compute-{number:04d}"
    state = host_manager.HostState(name, name, cell)
    state.stats = HostStats(
        agent=number % _NO_AGENT != 1,
        release="1.0.0",
        cpu_model="EPYC-Milan" if number % _OTHER_CPU == 2 else "Icelake-Server",
        machine_types=frozenset({"pc", "q35", "pc-i440fx-7.2", "pc-q35-7.2", "microvm"}),
        backing_free_mib=64 * 1024 + number * 7919 % 4096 * 64,  # as the agents tell: no two alike
        standbys=number % 5,
        replication_mbit=25_000,
    ).write()
    return state
