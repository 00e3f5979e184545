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

"""What is reached over the network: message bus, database, managers and agents, Nova."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from nova_pmt import exception, rpc
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.engine import Engine
from nova_pmt.status.finding import Finding, bad, doubt, failed, good

#: For one answer, in seconds.
TIMEOUT_S = 10.0
ROLES = frozenset({"admin", "service"})
TRAIT = "CUSTOM_PMT"
#: From 2.95 on Nova stops every server that it evacuates.
_MICROVERSION = (2, 94)


class Managers(Protocol):
    """What is used of :class:`nova_pmt.manager.rpcapi.ManagerAPI`."""

    def hosts(self) -> list[dict[str, Any]]: ...


class _Echo:
    @rpc.enveloped
    def echo(self, text: str) -> str:
        return text


def message_bus(transport: Any, timeout_s: float = TIMEOUT_S) -> Iterator[Finding]:
    """A message of our own comes back."""
    name = f"status-{uuid.uuid4()}"
    outcome: list[Finding] = []

    def try_it() -> None:
        server = rpc.server(transport, "nova-pmt-status", name, _Echo())
        server.start()
        try:
            caller = rpc.Caller(transport, "nova-pmt-status", "the message bus")
            caller.call(name, "echo", timeout_s, {"text": name})
            outcome.append(good("a message came back"))
        except exception.PmtError as error:
            outcome.append(failed(error))
        finally:
            server.stop()

    # In a thread: without a message bus a server waits for one, for ever.
    thread = threading.Thread(target=try_it, name="status-bus", daemon=True)
    thread.start()
    thread.join(2 * timeout_s)
    if outcome:
        yield outcome[0]
    else:
        yield bad(
            "no message came back: check [DEFAULT] transport_url (host, port, user, password, "
            "virtual host), and that the broker runs."
        )


def database(conf: Any) -> Iterator[Finding]:
    """It can be reached, and its tables are those of this release."""
    if not conf.database.connection:
        yield good("[database] connection is not set: no managers run here")
        return
    # It is to be found out now, not in some minutes.
    conf.set_override("max_retries", 1, "database")
    conf.set_override("retry_interval", 1, "database")
    try:
        engine = Engine(conf)
        try:
            engine.ask(migration.check)
        finally:
            engine.close()
        yield good(f"revision {migration.head()}")
    except exception.PmtError as error:
        yield failed(error)
    except Exception as error:  # noqa: BLE001 - a URL that SQLAlchemy cannot use, a missing driver
        yield bad(f"[database] connection cannot be used: {type(error).__name__}")


def agents(conf: Any, managers: Managers, here: str | None) -> Iterator[Finding]:
    """Managers answer, and hear the agents.

    :param here: name of this host, if it is a compute host.
    """
    if not conf.manager.enabled:
        yield good("this deployment has no managers ([manager] enabled)")
        return
    try:
        hosts = managers.hosts()
    except exception.PmtError as error:
        yield failed(error)
        return
    alive = sorted(host["host"] for host in hosts if host["alive"])
    silent = sorted(host["host"] for host in hosts if not host["alive"])
    if here is not None and here not in alive:
        yield bad(f"the managers do not hear nova-pmt-agent of this host, {here}.")
    if silent:
        yield doubt(f"the agents of {', '.join(silent)} are silent.")
    if len(alive) < 2:
        yield bad(f"a pair needs two hosts; agents that are heard: {', '.join(alive) or 'none'}.")
    yield good(f"alive: {', '.join(alive)}")


# -- Nova ------------------------------------------------------------------------------------


def session(conf: Any) -> Any:
    """keystoneauth's, as group ``[nova]`` says.

    :raises nova_pmt.exception.ConfigError: the credentials are not all there.
    """
    from keystoneauth1 import exceptions, loading

    try:
        auth = loading.load_auth_from_conf_options(conf, "nova")
        if auth is None:
            raise exception.ConfigError(
                "[nova] auth_type is not set",
                cure="Set it and the other credentials in group [nova], where managers run.",
            )
        return loading.load_session_from_conf_options(conf, "nova", auth=auth, timeout=TIMEOUT_S)
    except exceptions.ClientException as error:
        raise exception.ConfigError(
            f"group [nova]: {error}", cure="Correct the credentials in group [nova]."
        ) from error


def nova(conf: Any, connect: Callable[[Any], Any] = session) -> Iterator[Finding]:
    """Managers can log in, may do what they must, and Nova's compute services are ours."""
    from keystoneauth1 import adapter, exceptions

    if not conf.nova.enabled:
        yield good("managers do not follow Nova ([nova] enabled)")
        return
    if not conf.database.connection:
        yield good("no managers run here: they alone log in")
        return
    try:
        found = connect(conf)
        yield from _user(conf, found)
        reach = {"interface": conf.nova.endpoint_type, "region_name": conf.nova.region_name or None}
        compute = adapter.Adapter(found, service_type="compute", **reach)
        placement = adapter.Adapter(found, service_type="placement", **reach)
        yield from _microversion(compute)
        yield from _services(compute)
        yield from _providers(placement)
        if found.get_endpoint(service_type="network", **reach) is None:
            yield bad("there is no Neutron in the catalog: addresses cannot follow a failover.")
    except exception.PmtError as error:
        yield failed(error)
    except exceptions.ClientException as error:
        yield bad(f"group [nova] of nova-pmt.conf: {str(error) or type(error).__name__}")


def _user(conf: Any, found: Any) -> Iterator[Finding]:
    access = found.auth.get_access(found)
    missing = sorted(ROLES - set(access.role_names))
    if missing:
        yield bad(
            f"user {access.username} has not the role {' and not the role '.join(missing)} in "
            f"project {access.project_name}: openstack role add --user {access.username} "
            f"--project {access.project_name} {missing[0]}"
        )
    else:
        yield good(f"user {access.username} of project {access.project_name}, admin and service")
    if conf.nova.standby_user_id and access.user_id not in conf.nova.standby_user_id:
        yield bad(
            f"[nova] standby_user_id lacks {access.user_id}, the ID of user {access.username}: "
            "compute hosts would not take its servers for standbys."
        )


def _microversion(compute: Any) -> Iterator[Finding]:
    data = compute.get_endpoint_data()
    if data is None:
        yield bad("there is no Nova in the catalog.")
    elif (data.max_microversion or (0, 0)) < _MICROVERSION:
        yield bad("Nova is too old: microversion 2.94 is needed.")


def _services(compute: Any) -> Iterator[Finding]:
    query = "/os-services?binary=nova-compute"
    found = compute.get(query, microversion="2.53").json()["services"]
    for service in found:
        if service.get("forced_down"):
            yield doubt(
                f"nova-compute of {service['host']} is forced down: after a failover managers take "
                "that back when the host is there again."
            )
        elif service["state"] != "up":
            yield doubt(f"nova-compute of {service['host']} is {service['state']}.")


def _providers(placement: Any) -> Iterator[Finding]:
    answer = placement.get(
        f"/resource_providers?required={TRAIT}", microversion="1.18", raise_exc=False
    )
    # 400: nobody has ever said that there is such a trait.
    found = answer.json()["resource_providers"] if answer.status_code == 200 else []
    names = sorted(provider["name"] for provider in found)
    if len(names) < 2:
        yield bad(
            f"hosts with nova-pmt-compute and a live agent ({TRAIT} in Placement): "
            f"{', '.join(names) or 'none'}. A pair needs two."
        )
    else:
        yield good(f"{TRAIT}: {', '.join(names)}")
