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

"""``nova-pmt-bench managers``: many hosts die at once, and managers decide about all their pairs.

The managers' own code on a real database; hosts and agents are simulated. Each side of each pair
that lost its peer claims as workers do: after the silence that it was told to wait for, and again
when it gets no answer. What is measured is how long it takes until the last one has its answer, and
how many statements the database has to do for each. On a machine that does other things as well
the managers' own processor time says more than the clock.

Each manager is a process; the threads in which it answers share one Python. The database and all of
them share this machine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from oslo_config import cfg

from nova_pmt import exception
from nova_pmt.arbiter.base import Side
from nova_pmt.bench import pictures
from nova_pmt.bench.report import Report
from nova_pmt.conf import opts
from nova_pmt.manager.db import migration, models
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from nova_pmt.manager.repair import Repairs
from nova_pmt.manager.service import ManagerService
from nova_pmt.manager.startup import THREADS

#: A lost peer is noticed after this much, give or take, in seconds.
SILENCE_S, SILENCE_SPREAD_S = 0.5, 0.15
#: Between two questions that were not answered.
RETRY_S = 0.5
GOAL_S = 5.0
#: For processes to start and to connect, before the hosts die.
START_S = 8.0
_GENERATION = 1000


@dataclass(frozen=True)
class Options:
    """What is simulated.

    :param managers: processes that answer.
    :param connection: of the database, which must be empty; None: SQLite in a file of its own.
    """

    pairs: int = 10_000
    hosts: int = 500
    dead: int = 20
    seed: int = 1
    connection: str | None = None
    managers: int = 2


@dataclass(frozen=True)
class Claim:
    """A side that has lost its peer, and when it asks for the first time."""

    uuid: str
    side: Side
    at_s: float


class Statements:
    """Counts what the database is asked to do."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def listen(self, engine: sa.Engine) -> None:
        """Count all of this engine's from now on."""
        sa.event.listen(engine, "before_cursor_execute", self._one)

    def _one(self, *_: Any) -> None:
        with self._lock:
            self.count += 1


def host_name(number: int) -> str:
    """Of the simulated host."""
    return f"compute{number:04}"


def arrange(options: Options) -> list[tuple[str, int, int]]:
    """Pairs, spread over the hosts by chance: UUID, primary's host, standby's host."""
    chance = random.Random(options.seed)
    found = []
    for number in range(options.pairs):
        primary, standby = chance.sample(range(options.hosts), 2)
        found.append((f"00000000-0000-4000-8000-{number:012x}", primary, standby))
    return found


def claims(options: Options, pairs: list[tuple[str, int, int]]) -> list[Claim]:
    """Who asks when the first ``dead`` hosts die; of pairs with both there nobody does."""
    chance = random.Random(options.seed + 1)
    found = []
    for uuid, primary, standby in pairs:
        at = SILENCE_S + chance.uniform(0.0, SILENCE_SPREAD_S)
        if primary < options.dead <= standby:
            found.append(Claim(uuid, "standby", at))
        elif standby < options.dead <= primary:
            found.append(Claim(uuid, "primary", at))
    return sorted(found, key=lambda claim: claim.at_s)


def fill(engine: Engine, options: Options, pairs: list[tuple[str, int, int]]) -> None:
    """Hosts that are heard, and pairs that are protected."""
    now = time.time()
    with engine.writer() as session:
        session.execute(
            sa.insert(models.Host),
            [
                {
                    "name": host_name(number), "beats": 1, "alive": True, "maintenance": False,
                    "seen_at": now, "facts": {"cpu_model": "sim", "memory_free_bytes": 1 << 38},
                }
                for number in range(options.hosts)
            ],
        )  # fmt: skip
        session.execute(
            sa.insert(models.Pair),
            [
                {
                    "uuid": uuid, "name": f"server-{uuid[-6:]}", "generation": _GENERATION,
                    "state": "protected", "winner": "", "primary_host": host_name(primary),
                    "standby_host": host_name(standby), "strategy": "pmt", "options": {},
                    "wanted": True, "reason": "", "changed_at": now, "attempts": 0,
                }
                for uuid, primary, standby in pairs
            ],
        )  # fmt: skip


