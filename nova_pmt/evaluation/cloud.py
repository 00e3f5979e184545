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

"""A lab whose hosts have agents, and ctl managers: as a fault campaign uses it.

What is asked while something is broken goes no way that could be broken: the managers' database is
read as a file, and who lets output go is read from the agents' and workers' own traces.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nova_pmt import exception
from nova_pmt.arbiter.base import Side
from nova_pmt.evaluation import leftovers, observed
from nova_pmt.evaluation.console import Console
from nova_pmt.evaluation.leftovers import Part
from nova_pmt.evaluation.site import AGENT, PROTECT_S, Pair, Site
from nova_pmt.evaluation.timeline import Traces
from nova_pmt.evaluation.wire import Wire
from nova_pmt.exception import LabError
from nova_pmt.lab import SHARED, Lab, LabGuest, LabHost, deployment
from nova_pmt.lab.mariadb import MariaDB

#: On the hosts' disks, so that a power cut leaves them as they are.
TRACE = "/var/log/nova_pmt/output.trace"
ARMED = f"{SHARED}/armed"
READY_S = 90.0
_POLL_S = 0.1
_DATABASE_S = 1.0
_QEMU = "qemu-system-x86_64"


@dataclass(frozen=True)
class ControlPlane:
    """How many managers there are, and the server of their database; None: SQLite, in ctl."""

    managers: int = 2
    server: MariaDB | None = None

    @property
    def numbers(self) -> list[int]:
        """Of the managers."""
        return list(range(1, self.managers + 1))


DATABASE = "nova_pmt"


class Lost(Exception):
    """The guest runs nowhere any more."""


class Cloud(Site):
    """Agents, managers and the operator's console; see :class:`~nova_pmt.evaluation.site.Site`."""

    def __init__(
        self,
        lab: Lab,
        console: Console,
        env: Mapping[str, str],
        plane: ControlPlane | None = None,
    ) -> None:
        super().__init__(lab, console, env)
        self.plane = plane or ControlPlane()
        self.database = lab.ctl.disk_path(deployment.DATABASE)
        self.armed = lab.ctl.path(ARMED)
        self.traces = Traces(host.disk_path(TRACE) for host in lab.computes)
        self.wire = Wire(lab)
        self._interfaces = {host.name: leftovers.interfaces(host) for host in lab.computes}

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, lab: Lab, env: Mapping[str, str], plane: ControlPlane | None = None
    ) -> Iterator[Cloud]:
        """Start managers, an agent in each host of a lab that is configured, and the console."""
        plane = plane or ControlPlane()
        deployment.start_managers(lab, plane.managers)
        watched = observed.environment(TRACE, ARMED)
        with super().open(lab, {**env, **watched}) as site:
            assert isinstance(site, cls)
            site.plane = plane
            try:
                yield site
            finally:
                site.wire.close()

    # -- asking -------------------------------------------------------------------------

    def _row(self, query: str, *values: object) -> dict[str, Any] | None:
        """One row of the managers' database; None also while it is locked, or away."""
        if self.plane.server is not None:
            return self._row_of(self.plane.server, query, values)
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=_DATABASE_S)
            ) as database:
                database.row_factory = sqlite3.Row
                row = database.execute(query, values).fetchone()
        except sqlite3.OperationalError:
            return None
        return None if row is None else dict(row)

    @staticmethod
    def _row_of(server: MariaDB, query: str, values: tuple[object, ...]) -> dict[str, Any] | None:
        from pymysql.err import MySQLError

        try:
            with server.connect(DATABASE, _DATABASE_S) as database, database.cursor() as cursor:
                cursor.execute(query.replace("?", "%s"), values)
                found = cursor.fetchone()
        except MySQLError:
            return None
        return None if found is None else dict(found)

    def row(self, uuid: str) -> dict[str, Any] | None:
        """What the managers know of a pair."""
        return self._row("SELECT * FROM pairs WHERE uuid = ?", uuid)

    def winner(self, uuid: str, generation: int) -> Side | None:
        """What the managers have decided."""
        row = self._row(
            "SELECT winner FROM decisions WHERE pair_uuid = ? AND generation = ?", uuid, generation
        )
        if row is None:
            return None
        return "standby" if row["winner"] == "standby" else "primary"

    def qemus(self, uuid: str) -> list[str]:
        """Hosts that have a QEMU of the guest, whatever it does."""
        return [
            host.name
            for host in self.lab.computes
            if host.powered
            and any(
                leftovers.is_program(words, _QEMU) and any(uuid in word for word in words)
                for words in host.commands().values()
            )
        ]

    def begin(self, guest: LabGuest, options: Mapping[str, float]) -> None:
        """Ask for protection, as an operator does.

        :raises nova_pmt.exception.PmtError: what the agent says.
        """
        host = guest.host
        at = self.lab.computes.index(host)
        standby = self.lab.computes[(at + 1) % len(self.lab.computes)]
        self.ask("protect", host.name, guest.uuid, standby.name, None, dict(options))

    def ask(self, method: str, *arguments: Any) -> Any:
        """An operator's question to an agent; see :class:`~nova_pmt.evaluation.console.Console`."""
        return self._console.ask(method, *arguments)

    def protected(
        self,
        guest: LabGuest,
        options: Mapping[str, float],
        *,
        ask: bool = True,
        timeout_s: float = PROTECT_S,
    ) -> tuple[Pair, list[str]]:
        """Wait until managers and both agents say that the guest is protected, and rounds go on.

        What they say may be old: nobody has noticed yet that it is over. So they must say it
        twice, of one generation, with commits in between.

        :param ask: for it, when nobody wants it to be.
        :returns: the primary's view, and the codes of refusals on the way.
        :raises Lost: no host has a QEMU of it.
        :raises LabError: it does not come to that, with the last reason.
        """
        deadline = time.monotonic() + timeout_s
        refused: list[str] = []
        reason = "nobody knows it"
        before: Pair | None = None
        while time.monotonic() < deadline:
            try:
                row = self.row(guest.uuid)
                if row is None or row["state"] == "unprotected":
                    if not self.qemus(guest.uuid):
                        raise Lost(f"no host has a QEMU of it; {_told(row)}")
                    if ask:
                        self.begin(guest, options)
                elif row["state"] == "protected":
                    pair = self._agreed(row)
                    if pair is None or before is None or pair["generation"] != before["generation"]:
                        before = pair
                    elif _committed(pair) > _committed(before):
                        return pair, refused
                elif not self.qemus(guest.uuid):
                    raise Lost(f"no host has a QEMU of it; {_told(row)}")
                reason = _told(row)
            except exception.PmtError as error:
                reason = str(error)
                refused.append(error.code)
            time.sleep(_POLL_S)
        if not self.qemus(guest.uuid):
            raise Lost(f"no host has a QEMU of it; {reason}")
        raise LabError(f"{guest!r} is not protected after {timeout_s:.0f} s: {reason}")

    def _agreed(self, row: Mapping[str, Any]) -> Pair | None:
        """The primary's view, when both sides are of the managers' opinion and rounds go on."""
        found: list[Pair] = []
        for part in ("primary", "standby"):
            pair = self.pair(self.lab.host(row[f"{part}_host"]), row["uuid"])
            if (
                pair is None
                or (pair["role"], pair["state"]) != (part, "protected")
                or pair["generation"] != row["generation"]
            ):
                return None
            found.append(pair)
        if row["primary_host"] not in self.qemus(row["uuid"]):
            return None
        return found[0] if _committed(found[0]) else None

    # -- what is left over --------------------------------------------------------------

    def leftovers(self, guest: LabGuest) -> list[str]:
        """On all hosts, of older arrangements of the guest; by the managers' word of the newest."""
        row = self.row(guest.uuid) or {}
        found: list[str] = []
        for host in self.lab.computes:
            part: Part = ""
            if host.name == row.get("primary_host"):
                part = "primary"
            elif host.name == row.get("standby_host"):
                part = "standby"
            found += leftovers.leftovers(host, guest, part, self._interfaces[host.name])
        return found

    # -- putting right ------------------------------------------------------------------

    def restore(self, host: LabHost) -> None:
        """Power, and an agent; does not wait until it can be asked."""
        if not host.powered:
            host.power_on()
            self.wire.watch(host)
        agent = host.processes.get(AGENT)
        if agent is None or not agent.alive():
            if agent is not None:
                agent.kill()  # reaps it
            deployment.start_agent(host, self._env)

    def restore_manager(self, number: int) -> None:
        """Start it again, if it has ended; does not wait until it can be asked."""
        manager = self.lab.ctl.processes.get(deployment.manager(number))
        if manager is None or not manager.alive():
            if manager is not None:
                manager.kill()  # reaps it
            deployment.start_manager(self.lab, number, timeout=0)

    def mend(self) -> None:
        """Whatever has ended runs again, and can be asked.

        :raises LabError: it does not come back.
        """
        rabbit, computes = self.lab.rabbit, self.lab.computes
        assert rabbit is not None
        if self.plane.server is not None and not self.plane.server.pid:
            self.plane.server.start()
        if not rabbit.alive():
            rabbit.restart()
        rabbit.wait_ready(READY_S)
        for number in self.plane.numbers:
            self.restore_manager(number)
        for host in computes:
            self.restore(host)
        waiting = [host.processes[AGENT] for host in computes]
        waiting += [
            self.lab.ctl.processes[deployment.manager(number)] for number in self.plane.numbers
        ]
        for process in waiting:
            deployment.wait_ready(process, READY_S)


def _committed(pair: Pair) -> int:
    """The last checkpoint, as the worker has told; 0: none."""
    return int((pair.get("stats") or {}).get("committed") or 0)


def _told(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "the managers know nothing of it"
    names = ("state", "generation", "winner", "primary_host", "standby_host", "reason", "attempts")
    return ", ".join(f"{name} {row[name]!r}" for name in names if row[name] not in ("", None))
