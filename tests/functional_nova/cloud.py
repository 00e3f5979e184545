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


"""Nova's API, conductor, scheduler, Placement and two computes with our driver, in this process.

libvirt is Nova's fake one. What the agents do to domains is done by the test: ``waits`` makes the
domain that waits, from the primary's XML, and ``goes_on`` takes its mark away, as the agent does
when the guest runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# The first import of anything of Nova's chooses between threads and eventlet.
import nova.tests.functional  # isort: skip

import fixtures
import nova.virt
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.functional.libvirt import base
from nova.virt.libvirt import LibvirtDriver
from oslo_messaging._drivers import impl_fake

from nova_pmt import exception
from nova_pmt.agent import presence
from nova_pmt.manager import states
from nova_pmt.openstack import policy
from nova_pmt.openstack.nova import namespace
from nova_pmt.openstack.nova.localagent import LocalAgent
from nova_pmt.standby import domainxml

if not any(path in nova.virt.__path__ for path in namespace.__path__):
    nova.virt.__path__.extend(namespace.__path__)  # what nova-pmt-compute does

__all__ = ["Cloud", "LibvirtDriver", "MANAGERS"]

#: Of the API's administrator in Nova's fixtures: the managers are this user.
MANAGERS = "admin"


class FakeAgents:
    """The agents of all hosts, and the managers: one dictionary of pairs."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self.calls: list[tuple[str, str, str]] = []
        self.broken: exception.PmtError | None = None
        #: As the managers have them.
        self.rows: dict[str, dict[str, Any]] = {}

    def pair_is(self, uuid: str, state: str, primary: str, standby: str, winner: str = "") -> None:
        active = standby if winner == "standby" else primary
        self.rows[uuid] = {
            "uuid": uuid,
            "state": state,
            "winner": winner,
            "primary_host": primary,
            "standby_host": standby,
            "active_host": active,
        }

    def unprotect(self, host: str, domain: str) -> dict[str, Any]:
        self.calls.append(("unprotect", host, domain))
        if self.broken is not None:
            raise self.broken
        row = self.rows.get(domain)
        if row is None or row["primary_host"] != host or row["state"] not in states.OPEN:
            raise exception.NotProtected(f"{host} has no pair of server {domain}")
        row["state"] = "unprotected"
        self._cloud.stops_waiting(row["standby_host"], domain)
        self._cloud.tells(host)
        self._cloud.tells(row["standby_host"])
        return {}

    def status(self, host: str, domain: str | None = None) -> dict[str, Any]:
        return {"pairs": [{"uuid": domain, "generation": 1}]}

    def release_standby(
        self, host: str, *, uuid: str, generation: int, forget: bool = False
    ) -> dict[str, Any]:
        self.calls.append(("release_standby", host, uuid))
        if self.broken is not None:
            raise self.broken
        self._cloud.stops_waiting(host, uuid)
        return {"gone": True}

    def pair(self, domain: str) -> dict[str, Any]:
        if self.broken is not None:
            raise self.broken
        if domain not in self.rows:
            raise exception.NotProtected(f"server {domain} was never protected")
        return self.rows[domain]

    def asked(self, what: str) -> list[tuple[str, str]]:
        """Hosts and servers of the calls of this name; forgets all calls."""
        found = [(host, uuid) for name, host, uuid in self.calls if name == what]
        self.calls.clear()
        return found