def _engine(connection: str) -> Engine:
    conf = cfg.ConfigOpts()
    opts.register(conf)
    conf([], project="nova_pmt", default_config_files=[])
    conf.set_override("connection", connection, "database")
    return Engine(conf)


@contextlib.contextmanager
def database(options: Options) -> Iterator[tuple[Engine, str]]:
    """An empty one, with its tables, and its URL."""
    with contextlib.ExitStack() as stack:
        connection = options.connection
        if connection is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="nova-pmt-"))
            connection = f"sqlite:///{directory}/managers.sqlite"
        engine = _engine(connection)
        stack.callback(engine.close)
        engine.ask(migration.upgrade)
        if Database(engine).pairs():
            raise exception.ConfigError(
                "the database has pairs in it", cure="Give an empty one: they would be mixed up."
            )
        yield engine, connection


@dataclass
class Decided:
    """How it went: seconds after the deaths at which each claim was answered; what went wrong.

    :param cpu_s: processor time of each manager, whatever else the machine did meanwhile.
    """

    at_s: list[float]
    lost: int = 0
    asked_again: int = 0
    statements: int = 0
    cpu_s: list[float] = field(default_factory=list)


def decide(connection: str, found: list[Claim], start: float) -> Decided:
    """One manager's part: have claims made, each at its time.

    :param start: when the hosts die, CLOCK_MONOTONIC in seconds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = _engine(connection)
    try:
        statements = Statements()
        engine.ask(statements.listen)
        before = time.process_time()
        result = _decide(ManagerService(Database(engine)), found, start)
        result.statements = statements.count
        result.cpu_s = [time.process_time() - before]
        return result
    finally:
        engine.close()


def _decide(service: ManagerService, found: list[Claim], start: float) -> Decided:
    result = Decided([])
    lock = threading.Lock()

    def ask(claim: Claim) -> None:
        while True:
            try:
                won = service.claim(claim.uuid, _GENERATION, claim.side)
                break
            except exception.ArbiterUnavailable:
                with lock:
                    result.asked_again += 1
                time.sleep(RETRY_S)
        with lock:
            result.at_s.append(time.monotonic() - start)
            result.lost += not won

    with ThreadPoolExecutor(THREADS) as pool:
        for claim in found:
            if (left := start + claim.at_s - time.monotonic()) > 0:
                time.sleep(left)
            pool.submit(ask, claim)
    return result


def decide_all(connection: str, found: list[Claim], managers: int) -> Decided:
    """Have all claims made by that many managers; any of them gets any claim, as on a bus."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(managers, mp_context=context) as pool:
        start = time.monotonic() + START_S
        parts = [
            pool.submit(decide, connection, found[number::managers], start)
            for number in range(managers)
        ]
        done = [part.result() for part in parts]
    return Decided(
        sorted(at for one in done for at in one.at_s),
        sum(one.lost for one in done),
        sum(one.asked_again for one in done),
        sum(one.statements for one in done),
        [used for one in done for used in one.cpu_s],
    )


