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

"""A cloud in memory: what Nova, Placement, Neutron and agents do, with their order and refusals."""

from __future__ import annotations

import itertools
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any

from nova_pmt import exception
from nova_pmt.arbiter.base import Arrangement
from nova_pmt.manager import states
from nova_pmt.manager.db.api import Database
from nova_pmt.openstack import policy
from nova_pmt.openstack.clients import Server, Service

UUID = "5a2f3c1e-0000-4000-8000-0000000000aa"
HOSTS = ("a", "b", "c")
US = "the-managers"


class AtOnce(Executor):
    """Does it in the caller's thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Killed(BaseException):
    """The manager dies here."""


@dataclass
class Cloud:
    """:param database: the managers', which agents tell of their pairs.

    ``runs`` says where each protected server's guest runs, ``waits`` where its standby waits.
    """

    database: Database
    servers_: dict[str, Server] = field(default_factory=dict)
    forced: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    allocations: dict[str, set[str]] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    waits: dict[str, str] = field(default_factory=dict)
    evacuated: set[tuple[str, str]] = field(default_factory=set)
    room: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HOSTS, 2))
    calls: list[str] = field(default_factory=list)
    refusals: list[exception.PmtError] = field(default_factory=list)
    #: Calls until one fails, dies or has its answer lost; None: none does.
    trouble: tuple[int, str] | None = None
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    # -- trouble --------------------------------------------------------------------------

    def _ask(self, call: str) -> bool:
        """Note a call; whether its answer gets lost."""
        self.calls.append(call)
        if self.trouble is None:
            return False
        left, kind = self.trouble
        if left:
            self.trouble = (left - 1, kind)
            return False
        self.trouble = None
        if kind == "kill":
            raise Killed
        if kind == "fail":
            raise exception.NovaUnavailable(f"{call}: no answer")
        return True

    def _answer(self, lost: bool) -> None:
        if lost:
            raise exception.NovaUnavailable("the answer got lost")

    # -- Nova -----------------------------------------------------------------------------

    def boot(self, host: str = "a", **changes: Any) -> Server:
        """A server that is protected by its property."""
        server = Server(
            UUID,
            "web",
            "project",
            "user",
            host,
            metadata={policy.PROPERTY: "pmt"},
            extra_specs={policy.MODE: "allowed"},
            flavor="small",
            image="image",
        )
        server = replace(server, **changes)
        self.servers_[server.uuid] = server
        self.allocations[server.uuid] = {host}
        self.bound[server.uuid] = host
        self.runs[server.uuid] = host
        return server

    def change(self, uuid: str = UUID, **changes: Any) -> None:
        self.servers_[uuid] = replace(self.servers_[uuid], **changes)

    def remove(self, uuid: str = UUID) -> None:
        """As its owner deletes it; the driver unprotects first."""
        self.stop(uuid)
        self.servers_.pop(uuid)
        self.allocations.pop(uuid)

    def stop(self, uuid: str = UUID) -> None:
        """Protection ends, as the driver's guard does; then the guest."""
        self._end(uuid)
        self.runs.pop(uuid, None)

    def user_id(self) -> str:
        return US

    def servers(self) -> list[Server]:
        self._ask("servers")
        return list(self.servers_.values())

    def standbys(self, uuid: str | None = None) -> list[Server]:
        self._ask("standbys")
        return [
            one
            for one in self.servers_.values()
            if one.user_id == US and uuid in (None, one.metadata[policy.STANDBY])
        ]

    def server(self, uuid: str) -> Server | None:
        self._ask("server")
        return self.servers_.get(uuid)

    def _used(self, host: str) -> int:
        return sum(host in hosts for hosts in self.allocations.values())

    def _fits(self, host: str) -> bool:
        return host not in self.forced and self._used(host) < self.room[host]

    def create_standby(self, server: Server) -> str:
        lost = self._ask("create")
        uuid = f"standby-{next(self.numbers)}"
        metadata = {policy.STANDBY: server.uuid}
        standby = Server(uuid, user_id=US, metadata=metadata, flavor=server.flavor)
        hosts = [host for host in HOSTS if host != server.host and self._fits(host)]
        hosts = [host for host in hosts if host not in self.dead]
        if hosts:
            self.servers_[uuid] = replace(standby, host=hosts[0])
            self.allocations[uuid] = {hosts[0]}
        else:
            self.servers_[uuid] = replace(standby, status="ERROR", fault="No valid host")
        self._answer(lost)
        return uuid

    def delete(self, uuid: str) -> None:
        lost = self._ask("delete")
        self.servers_.pop(uuid, None)
        self.allocations.pop(uuid, None)
        self._answer(lost)

    def service(self, host: str) -> Service | None:
        self._ask("service")
        return Service(f"service-{host}", host not in self.dead | self.forced, host in self.forced)

    def force_down(self, service: str, down: bool) -> None:
        lost = self._ask("force_down" if down else "let_up")
        host = service.removeprefix("service-")
        if down:
            self.forced.add(host)
        elif any(source == host for _, source in self.evacuated):
            raise exception.NovaRefused("done evacuation migration records remain", status=400)
        else:
            self.forced.discard(host)
        self._answer(lost)

    def finish_evacuations(self, host: str) -> None:
        self._ask("finish")
        for uuid, source in list(self.evacuated):
            if source == host:
                self.evacuated.discard((uuid, source))
                self.allocations.get(uuid, set()).discard(host)

    def evacuate(self, uuid: str, host: str) -> None:
        lost = self._ask("evacuate")
        server = self.servers_[uuid]
        if server.host not in self.forced and server.host not in self.dead:
            raise exception.NovaRefused("the compute service is in use", status=400)
        if server.status not in ("ACTIVE", "SHUTOFF", "ERROR"):
            raise exception.NovaRefused(f"it is {server.status}", status=409)
        if not self._fits(host):
            # The API has said yes; the record says what became of it.
            self.change(uuid, status="ERROR", fault="No valid host")
        elif self.runs.get(uuid) != host:
            self.change(uuid, host=host)
            self.calls.append("second")
            raise AssertionError("Nova boots a second copy")
        elif server.status == "SHUTOFF":
            self.calls.append("powers")
            raise AssertionError("Nova powers it off")
        else:
            self.evacuated.add((uuid, server.host))
            self.allocations[uuid].add(host)
            self.bound[uuid] = host
            self.change(uuid, host=host, status="ACTIVE", fault="", task_state="")
        self._answer(lost)

    def reset_active(self, uuid: str) -> None:
        self._ask("reset")
        self.change(uuid, status="ACTIVE", task_state="")

    def free(self, uuid: str) -> None:
        lost = self._ask("free")
        self.allocations.pop(uuid, None)
        self._answer(lost)

    def rebind(self, uuid: str, host: str) -> int:
        lost = self._ask("rebind")
        self.bound[uuid] = host
        self._answer(lost)
        return 1

    # -- agents ---------------------------------------------------------------------------

    def check(self, host: str, domain: str, standby_host: str | None = None) -> dict[str, Any]:
        pair = self.database.pair(domain)
        if pair is not None and pair.state in (*states.OPEN, "primary_alone"):
            # It looks at nothing else then.
            already = exception.AlreadyProtected(f"it is {pair.state}")
            return {"refusals": [already.to_dict()]}
        return {"refusals": [refusal.to_dict() for refusal in self.refusals]}

    def protect(
        self,
        host: str,
        domain: str,
        standby_host: str,
        strategy: str | None = None,
        options: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        lost = self._ask(f"protect {host} {standby_host}")
        if domain in self.waits:
            raise exception.AlreadyProtected(domain)
        if self.runs.get(domain) != host or standby_host in self.dead:
            raise exception.HostUnreachable(standby_host)
        pair = self.database.pair(domain)
        generation = pair.generation + 1 if pair is not None else 1
        self.database.begin(
            Arrangement(domain, "web", generation, host, standby_host, strategy or "pmt", {})
        )
        self.database.transition(domain, generation, "protected", host=host)
        self.waits[domain] = standby_host
        self._answer(lost)
        return {}

    def move_standby(self, host: str, domain: str, standby_host: str) -> dict[str, Any]:
        raise exception.NotProtected(domain)

    def find(self, host: str, domain: str) -> dict[str, Any]:
        self._ask("find")
        if host in self.dead:
            raise exception.HostUnreachable(host)
        return {"running": self.runs.get(domain) == host}

    def replug(self, host: str, uuid: str) -> None:
        self._ask("replug")
        raise exception.NotProtected(uuid)

    def unprotect(self, host: str, domain: str) -> dict[str, Any]:
        lost = self._ask("unprotect")
        if domain not in self.waits:
            raise exception.NotProtected(domain)
        self._end(domain)
        self._answer(lost)
        return {}

    def _end(self, uuid: str) -> None:
        self.waits.pop(uuid, None)
        pair = self.database.pair(uuid)
        if pair is not None and pair.state != "unprotected":
            self.database.transition(
                uuid, pair.generation, "unprotected", host=pair.active_host, reason="asked for"
            )

    # -- failures -------------------------------------------------------------------------

    def fail_over(self, uuid: str = UUID, *, dies: bool = True) -> bool:
        """The guest dies, with its host or alone; false when it has no standby to go on."""
        pair = self.database.pair(uuid)
        if uuid not in self.waits or pair is None or pair.state != "protected":
            return False
        assert self.database.claim(uuid, pair.generation, "standby")
        if dies:
            self.dead.add(pair.primary_host)
            self._heard(pair.primary_host, False)
        self.runs[uuid] = self.waits.pop(uuid)
        self.database.transition(
            uuid, pair.generation, "standby_active", host=pair.standby_host, reason=""
        )
        return True

    def hosts_beat(self) -> None:
        """All agents that live are heard."""
        for host in HOSTS:
            if host not in self.dead:
                self.database.beat(host, {})
                self._heard(host, True)

    def _heard(self, host: str, alive: bool) -> None:
        row = next((one for one in self.database.hosts() if one.name == host), None)
        if row is not None and row.alive is not alive:
            self.database.judge(host, row.beats, alive, "")

    def come_back(self, host: str) -> None:
        """Its agent is heard again."""
        self.dead.discard(host)
        self._heard(host, True)
