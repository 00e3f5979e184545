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

"""Questions of the scheduler about a server that its request does not answer.

They are one statement each, for the columns alone, and without a session: loading ``Instance`` and
``BuildRequest`` objects takes several times as long as filtering 1,000 hosts. The columns are those
of Nova 32 to 34.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from nova import context as nova_context
from nova import exception, objects
from nova.db.api import api as api_database
from nova.db.api import models as api_models
from nova.db.main import api as main_database
from nova.db.main import models as main_models

# Made once: making one takes as long as running it.
_uuid = sa.bindparam("uuid")
_requests = api_models.BuildRequest.__table__.c
_BUILD_REQUEST = sa.select(_requests.instance).where(_requests.instance_uuid == _uuid)
_servers = main_models.Instance.__table__
_noted = main_models.InstanceSystemMetadata.__table__
_INSTANCE = (
    sa.select(_servers.c.host, _servers.c.node, _noted.c.value)
    .select_from(
        _servers.outerjoin(
            _noted,
            (_noted.c.instance_uuid == _servers.c.uuid)
            & (_noted.c.key == "image_hw_machine_type")
            & (_noted.c.deleted == 0),
        )
    )
    .where((_servers.c.uuid == _uuid) & (_servers.c.deleted == 0))
)
_properties = main_models.InstanceMetadata.__table__.c
_METADATA = sa.select(_properties.key, _properties.value).where(
    (_properties.instance_uuid == _uuid) & (_properties.deleted == 0)
)

_specs = api_models.RequestSpec.__table__.c
_REQUEST_SPEC = sa.select(_specs.spec).where(_specs.instance_uuid == _uuid)
_members = api_models.InstanceGroupMember.__table__
_mine = _members.alias("mine")
_policies = api_models.InstanceGroupPolicy.__table__
_APART_FROM = sa.select(_members.c.instance_uuid).where(
    (_mine.c.instance_uuid == _uuid)
    & (_members.c.group_id == _mine.c.group_id)
    & (_policies.c.group_id == _mine.c.group_id)
    & (_policies.c.policy == "anti-affinity")
    & (_members.c.instance_uuid != _uuid)
)
_HOSTS = sa.select(_servers.c.host).where(
    _servers.c.uuid.in_(sa.bindparam("uuids", expanding=True)) & (_servers.c.deleted == 0)
)

#: Cells by UUID, for the life of the process; as Nova's own cache, whose connections are for ever.
_cells: dict[str, Any] = {}


@dataclass(frozen=True)
class Server:
    """A server that there is.

    :param host: where it runs; empty: nowhere.
    :param machine_type: that its guest has, as Nova noted it; empty: not noted.
    :param cell: where its host is to be asked about.
    """

    host: str = ""
    node: str = ""
    machine_type: str = ""
    cell: Any = None


def new_server_metadata(uuid: str) -> Mapping[str, str] | None:
    """Metadata of a server that is being made; None: it is there already."""
    with api_database.get_engine().connect() as connection:
        row = connection.execute(_BUILD_REQUEST, {"uuid": uuid}).first()
    if row is None:
        return None
    return json.loads(row.instance)["nova_object.data"].get("metadata") or {}


def metadata(uuid: str) -> Mapping[str, str]:
    """Metadata of a server that is there; none: there is no such server."""
    cell = _mapped(uuid)
    if cell is None:
        return {}
    with _connection(cell) as connection:
        found = connection.execute(_METADATA, {"uuid": uuid}).all()
    return {row.key: row.value for row in found}


def server(uuid: str, cell_uuid: str | None = None) -> Server | None:
    """A server, whichever cell it is in; None: there is none.

    :param cell_uuid: of its cell, where it is known already.
    """
    cell = _mapped(uuid) if cell_uuid is None else _cell(cell_uuid)
    if cell is None:
        return None
    with _connection(cell) as connection:
        row = connection.execute(_INSTANCE, {"uuid": uuid}).first()
    if row is None:
        return None
    return Server(row.host or "", row.node or "", row.value or "", cell)


@dataclass(frozen=True)
class Bounds:
    """Where Nova would not have a server: an evacuation there would fail.

    :param zone: the one that its owner asked for; empty: any.
    :param taken: hosts with others of its anti-affinity group.
    """

    zone: str = ""
    taken: frozenset[str] = frozenset()


def bounds(uuid: str, server: Server) -> Bounds:
    """What Nova will hold an evacuation of a server to, as its request is kept."""
    with api_database.get_engine().connect() as connection:
        row = connection.execute(_REQUEST_SPEC, {"uuid": uuid}).first()
        spec = {} if row is None else json.loads(row.spec)["nova_object.data"]
        others: Sequence[str] = ()
        if row is None or spec.get("instance_group"):  # servers join a group when they are made
            others = connection.execute(_APART_FROM, {"uuid": uuid}).scalars().all()
    taken: frozenset[str] = frozenset()
    if others:
        with _connection(server.cell) as connection:
            hosts = connection.execute(_HOSTS, {"uuids": list(others)}).scalars()
            taken = frozenset(host for host in hosts if host)
    return Bounds(spec.get("availability_zone") or "", taken)


def host_stats(server: Server) -> Mapping[str, Any]:
    """What the server's host tells of itself; nothing: there is no such host."""
    with nova_context.target_cell(nova_context.get_admin_context(), server.cell) as context:
        try:
            node = objects.ComputeNode.get_by_host_and_nodename(context, server.host, server.node)
        except exception.ComputeHostNotFound:
            return {}
    return node.stats or {}


@contextlib.contextmanager
def _connection(cell: Any) -> Iterator[Any]:
    context = nova_context.get_admin_context()
    with (
        nova_context.target_cell(context, cell) as targeted,
        main_database.get_engine(context=targeted).connect() as connection,
    ):
        yield connection


def _mapped(uuid: str) -> Any:
    try:
        mapping = objects.InstanceMapping.get_by_instance_uuid(
            nova_context.get_admin_context(), uuid
        )
    except exception.InstanceMappingNotFound:
        return None
    return mapping.cell_mapping


def _cell(uuid: str) -> Any:
    found = _cells.get(uuid)
    if found is None:
        context = nova_context.get_admin_context()
        found = _cells[uuid] = objects.CellMapping.get_by_uuid(context, uuid)
    return found
