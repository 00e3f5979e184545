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

"""One trial: protected, requests, a kill, one survivor, and what is left of the answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nova_pmt.evaluation import images
from nova_pmt.evaluation.plan import Plan
from nova_pmt.evaluation.session import Session
from nova_pmt.evaluation.site import Pair, Site, until
from nova_pmt.evaluation.traffic import silence_s
from nova_pmt.exception import LabError
from nova_pmt.lab import LabHost, transactions

#: Requests go on for so long after the failover, in seconds.
AFTER_S = 0.3
#: Until the arbiter has decided and the winner runs.
SURVIVOR_S = 40.0
#: A side that was killed together with its agent is looked after only when that is back.
HELP_S = 8.0
#: Until the loser's domain is ended.
ENDED_S = 30.0
_STATS_S = 0.08
#: With so many records a guest is replaced by another: each check reads all of them, and takes ten
#: seconds and more when it is full.
MOST_RECORDS = min(16_000, transactions.CAPACITY - 1000)
#: How many lines of what is wrong a trial keeps.
_KEPT = 8


class Void(Exception):
    """The pair had come apart before the kill: two failures at once, which nobody survives."""


@dataclass
class Result:
    """One line of ``trials.jsonl``. Times in seconds, or in ms where the name says so.

    :param winner: the side that the arbiter let go on.
    :param survivor: the host on which the guest runs.
    :param lost: answered requests that memory has not.
    :param repeated: requests that it has twice, and answers that were given twice.
    :param unexplained: records that nobody sent.
    :param two_survivors: the other host did not end its domain.
    :param failover_ms: from the kill until the standby ran; None when the primary went on.
    :param detection_ms: of it until the standby took note.
    :param silence_ms: the longest time without any answer around the kill, as clients saw it.
    :param output_delay_ms: p50 of packets held until released, before the kill.
    :param problems: what is wrong, in words; the first of each kind.
    """

    trial: int
    kind: str
    moment_s: float
    silent: bool = False
    primary: str = ""
    generation: int = 0
    winner: str = ""
    survivor: str = ""
    answered: int = 0
    records: int = 0
    lost: int = 0
    repeated: int = 0
    unexplained: int = 0
    broken_connections: int = 0
    image_mismatches: int = 0
    image_check_errors: int = 0
    image_leaks: int = 0
    disks_unlike_memory: int = 0
    two_survivors: int = 0
    epoch: int | None = None
    failover_ms: float | None = None
    detection_ms: float | None = None
    silence_ms: float | None = None
    output_delay_ms: float | None = None
    protect_s: float = 0.0
    check_s: float = 0.0
    duration_s: float = 0.0
    refused: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def what(self) -> str:
        """What was done, in few words."""
        return self.kind

    @property
    def clean(self) -> bool:
        """Nothing that a client could have seen, or that two copies could have done, is wrong."""
        return not (
            self.lost
            or self.repeated
            or self.unexplained
            or self.broken_connections
            or self.image_mismatches
            or self.image_check_errors
            or self.disks_unlike_memory
            or self.two_survivors
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Pace:
    """Mean time between an answer and the client's next request, in seconds.

    :param syncing: while a first synchronisation is under way: the copy shall meet writes.
    """

    think_s: float
    syncing_s: float = 0.2


class Trial:
    """See the module's text.

    :param options: of the pair, as ``nova-pmt protect`` has them.
    :param fenced: what the guest sends is held (not so in the negative). Without that the loser
        is heard until its agent ends it, and connections break: new ones are made each time.
    """

    def __init__(
        self,
        site: Site,
        session: Session,
        plan: Plan,
        pace: Pace,
        options: Mapping[str, float],
        *,
        fenced: bool = True,
        result: Result | None = None,
    ) -> None:
        self._site = site
        self._session = session
        self._plan = plan
        self._pace = pace
        self._options = options
        self._fenced = fenced
        self._result = result or Result(plan.number, plan.kind, plan.moment_s, plan.silent)

    def run(self) -> Result:
        """Do it, to the end: afterwards both hosts and their agents are up.

        :raises Void: the guest is lost, for no fault of the product's.
        :raises LabError: it could not be done, or nobody goes on.
        """
        begun = time.monotonic()
        result, traffic = self._result, self._session.traffic
        traffic.go(self._pace.syncing_s)
        pair, result.refused = self._site.protected(self._session.guest, self._options)
        result.primary, result.generation = pair["primary_host"], pair["generation"]
        result.protect_s = seconds_since(begun)
        failed = self._session.guest.host
        kill = self._until_kill(pair)
        with self._restoring(failed) as restored:
            killed = self._kill(kill)
            survivor = self._survivor(failed, restored)
            self._session.moved(self._session.guest.on(survivor))
            time.sleep(AFTER_S)
            if self._fenced:
                self._check(killed)  # meanwhile the other host comes back
            restored()
            self._one_survivor(survivor)
            if not self._fenced:
                self._check(killed)
            self._times(survivor, killed)
        result.duration_s = seconds_since(begun)
        return result

    # -- the kill -----------------------------------------------------------------------

    def _until_kill(self, pair: Pair) -> Callable[[], float]:
        """Let requests run until the moment; returns what kills."""
        site, session, plan = self._site, self._session, self._plan
        kill = site.prepare_kill(session.guest, pair, plan)
        moment = time.monotonic() + plan.moment_s
        session.traffic.go(self._pace.think_s)
        time.sleep(max(0.0, moment - _STATS_S - time.monotonic()))
        stats = (site.pair(session.guest.host, session.guest.uuid) or {}).get("stats") or {}
        self._result.output_delay_ms = (stats.get("output_delay_ms") or {}).get("p50")
        time.sleep(max(0.0, moment - time.monotonic()))
        return kill

    def _kill(self, kill: Callable[[], float]) -> float:
        uuid, generation = self._session.guest.uuid, self._result.generation
        # A decision before the kill would make it the second failure of this pair.
        before = self._site.winner(uuid, generation)
        killed = kill()
        if before is not None and self._plan.kind in ("qemu", "host"):
            raise Void(f"generation {generation} of {uuid} was decided before: {before}")
        return killed

    @contextlib.contextmanager
    def _restoring(self, host: LabHost) -> Iterator[Restored]:
        """Bring the host back in the background, when told so; it has been at the end."""
        with ThreadPoolExecutor(1, thread_name_prefix="restore") as pool:
            restored = Restored(self._site, host, pool)
            try:
                yield restored
            finally:
                restored()

    # -- who goes on --------------------------------------------------------------------

    def _survivor(self, failed: LabHost, restored: Restored) -> LabHost:
        """Wait until the winner runs; the failed host comes back as soon as that is so."""
        site, uuid, generation = self._site, self._session.guest.uuid, self._result.generation
        begun = time.monotonic()

        def decided() -> Literal["primary", "standby"] | None:
            if time.monotonic() - begun > HELP_S:
                restored.begin()
            return site.winner(uuid, generation)

        winner = until(decided, SURVIVOR_S, f"trial {self._plan.number}: nobody claims the pair")
        self._result.winner = winner
        if winner == "primary" and self._plan.kind in ("qemu", "host"):
            raise Void(f"generation {generation} of {uuid} was won by the primary that we killed")
        survivor = site.other(failed) if winner == "standby" else failed
        until(
            lambda: survivor.powered and site.runs(survivor, uuid),
            SURVIVOR_S,
            f"trial {self._plan.number}: {winner} has won on {survivor.name}, but does not run",
        )
        self._result.survivor = survivor.name
        restored.begin()
        return survivor

    def _one_survivor(self, survivor: LabHost) -> None:
        other, uuid = self._site.other(survivor), self._session.guest.uuid
        try:
            until(lambda: not self._site.runs(other, uuid), ENDED_S, f"{other.name} runs it, too")
        except LabError as error:
            self._result.two_survivors = 1
            self._blame([error.message])

    def _times(self, survivor: LabHost, killed: float) -> None:
        result = self._result
        if result.winner != "standby":
            return
        details = until(
            lambda: self._site.takeover(survivor, self._session.guest.uuid, result.generation),
            SURVIVOR_S,
            f"{survivor.name} knows of no takeover",
        )
        result.epoch = details.get("epoch")
        for name, key in (("failover_ms", "running_at"), ("detection_ms", "detected_at")):
            if key in details:
                setattr(result, name, round((details[key] - killed) * 1e3, 1))

    # -- what is left -------------------------------------------------------------------

    def _check(self, killed: float) -> None:
        """Answers against memory, and against the disks."""
        begun = time.monotonic()
        result, session = self._result, self._session
        broken = session.traffic.quiesce()
        exchanges = session.traffic.take()
        result.answered = session.ledger.take(exchanges)
        silence = silence_s(exchanges, killed)
        result.silence_ms = None if silence is None else round(silence * 1e3, 1)
        if not self._fenced:
            session.reconnect_watcher()
        view = session.view()
        audit = session.ledger.audit(view.table)
        session.ledger.settle(view.table)
        result.records = len(view.table)
        result.lost, result.repeated = len(audit.lost), len(audit.repeated)
        result.unexplained = len(audit.strangers)
        result.broken_connections = len(broken) + len(view.broken)
        for lines in (broken, view.broken, audit.lost, audit.repeated, audit.strangers):
            self._blame(lines)
        if view.problem:
            result.disks_unlike_memory = 1
            self._blame([view.problem])
        found = images.while_paused(
            session.guest,
            lambda: images.examine(
                session.guest,
                session.ledger.expected(),
                session.ledger.possible(),
                session.boot_id,
            ),
        )
        for image in found:
            result.image_mismatches += bool(image.mismatches)
            result.image_check_errors += image.errors
            result.image_leaks += image.leaks
            self._blame([f"{image.disk}: {line}" for line in image.mismatches])
        session.room = result.records < MOST_RECORDS
        if broken or not self._fenced:
            session.reconnect(everybody=not self._fenced)
        result.check_s = seconds_since(begun)

    def _blame(self, lines: Sequence[str]) -> None:
        self._result.problems += lines[:_KEPT]
        if len(lines) > _KEPT:
            self._result.problems.append(f"... and {len(lines) - _KEPT} more like this")


class Restored:
    """A host that is brought back in the background."""

    def __init__(self, site: Site, host: LabHost, pool: ThreadPoolExecutor) -> None:
        self._site, self._host, self._pool = site, host, pool
        self._future: Future[None] | None = None

    def begin(self) -> None:
        """Begin, if that was not done before."""
        if self._future is None:
            self._future = self._pool.submit(self._site.restore, self._host)

    def __call__(self) -> None:
        """Wait until it is back.

        :raises LabError: it does not come back.
        """
        self.begin()
        assert self._future is not None
        self._future.result()


def seconds_since(begun: float) -> float:
    """As results have it."""
    return round(time.monotonic() - begun, 3)
