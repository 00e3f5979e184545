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

"""Protects again what has lost its standby: the choice of a host, and the orders to its agents.

What an agent does by itself, it does: a guest whose standby's host lives is protected again with
the same one. This here is for guests that went on elsewhere, and for standbys whose host is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from oslo_log import log

from nova_pmt import exception
from nova_pmt.manager import choice, states
from nova_pmt.manager.db.api import Database, HostRow, PairRow

LOG = log.getLogger(__name__)

MAX_BACKOFF_S = 300.0
#: An agent tries so often with a standby host that lives, before another one is looked for.
_OWN_ATTEMPTS = 3
_CANDIDATES = 3


class Agents(Protocol):
    """What is asked of agents; see :class:`nova_pmt.agent.rpcapi.AgentAPI`."""

    def protect(
        self,
        host: str,
        domain: str,
        standby_host: str,
        strategy: str | None = None,
        options: dict[str, float] | None = None,
    ) -> dict[str, Any]: ...

    def move_standby(self, host: str, domain: str, standby_host: str) -> dict[str, Any]: ...


@dataclass
class _Turn:
    generation: int
    attempts: int
    since: float


class Repairs:
    """Looks for pairs that broke, and mends them; one for each manager.

    :param workers: orders to agents take seconds; they are given there.
    :param backoff_s: after the first repair that failed; doubles.
    :param others: pairs that somebody else repairs.
    """

    def __init__(
        self,
        database: Database,
        agents: Agents,
        workers: Executor,
        *,
        backoff_s: float,
        clock: Callable[[], float] = time.monotonic,
        others: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._database = database
        self._agents = agents
        self._workers = workers
        self._backoff_s = backoff_s
        self._clock = clock
        self._others = others
        self._turns: dict[str, _Turn] = {}
        self._load: dict[str, int] = {}

    def sweep(self) -> None:
        """Begin every repair that is due.

        :raises nova_pmt.exception.DatabaseUnavailable: nothing was begun.
        """
        broken = self._database.pairs(in_states=states.BROKEN)
        if broken:
            # Counted on as standbys are placed, so that not all go to the host that had the fewest.
            self._load = self._database.load()
        others = self._others() if broken else frozenset()
        known = {pair.uuid for pair in broken}
        self._turns = {uuid: turn for uuid, turn in self._turns.items() if uuid in known}
        for pair in broken:
            if not pair.wanted or pair.uuid in others or not self._due(pair):
                continue
            if self._database.attempt(pair.uuid, pair.generation, pair.attempts):
                self._workers.submit(self._repair, pair)

    def _due(self, pair: PairRow) -> bool:
        now, turn = self._clock(), self._turns.get(pair.uuid)
        if turn is None or (turn.generation, turn.attempts) != (pair.generation, pair.attempts):
            # Another manager may have had the last turn: its attempt is what counts.
            turn = self._turns[pair.uuid] = _Turn(pair.generation, pair.attempts, now)
        return now - turn.since >= self._wait_s(pair.attempts)

    def _wait_s(self, attempts: int) -> float:
        if attempts == 0:
            return 0.0
        return min(self._backoff_s * 2.0 ** min(attempts - 1, 16), MAX_BACKOFF_S)

    def _repair(self, pair: PairRow) -> None:
        try:
            self._mend(pair)
        except exception.PmtError as error:
            LOG.warning("%s: cannot be protected again yet: %s", pair.uuid, error)
        except Exception:  # the thread pool would swallow it
            LOG.exception("%s: its repair failed", pair.uuid)

    def _mend(self, pair: PairRow) -> None:
        hosts = self._database.hosts()
        if pair.state == "primary_alone" and not self._needs_another(pair, hosts):
            return  # its agent is at it
        found = choice.candidates(pair, hosts, self._load)
        if not found.hosts:
            why = "; ".join(f"{name}: {reason}" for name, reason in sorted(found.left_out.items()))
            raise exception.NoStandbyHost(f"no host can take a standby of {pair.uuid}: {why}")
        refusal: exception.PmtError | None = None
        # Others each time: what refuses now will as a rule refuse again.
        first = pair.attempts * _CANDIDATES % len(found.hosts)
        for standby in (*found.hosts[first:], *found.hosts[:first])[:_CANDIDATES]:
            load = self._load
            load[standby] = load.get(standby, 0) + 1
            try:
                self._order(pair, standby)
            except (exception.NotRunning, exception.UnknownDomain) as error:
                self._database.transition(
                    pair.uuid,
                    pair.generation,
                    "unprotected",
                    host=pair.active_host,
                    reason=error.message,
                )
                return
            except exception.AlreadyProtected:
                return  # another manager, or an operator, was faster
            except exception.PmtError as error:
                LOG.info("%s: not on %s: %s", pair.uuid, standby, error)
                refusal = error
                if error.details.get("host") == pair.active_host:
                    break  # nobody there who could be asked again
                continue
            LOG.info("%s: is protected again, with a standby on %s", pair.uuid, standby)
            return
        if refusal is not None:
            raise refusal

    def _order(self, pair: PairRow, standby: str) -> None:
        active = pair.active_host
        if pair.state == "primary_alone":
            try:
                self._agents.move_standby(active, pair.uuid, standby)
                return
            except exception.NotProtected:
                pass  # its agent has let go of it ([agent] resync), or was made anew
        self._agents.protect(active, pair.uuid, standby, pair.strategy, pair.options)

    def _needs_another(self, pair: PairRow, hosts: list[HostRow]) -> bool:
        if pair.attempts >= _OWN_ATTEMPTS:
            return True
        return not any(
            host.name == pair.standby_host and host.alive and not host.maintenance for host in hosts
        )
