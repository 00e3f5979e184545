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

"""Nova, Placement and Neutron, as the managers use them: all that is asked of them is here.

python-novaclient is frozen at microversion 2.96. We use :data:`MICROVERSION`: from 2.95 on Nova
stops every server that it evacuates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nova_pmt import exception
from nova_pmt.openstack import policy

MICROVERSION = "2.94"
#: Of one question, in seconds: much shorter than a manager's turn.
TIMEOUT_S = 10
STANDBY_NAME = "pmt-standby-"
_PAGE = 500
_MAX_TEXT = 500


@dataclass(frozen=True)
class Server:
    """A server of Nova.

    :param host: where it runs; empty: nowhere.
    :param status: ``ACTIVE``, ``SHUTOFF``, ``ERROR`` ...
    :param task_state: what Nova does with it now; empty: nothing.
    :param flavor: the flavor's name when the server was made.
    :param image: UUID; empty: it was made from a volume.
    """

    uuid: str
    name: str = ""
    project_id: str = ""
    user_id: str = ""
    host: str = ""
    status: str = "ACTIVE"
    task_state: str = ""
    fault: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra_specs: Mapping[str, str] = field(default_factory=dict)
    flavor: str = ""
    image: str = ""
    zone: str = ""

    @property
    def settled(self) -> bool:
        """It runs, and Nova does nothing with it."""
        return self.status == "ACTIVE" and not self.task_state


@dataclass(frozen=True)
class Service:
    """A compute service."""

    uuid: str
    up: bool
    forced_down: bool


class OpenStack:
    """One session for all; used by any number of threads.

    Every method raises :class:`nova_pmt.exception.NovaUnavailable` when a service does not answer
    or fails, and :class:`nova_pmt.exception.NovaRefused` when it does not want to.

    :param session: keystoneauth's, logged in with the roles admin and service.
    """

    def __init__(
        self,
        session: Any,
        *,
        region_name: str = "",
        endpoint_type: str = "internal",
        quota_owner: str = "service",
        session_of: Callable[[str], Any] | None = None,
    ) -> None:
        from keystoneauth1 import adapter
        from novaclient import client

        named = {"region_name": region_name or None}
        self._nova = client.Client(
            MICROVERSION, session=session, endpoint_type=endpoint_type, timeout=TIMEOUT_S, **named
        )
        self._client_of = lambda one: client.Client(
            MICROVERSION, session=one, endpoint_type=endpoint_type, timeout=TIMEOUT_S, **named
        )
        self._placement = adapter.Adapter(
            session, service_type="placement", interface=endpoint_type, **named
        )
        self._network = adapter.Adapter(
            session, service_type="network", interface=endpoint_type, **named
        )
        self._session = session
        self._quota_owner = quota_owner
        self._session_of = session_of

    @classmethod
    def connect(cls, conf: Any) -> OpenStack:
        """Log in as group ``[nova]`` says; nothing is asked yet.

        :raises nova_pmt.exception.ConfigError: the credentials are not all there.
        """
        from keystoneauth1 import exceptions, loading

        group = "nova"
        try:
            auth = loading.load_auth_from_conf_options(conf, group)
            if auth is None:
                raise exception.ConfigError(
                    "[nova] auth_type is not set",
                    cure="Set auth_type = password, auth_url, username, password, project_name, "
                    "user_domain_name and project_domain_name in group [nova].",
                )
            session = loading.load_session_from_conf_options(
                conf, group, auth=auth, timeout=TIMEOUT_S
            )
        except exceptions.ClientException as error:
            raise exception.ConfigError(
                f"group [nova]: {_text(error)}",
                cure="Correct the credentials in group [nova] of nova-pmt.conf.",
            ) from error

        def session_of(project_id: str) -> Any:
            scoped = loading.load_auth_from_conf_options(
                conf, group, project_id=project_id, project_name=None
            )
            return loading.load_session_from_conf_options(
                conf, group, auth=scoped, timeout=TIMEOUT_S
            )

        return cls(
            session,
            region_name=conf.nova.region_name,
            endpoint_type=conf.nova.endpoint_type,
            quota_owner=conf.nova.quota_owner,
            session_of=session_of,
        )

    # -- servers --------------------------------------------------------------------------

    def user_id(self) -> str:
        """Whose servers may be standbys: our own."""
        with _asked("Keystone"):
            return str(self._session.get_user_id())

    def servers(self) -> list[Server]:
        """All servers of all projects."""
        return self._list({})

    def standbys(self, uuid: str | None = None) -> list[Server]:
        """Our standby servers, or those of one server: as a rule one."""
        name = STANDBY_NAME + (uuid or "")
        ours = self.user_id()  # anybody may call a server so, and write that it protects another
        return [
            server
            for server in self._list({"name": f"^{name}"})
            if server.user_id == ours
            and policy.STANDBY in server.metadata
            and uuid in (None, server.metadata[policy.STANDBY])
        ]

    def server(self, uuid: str) -> Server | None:
        """One server; None: there is none."""
        with _asked("Nova"):
            try:
                return _server(self._nova.servers.get(uuid))
            except _not_found():
                return None

    def _list(self, options: Mapping[str, Any]) -> list[Server]:
        found: list[Server] = []
        marker = None
        while True:
            with _asked("Nova"):
                page = self._nova.servers.list(
                    search_opts={"all_tenants": 1, **options}, marker=marker, limit=_PAGE
                )
            if not page:
                return found
            found += [_server(one) for one in page]
            marker = page[-1].id

    def create_standby(self, server: Server) -> str:
        """Ask for a standby server; its UUID. Nova chooses the host, and may not find one."""
        nova = self._nova
        if self._quota_owner == "owner" and self._session_of is not None:
            nova = self._client_of(self._session_of(server.project_id))
        with _asked("Nova"):
            flavors = [
                one for one in self._nova.flavors.list(is_public=None) if one.name == server.flavor
            ]
            if not flavors:
                raise exception.NovaRefused(
                    f"there is no flavor {server.flavor!r} any more, as server {server.uuid} has",
                    cure="Make a flavor of that name and size, or resize the server to one that "
                    "there is.",
                )
            made = nova.servers.create(
                STANDBY_NAME + server.uuid,
                server.image,
                flavors[0],
                meta={policy.STANDBY: server.uuid},
                scheduler_hints={policy.HINT: server.uuid},
                nics="none",
                availability_zone=server.zone or None,
            )
            return str(made.id)

    def delete(self, uuid: str) -> None:
        """Delete a server at once, also where Nova keeps deleted ones for a while
        (``reclaim_instance_interval``); nothing happens when there is none."""
        with _asked("Nova"):
            try:
                self._nova.servers.force_delete(uuid)
            except _not_found():
                pass

    def evacuate(self, uuid: str, host: str) -> None:
        """Have Nova rebuild a server on a host: there our driver adopts what runs."""
        with _asked("Nova"):
            self._nova.servers.evacuate(uuid, host=host)

    def reset_active(self, uuid: str) -> None:
        """Nova evacuates no server that its owner had paused."""
        with _asked("Nova"):
            self._nova.servers.reset_state(uuid, "active")

    # -- compute services -----------------------------------------------------------------

    def service(self, host: str) -> Service | None:
        """A host's compute service; None: it has none."""
        with _asked("Nova"):
            for one in self._nova.services.list(host=host, binary="nova-compute"):
                return Service(str(one.id), one.state == "up", bool(one.forced_down))
        return None

    def force_down(self, service: str, down: bool) -> None:
        """Have Nova take a compute service for down, or not any more.

        :raises nova_pmt.exception.NovaRefused: servers that were evacuated from there are not
            cleaned up yet.
        """
        with _asked("Nova"):
            self._nova.services.force_down(service, down)

    # -- Placement and Neutron ------------------------------------------------------------

    def free(self, uuid: str) -> None:
        """Give back what a server has in Placement."""
        with _asked("Placement"):
            try:
                self._placement.delete(f"/allocations/{uuid}")
            except _not_found():
                pass

    def rebind(self, uuid: str, host: str) -> int:
        """Bind a server's ports to a host; how many were bound elsewhere.

        With a second binding, which is then made the active one, where Neutron has that: the port
        stays ACTIVE all the time. A port that is just given another host is to become ACTIVE anew.
        But it is plugged there already, so OVN says that it is up while Neutron still binds it;
        Neutron then waits for itself, gives up, and shows it as DOWN for ever.
        """
        moved = 0
        with _asked("Neutron"):
            path = f"/v2.0/ports?device_id={uuid}"
            for port in self._network.get(path).json()["ports"]:
                if port.get("binding:host_id") == host:
                    continue
                if not self._activate(port, host):
                    self._network.put(
                        f"/v2.0/ports/{port['id']}", json={"port": {"binding:host_id": host}}
                    )
                moved += 1
        return moved

    def _activate(self, port: Mapping[str, Any], host: str) -> bool:
        """Make a binding to ``host`` the active one; False: Neutron has one for each port only."""
        from keystoneauth1 import exceptions

        path = f"/v2.0/ports/{port['id']}/bindings"
        wanted = {
            "host": host,
            "vnic_type": port.get("binding:vnic_type") or "normal",
            "profile": port.get("binding:profile") or {},
        }
        try:
            self._network.post(path, json={"binding": wanted})
        except exceptions.Conflict:
            pass  # it is there
        except (exceptions.NotFound, exceptions.Forbidden):
            return False
        self._network.put(f"{path}/{host}/activate")
        old = port.get("binding:host_id")
        if old:
            try:
                self._network.delete(f"{path}/{old}")
            except exceptions.NotFound:
                pass
        return True