class Cloud(base.ServersTestBase):
    """Computes ``a`` and ``b``."""

    api_major_version = "v2.1"
    microversion = "2.94"  # the last one whose evacuation keeps a server's state
    ADMIN_API = True
    CAST_AS_CALL = False
    REQUIRES_LOCKING = False

    def setUp(self) -> None:
        self.directory = Path(self.useFixture(fixtures.TempDir()).path)
        impl_fake.FakeExchangeManager.cleanup()
        self.write_settings()
        super().setUp()
        self.flags(compute_driver="pmt.PMTDriver")  # after super, which chooses the stock one
        self.agents = FakeAgents(self)
        self.user_api = self.api_fixture.api
        self.user_api.microversion = self.microversion
        for name in ("a", "b"):
            self.start_compute(hostname=name)
            self.equip(name)

    def write_settings(self, more: str = "") -> None:
        path = self.directory / "nova-pmt.conf"
        path.write_text(
            f"[DEFAULT]\ntransport_url = fake://\n"
            f"[guest]\nruntime_directory = {self.directory}\n"
            f"[nova]\nstandby_user_id = {MANAGERS}\n{more}"
        )
        self.useFixture(fixtures.EnvironmentVariable("NOVA_PMT_CONFIG", str(path)))

    def __delattr__(self, name: str) -> None:
        # Nova's test cases empty themselves at their end; pytest then takes away what it put in.
        self.__dict__.pop(name, None)

    def _wait_for_server_parameter(
        self, server: Any, expected_params: Any, max_retries: int = 0, **more: Any
    ) -> Any:
        # Nova's own patience is for a machine of one's own.
        return super()._wait_for_server_parameter(
            server, expected_params, max_retries=max(max_retries, 240), **more
        )

    # -- agents ---------------------------------------------------------------------------

    def equip(self, host: str, managers: bool = True) -> None:
        """The host has an agent, and its compute service knows it."""
        (self.directory / host).mkdir(exist_ok=True)
        agent = LocalAgent(
            host,
            str(self.directory / host),
            self.agents,
            self.agents if managers else None,
            monotonic=iter(range(1_000_000)).__next__,  # each look reads the file
            boot_time=lambda: 100.0,
        )
        self.driver(host).use(agent)
        self.tells(host)

    def tells(self, host: str, **changes: Any) -> None:
        """The host's agent writes what it has to tell."""
        pairs = {}
        for uuid, row in self.agents.rows.items():
            if row["state"] != "unprotected":
                roles = {row["primary_host"]: "primary", row["standby_host"]: "standby"}
                if host in roles:
                    pairs[uuid] = roles[host]
        seen = {
            "pid": os.getpid(),
            "at": 100.0,
            "release": "1.0",
            "host": host,
            "cpu_model": "EPYC",
            "machine_types": ("pc", "q35"),
            "backing_free_bytes": (1 << 30) + 1,
            "pairs": pairs,
            **changes,
        }
        presence.write(presence.path(str(self.directory / host)), presence.Presence(**seen))

    def agent_dies(self, host: str) -> None:
        os.unlink(presence.path(str(self.directory / host)))

    # -- domains --------------------------------------------------------------------------

    def driver(self, host: str) -> Any:
        return self.computes[host].driver

    def domain(self, host: str, uuid: str) -> Any | None:
        """The domain, or None."""
        try:
            return self.driver(host).connection().lookupByUUIDString(uuid)
        except fakelibvirt.libvirtError:
            return None

    def waits(self, host: str, server: dict[str, Any], primary: str = "a") -> Any:
        """The agent of a host starts the domain that waits, from the primary's XML."""
        source = self.domain(primary, server["id"])
        xml = domainxml.standby_xml(
            source.XMLDesc(0), "/run/qmp/x.sock", domainxml.Mark(1, primary, True)
        )
        found = self.driver(host).connection().createXML(xml, 0)
        plain = found.XMLDesc
        # (The fake makes its XML anew each time, without the mark.)
        found.XMLDesc = lambda flags: domainxml.with_mark(
            plain(flags), domainxml.Mark(1, primary, True)
        )
        return found

    def stops_waiting(self, host: str, uuid: str) -> None:
        found = self.domain(host, uuid)
        if found is not None and domainxml.read_mark(found.XMLDesc(0)) is not None:
            found.destroy()

    def goes_on(self, host: str, uuid: str) -> Any:
        """The guest runs there now: no mark, and it is defined."""
        found = self.domain(host, uuid)
        assert found is not None
        del found.XMLDesc
        found._transient = False
        return found

    # -- servers --------------------------------------------------------------------------

    def flavor(self, **extra_specs: str) -> str:
        """A small flavor with these extra specs (``mode`` is ``ft:mode``)."""
        named = {f"ft:{name}": value for name, value in extra_specs.items()}
        return self._create_flavor(vcpu=1, memory_mb=512, disk=1, extra_spec=named or None)

    def boot(
        self, host: str, api: Any = None, metadata: dict[str, str] | None = None, **more: Any
    ) -> dict[str, Any]:
        """A server on that host, ACTIVE."""
        more.setdefault("networks", "none")
        body = self._build_server(host=host, **more)
        if metadata:
            body["metadata"] = metadata
        created = (api or self.api).post_server({"server": body})
        return self._wait_for_state_change(created, "ACTIVE")

    def protected(self, host: str = "a", **more: Any) -> dict[str, Any]:
        """A server whose flavor says that it is protected."""
        return self.boot(host, flavor_id=self.flavor(mode="pmt"), **more)

    def standby_of(self, server: dict[str, Any], host: str = "b") -> dict[str, Any]:
        """Its standby server, as the managers make it."""
        return self.boot(
            host,
            metadata={policy.STANDBY: server["id"]},
            flavor_id=self._flavor_of(server),
        )

    def _flavor_of(self, server: dict[str, Any]) -> str:
        name = self.api.get_server(server["id"])["flavor"]["original_name"]
        return next(one["id"] for one in self.api.get_flavors() if one["name"] == name)

    def pair(self, **more: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """A server on a that is protected, its standby server on b, and the domain that waits."""
        server = self.protected(**more)
        standby = self.standby_of(server)
        domain = self.waits("b", server)
        self.agents.pair_is(server["id"], "protected", "a", "b")
        self.tells("a")
        self.tells("b")
        return server, standby, domain

    def fails_over(self, uuid: str) -> None:
        """The standby on b has won, and its guest runs."""
        self.goes_on("b", uuid)
        self.agents.pair_is(uuid, "standby_active", "a", "b", winner="standby")
        self.tells("b")

    def force(self, host: str, down: bool) -> None:
        """Tell Nova that a compute service is down, or take it back."""
        keep, self.api.microversion = self.api.microversion, "2.53"
        try:
            service = self.api.get_services(binary="nova-compute", host=host)[0]
            self.api.put_service(service["id"], {"forced_down": down})
        finally:
            self.api.microversion = keep

    def providers(self, server: dict[str, Any]) -> dict[str, Any]:
        """Its allocations, by resource provider."""
        return dict(self.placement.get("/allocations/" + server["id"]).body["allocations"])

    def evacuate(self, server: dict[str, Any], **more: Any) -> dict[str, Any]:
        """To b, as the managers do it."""
        more.setdefault("expected_state", "ACTIVE")
        return self._evacuate_server(server, {"host": "b"}, expected_host="b", **more)

    def status(self, server: dict[str, Any]) -> tuple[str, str]:
        """Its state and its host."""
        found = self.api.get_server(server["id"])
        return found["status"], found["OS-EXT-SRV-ATTR:host"]