class SimulatedAgents:
    """Agents that do at once what they are told, and tell the managers as real ones do."""

    def __init__(self, service: ManagerService) -> None:
        self._service = service
        self._lock = threading.Lock()
        self.done = 0

    def protect(
        self,
        host: str,
        domain: str,
        standby_host: str,
        strategy: str | None = None,
        options: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """Begin a generation; it is protected as soon as that."""
        pair = self._service.pair(domain)
        generation = pair["generation"] + 1
        self._service.begin(
            {
                "uuid": domain,
                "name": pair["name"],
                "generation": generation,
                "primary_host": host,
                "standby_host": standby_host,
            }
        )
        report = {"uuid": domain, "generation": generation, "role": "primary"}
        self._service.beat(host, {}, [{**report, "state": "protected"}])
        with self._lock:
            self.done += 1
        return {}

    def move_standby(self, host: str, domain: str, standby_host: str) -> dict[str, Any]:
        """The same, on a host that still has the pair."""
        return self.protect(host, domain, standby_host)


def repair(
    store: Database, service: ManagerService, options: Options, on_progress: Callable[[int], None]
) -> tuple[int, float]:
    """Let the standbys that won say so, then mend all that broke.

    :returns: pairs that are protected again, and the seconds that it took.
    """
    for pair in store.pairs(in_states=("failing_over",)):
        report = {"uuid": pair.uuid, "generation": pair.generation, "role": "standby"}
        service.beat(pair.standby_host, {}, [{**report, "state": "standby_active"}])
    for number in range(options.dead):
        store.judge(host_name(number), 1 << 60, False, "simulated")
        with contextlib.suppress(exception.PmtError):
            host = next(one for one in store.hosts() if one.name == host_name(number))
            store.judge(host.name, host.beats, False, "simulated")
    agents = SimulatedAgents(service)
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        Repairs(store, agents, pool, backoff_s=3600.0).sweep()
        while pool._work_queue.qsize():
            on_progress(agents.done)
            time.sleep(0.2)
    return agents.done, time.monotonic() - start


def run(options: Options, report: Report) -> list[dict[str, Any]]:
    """Simulate. Returns the one row of the report.

    :raises nova_pmt.exception.PmtError: the database failed, or is not empty.
    """
    pairs = arrange(options)
    asked = claims(options, pairs)
    with database(options) as (engine, connection):
        fill(engine, options, pairs)
        report.progress("decided", 0, len(asked))
        decided = decide_all(connection, asked, options.managers)
        per_claim = decided.statements / max(1, len(asked))
        store = Database(engine)
        service = ManagerService(store)
        statements = Statements()
        engine.ask(statements.listen)
        again, took_s = repair(
            store, service, options, lambda count: report.progress("repaired", count, len(asked))
        )
        counts = store.counts()
    after = [at - claim.at_s for at, claim in zip(decided.at_s, asked, strict=True)]
    return [
        {
            "pairs": options.pairs,
            "hosts": options.hosts,
            "dead": options.dead,
            "seed": options.seed,
            "managers": options.managers,
            "database": "SQLite" if options.connection is None else _kind(options.connection),
            "affected": len(asked),
            "decided": len(decided.at_s),
            "lost": decided.lost,
            "asked_again": decided.asked_again,
            "last_decided_s": round(decided.at_s[-1], 3) if decided.at_s else 0.0,
            "last_asked_s": round(asked[-1].at_s, 3) if asked else 0.0,
            "decided_s": [round(at, 3) for at in decided.at_s],
            "asked_s": [round(claim.at_s, 3) for claim in asked],
            "backlog_max_s": round(max(after, default=0.0), 3),
            "statements_per_claim": round(per_claim, 2),
            "manager_cpu_s": [round(used, 2) for used in decided.cpu_s],
            "repaired": again,
            "repaired_in_s": round(took_s, 2),
            "statements_per_repair": round(statements.count / max(1, again), 2),
            "states": counts,
        }
    ]


@contextlib.contextmanager
def mariadb() -> Iterator[str]:
    """A server of our own; brings the URL of its database."""
    from nova_pmt.lab.mariadb import MariaDB

    with (
        tempfile.TemporaryDirectory(prefix="nova-pmt-") as directory,
        MariaDB(Path(directory) / "server") as server,
    ):
        yield server.create("managers")


def plot(row: dict[str, Any], path: Path) -> None:
    """Claims asked and decided over time.

    :raises nova_pmt.exception.ConfigError: there is no matplotlib.
    """
    figure = pictures.figure(7, 4)
    axes = figure.add_subplot()
    for key, label in (("asked_s", "asked"), ("decided_s", "decided")):
        axes.step(row[key], range(1, len(row[key]) + 1), where="post", label=label)
    axes.axvline(GOAL_S, color="grey", linestyle=":", label=f"goal, {GOAL_S:g} s")
    axes.set_xlabel("seconds after the hosts' death")
    axes.set_ylabel("claims")
    axes.set_xlim(0, None)
    axes.set_title(f"{row['dead']} of {row['hosts']} hosts die, {row['database']}")
    axes.legend(loc="lower right")
    figure.savefig(path)


def _kind(connection: str) -> str:
    """Of a connection's URL, which has a password in it."""
    return sa.make_url(connection).get_backend_name()