def _not_found() -> tuple[type[Exception], ...]:
    from keystoneauth1 import exceptions
    from novaclient import exceptions as nova_exceptions

    return exceptions.NotFound, nova_exceptions.NotFound


@contextmanager
def _asked(what: str) -> Iterator[None]:
    """Errors of the clients', as ours."""
    from keystoneauth1 import exceptions
    from novaclient import exceptions as nova_exceptions

    try:
        yield
    except (exceptions.HttpError, nova_exceptions.ClientException) as error:
        code = getattr(error, "http_status", None) or getattr(error, "code", 0)
        text = f"{what}: {_text(error)}"
        if isinstance(code, int) and 400 <= code < 500 and code not in (401, 408, 429):
            raise exception.NovaRefused(text, status=code) from error
        raise exception.NovaUnavailable(text) from error
    except (exceptions.ClientException, OSError) as error:
        raise exception.NovaUnavailable(f"{what}: {_text(error)}") from error


def _text(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:_MAX_TEXT]


def _server(one: Any) -> Server:
    """From novaclient's."""
    flavor = one.flavor or {}
    fault = getattr(one, "fault", None) or {}
    image = one.image if isinstance(one.image, dict) else {}
    return Server(
        uuid=str(one.id),
        name=str(one.name),
        project_id=str(one.tenant_id),
        user_id=str(one.user_id),
        host=str(getattr(one, "OS-EXT-SRV-ATTR:host", None) or ""),
        status=str(one.status),
        task_state=str(getattr(one, "OS-EXT-STS:task_state", None) or ""),
        fault=str(fault.get("message", ""))[:_MAX_TEXT],
        metadata=dict(one.metadata or {}),
        extra_specs=dict(flavor.get("extra_specs") or {}),
        flavor=str(flavor.get("original_name", "")),
        image=str(image.get("id", "")),
    )
