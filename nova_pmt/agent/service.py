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

"""What an agent can be asked for; :mod:`nova_pmt.agent.endpoint` puts it on the message bus."""

from __future__ import annotations

from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import inputs
from nova_pmt.agent.control import Pair
from nova_pmt.agent.pairs import Entry
from nova_pmt.agent.parts import Parts
from nova_pmt.agent.prechecks import Prechecks
from nova_pmt.agent.primary import Primaries
from nova_pmt.agent.records import Record
from nova_pmt.agent.standby import Standbys

LOG = log.getLogger(__name__)


class AgentService:
    """The agent's operations. All raise :class:`nova_pmt.exception.PmtError` only.

    :param strategies: names of the strategies that are installed.
    :param default_strategy: ``[checkpoint] strategy``.
    """

    def __init__(
        self, parts: Parts, strategies: frozenset[str], default_strategy: str = "pmt"
    ) -> None:
        self._parts = parts
        self._strategies = strategies
        self._default_strategy = default_strategy
        self._prechecks = Prechecks(parts)
        self._primaries = Primaries(parts, self._prechecks)
        self._standbys = Standbys(parts)

    def resume(self, records: list[Record]) -> None:
        """Take up what an earlier life of this agent left; never raises for a single pair."""
        for record in records:
            part = self._primaries if record.role == "primary" else self._standbys
            try:
                part.resume(record)
            except exception.PmtError as error:
                LOG.error("%s: cannot be taken up: %s", record.pair.uuid, error)

    def stop(self) -> None:
        """End all workers in an orderly way; records stay, guests run on."""
        self._parts.stopping.set()
        self._parts.supervisor.stop_all(self._parts.timing.stop_s)

    def find(self, domain: str) -> dict[str, Any]:
        """The domain here: UUID, name, whether it runs, and its part in a pair."""
        wanted = inputs.domain(domain)
        entry = self._parts.pairs.find(wanted)
        if entry is not None:
            running = entry.record.role == "primary"
            return self._found(entry.uuid, entry.pair.name, running, entry)
        info = self._parts.host.find(wanted)
        return self._found(info.uuid, info.name, info.running, None)

    def check(self, domain: str, standby_host: str | None = None) -> dict[str, Any]:
        """Could the domain be protected, by that standby host if there is one?"""
        info = self._parts.host.find(inputs.domain(domain))
        other = None if standby_host is None else inputs.host(standby_host)
        found = self._prechecks.find(info, other)
        return {
            "ok": not found.refusals,
            "domain": {"uuid": info.uuid, "name": info.name, "running": info.running},
            "host": self._parts.name,
            "standby_host": other,
            "refusals": [refusal.to_dict() for refusal in found.refusals],
            "warnings": found.warnings,
        }

    def check_standby(
        self,
        uuid: str,
        memory_bytes: int,
        arbiter_token: str,
        primary_host: str,
        disks: list[dict[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Why this host cannot hold that standby."""
        found = self._standbys.check(
            inputs.uuid(uuid),
            inputs.memory_bytes(memory_bytes),
            inputs.token(arbiter_token),
            inputs.host(primary_host),
            inputs.disks(disks),
        )
        return [error.to_dict() for error in found]

    def protect(
        self,
        domain: str,
        standby_host: str,
        strategy: str | None = None,
        options: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """Begin to protect; the pair's status when its first synchronisation is under way."""
        other = inputs.host(standby_host)
        plan = inputs.strategy(strategy or self._default_strategy, self._strategies)
        wishes = inputs.options(options)
        info = self._parts.host.find(inputs.domain(domain))
        return self._primaries.protect(info, other, plan, wishes).view(self._parts.name)

    def prepare_standby(
        self,
        pair: dict[str, Any],
        domain_xml: str,
        layout: list[dict[str, Any]],
        disks: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Start a standby; ``address`` and ``port`` where it listens."""
        return self._standbys.prepare(
            _pair(pair, self._parts.name),
            inputs.domain_xml(domain_xml),
            inputs.layout(layout),
            inputs.disks(disks),
        )

    def release_standby(self, uuid: str, generation: int, forget: bool = False) -> dict[str, Any]:
        """End a standby of that generation or an older one."""
        return self._standbys.release(
            inputs.uuid(uuid), inputs.generation(generation), forget is True
        )

    def unprotect(self, domain: str) -> dict[str, Any]:
        """End protection; the guest runs on."""
        entry = self._entry(domain)
        if entry.record.role == "standby":
            raise self._wrong_host(entry)
        return self._primaries.unprotect(entry)

    def move_standby(self, domain: str, standby_host: str) -> dict[str, Any]:
        """Have the next standby of a guest that runs alone made there."""
        other = inputs.host(standby_host)
        entry = self._entry(domain)
        if entry.record.role == "standby":
            raise self._wrong_host(entry)
        return self._primaries.move_standby(entry, other)

    def failover(self, domain: str, force: bool = False) -> dict[str, Any]:
        """Here is the primary: planned switchover. Here is the standby: with force, take over."""
        forced = inputs.flag(force, "force")
        entry = self._entry(domain)
        if entry.record.role == "primary":
            return self._primaries.switch_over(entry)
        if forced:
            return self._standbys.take_over(entry)
        raise exception.PrimaryHealthy(
            f"{entry.uuid} runs on {entry.pair.primary_host}; {self._parts.name} has its standby, "
            f"which goes on by itself when that host is lost",
            cure=f"For a planned move: nova-pmt failover {entry.uuid} --host "
            f"{entry.pair.primary_host}; to give that host up: the same command with --force.",
        )

    def status(self, domain: str | None = None) -> dict[str, Any]:
        """Pairs of this host, and what became of those that are no more."""
        host, pairs = self._parts.name, self._parts.pairs
        if domain is None:
            return {"host": host, "pairs": [one.view(host) for one in pairs],
                    "recent": pairs.recent()}  # fmt: skip
        wanted = inputs.domain(domain)
        entry = pairs.find(wanted)
        recent = pairs.recent(wanted)
        if entry is None and not recent:
            info = self._parts.host.find(wanted)  # UnknownDomain is the better answer if it is
            recent = pairs.recent(info.uuid)
            if not recent:
                raise self._not_protected(info.uuid)
        return {"host": host, "pairs": [entry.view(host)] if entry else [], "recent": recent}

    def list(self) -> dict[str, Any]:
        """Pairs of this host in short."""
        keys = ("uuid", "name", "role", "state", "reason", "since", "primary_host",
                "standby_host", "generation", "strategy")  # fmt: skip
        views = (entry.view(self._parts.name) for entry in self._parts.pairs)
        return {"host": self._parts.name, "pairs": [{k: v[k] for k in keys} for v in views]}

    def _entry(self, domain: str) -> Entry:
        wanted = inputs.domain(domain)
        entry = self._parts.pairs.find(wanted)
        if entry is None:
            raise self._not_protected(self._parts.host.find(wanted).uuid)
        return entry

    def _not_protected(self, uuid: str) -> exception.NotProtected:
        return exception.NotProtected(f"{self._parts.name} has no pair of server {uuid}")

    def _wrong_host(self, entry: Entry) -> exception.WrongHost:
        primary = entry.pair.primary_host
        return exception.WrongHost(
            f"{self._parts.name} has only the standby of {entry.uuid}; its primary is on {primary}",
            cure=f"Send the command there: --host {primary}.",
        )

    def _found(self, uuid: str, name: str, running: bool, entry: Entry | None) -> dict[str, Any]:
        return {
            "uuid": uuid,
            "name": name,
            "running": running,
            "host": self._parts.name,
            "role": entry.record.role if entry else None,
            "primary_host": entry.pair.primary_host if entry else None,
            "standby_host": entry.pair.standby_host if entry else None,
        }


def _pair(data: Any, standby_host: str) -> Pair:
    if not isinstance(data, dict):
        raise exception.InvalidInput("pair must be a dictionary")
    pair = Pair(
        uuid=inputs.uuid(data.get("uuid")),
        name=inputs.domain(data.get("name")),
        generation=inputs.generation(data.get("generation")),
        primary_host=inputs.host(data.get("primary_host")),
        standby_host=inputs.host(data.get("standby_host")),
    )
    if pair.standby_host != standby_host:
        raise exception.PairMismatch(f"this is {standby_host}, not {pair.standby_host}")
    if pair.primary_host == standby_host:
        raise exception.SameHost(f"{standby_host} cannot hold the standby of its own guest")
    return pair
