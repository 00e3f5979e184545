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

"""Managers follow Nova: what its servers ask for, and what becomes of them.

What is done about a server is found anew each time (:mod:`nova_pmt.openstack.decide`), in a turn
that one manager has (:mod:`nova_pmt.manager.db.nova`). Notifications, claims and the look at all
servers from time to time only say of which server it is time to think.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from oslo_log import log

from nova_pmt import exception, faultpoint
from nova_pmt.manager import repair, states
from nova_pmt.manager.db.api import Database, PairRow
from nova_pmt.manager.db.nova import Note, NovaNotes
from nova_pmt.openstack import failover, policy
from nova_pmt.openstack.clients import Server
from nova_pmt.openstack.decide import GONE, Facts, Step, decide, has_moved
from nova_pmt.openstack.failover import Failover

LOG = log.getLogger(__name__)

#: A turn that does not move for so long, by our own clock, is over: its manager is gone.
LEASE_S = 30.0
BACKOFF_S, MAX_BACKOFF_S = 2.0, 300.0
#: What is waited for is looked at again after so long.
WAIT_S = 2.0
_STEPS_IN_A_TURN = 12
_QUIET = frozenset({"nothing", "wait", "forget"})
#: After so many looks in vain they become rarer, until they are so far apart.
_LOOKS, MAX_WAIT_S = 10, 30.0

#: States in which the agent of a server that has lost its standby is at it.
_AGAIN: frozenset[states.State] = frozenset(
    {"primary_alone", "checking", "syncing", "reprotecting"}
)

#: What is told, of which server, and why.
Announce = Callable[[str, str, str], None]


class Cloud(failover.Cloud, Protocol):
    """What is used of :class:`nova_pmt.openstack.clients.OpenStack`."""

    def user_id(self) -> str: ...
    def servers(self) -> list[Server]: ...
    def create_standby(self, server: Server) -> str: ...


class Agents(repair.Agents, Protocol):
    """What is asked of agents; see :class:`nova_pmt.agent.rpcapi.AgentAPI`."""

    def check(self, host: str, domain: str, standby_host: str | None = None) -> dict[str, Any]: ...
    def unprotect(self, host: str, domain: str) -> dict[str, Any]: ...
    def find(self, host: str, domain: str) -> dict[str, Any]: ...


class Computes(failover.Computes, Protocol):
    """What is used of :class:`nova_pmt.openstack.computeapi.ComputeAPI`."""

    def replug(self, host: str, uuid: str) -> None: ...


class _Over(Exception):
    """Another manager has taken the turn."""


@dataclass
class _Due:
    at: float
    #: The turn that somebody has, and since when we see it.
    turn: int = -1
    since: float = 0.0
    #: Looks since something was done.
    looks: int = 0
    #: Until when, by our own clock, an attempt that failed is not repeated, and what it was with.
    #: (Nova notifies us of each standby server that we make in vain.)
    not_before: float = 0.0
    with_: tuple[str, ...] = ()
    #: Attempts, as its note had them when we looked; -1: we did not yet.
    attempts: int = -1


class Follower:
    """Of one manager.

    :param workers: turns take seconds; they are taken there.
    :param urgent: for what a guest's packets wait for; turns must not keep it from its threads.
    :param announce: tells operators, by notifications; must not wait.
    :param honour: ``[nova] honour_property``.
    :param name: of this manager, another one each time that it is started.
    :param failover_timeout_s: after which operators are told that Nova does not follow.
    """

    def __init__(
        self,
        cloud: Cloud,
        agents: Agents,
        database: Database,
        notes: NovaNotes,
        workers: Executor,
        *,
        computes: Computes | None = None,
        urgent: Executor | None = None,
        announce: Announce = lambda what, uuid, reason: None,
        name: str,
        honour: str,
        reconcile_interval_s: float,
        failover_timeout_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cloud = cloud
        self._agents = agents
        self._database = database
        self._notes = notes
        self._workers = workers
        self._computes = computes
        self._urgent = urgent or workers
        self._announce = announce
        self._name = name
        self._honour = honour
        self._interval_s = reconcile_interval_s
        self._failover_timeout_s = failover_timeout_s
        self._clock = clock
        self._failover = Failover(cloud, notes, clock)
        #: Failovers that we have seen begun: since when by our own clock, None: it was told of.
        self._begun: dict[tuple[str, int], float | None] = {}
        self._lock = threading.Lock()
        self._due: dict[str, _Due] = {}
        self._busy: set[str] = set()
        #: Pairs of guests that are not Nova's.
        self._strangers: set[tuple[str, int]] = set()
        self._looked = clock() - reconcile_interval_s
        #: Set when there is something to do at once.
        self.woken = threading.Event()

    # -- when -----------------------------------------------------------------------------

    def touch(self, uuid: str) -> None:
        """Think of this server soon."""
        self._later(uuid, 0.0)
        with self._lock:
            self._due[uuid].looks = 0
        self.woken.set()

    def owned(self) -> frozenset[str]:
        """Pairs that are ours to repair; those that operators made by hand are not, but Nova is
        told first where they run.
        """
        return frozenset(note.uuid for note in self._notes.notes() if note.ordered or note.step)

    def claimed(self, uuid: str) -> None:
        """Its standby has won, and is about to run: its packets need its ports there. Does not
        wait, and never raises. (A server that is not Nova's has no ports.)
        """
        try:
            self._urgent.submit(self._rebind, uuid)
        except RuntimeError:  # we are ending; another manager finds it in the database
            return

    def _rebind(self, uuid: str) -> None:
        try:
            pair = self._database.pair(uuid)
            if pair is not None and pair.winner == "standby":
                self._cloud.rebind(uuid, pair.standby_host)
        except exception.PmtError as error:
            LOG.warning("%s: its ports are not bound yet: %s", uuid, error)
        except Exception:  # the thread pool would swallow it
            LOG.exception("%s: its ports are not bound yet", uuid)
        self.touch(uuid)

    def sweep(self) -> None:
        """Begin all turns that are due; to be called every second, or when woken.

        :raises nova_pmt.exception.PmtError: it could not be found out what is due.
        """
        self.woken.clear()
        now = self._clock()
        if now - self._looked >= self._interval_s:
            self._looked = now
            self._look_at_all()
        self._look_at_pairs()
        with self._lock:
            due = [uuid for uuid, one in self._due.items() if one.at <= now]
            due = [uuid for uuid in due if uuid not in self._busy]
            self._busy.update(due)
        for uuid in due:
            self._workers.submit(self._turn, uuid)

    def _later(self, uuid: str, after_s: float) -> None:
        at = self._clock() + after_s
        with self._lock:
            due = self._due.setdefault(uuid, _Due(at))
            due.at = min(due.at, at) if after_s == 0.0 else at

    def _look_at_all(self) -> None:
        """What notifications would have told, had none got lost."""
        uuids = {note.uuid for note in self._notes.notes()}
        ours = self._cloud.user_id()
        for server in self._cloud.servers():
            protects = server.metadata.get(policy.STANDBY, "")
            if protects and server.user_id == ours:
                uuids.add(protects)
                continue
            wish = self._wish(server)
            if wish.wanted or wish.ignored:
                uuids.add(server.uuid)
        for uuid in uuids:
            self._later(uuid, 0.0)

    def _look_at_pairs(self) -> None:
        """Those that something has happened to, whoever was told of it."""
        moved: set[states.State] = {*states.BROKEN, "failing_over", "error"}
        followed = {note.uuid: note for note in self._notes.notes()}
        for pair in self._database.pairs(in_states=moved):
            if (pair.uuid, pair.generation) in self._strangers:
                continue
            note = followed.get(pair.uuid)
            news = has_moved(pair, note or Note(pair.uuid))
            if pair.uuid not in self._due and (news or (note is not None and note.ordered)):
                self._later(pair.uuid, 0.0)
        for uuid, note in followed.items():
            if note.step and uuid not in self._due:
                self._later(uuid, 0.0)

    # -- a turn ---------------------------------------------------------------------------

    def _turn(self, uuid: str) -> None:
        try:
            self._do(uuid)
        except _Over:
            self._later(uuid, LEASE_S / 2)
        except exception.DatabaseUnavailable as error:
            LOG.warning("%s: %s", uuid, error)
            self._later(uuid, BACKOFF_S)
        except Exception:  # the thread pool would swallow it
            LOG.exception("%s: its turn failed", uuid)
            self._later(uuid, MAX_BACKOFF_S)
        finally:
            with self._lock:
                self._busy.discard(uuid)

    def _do(self, uuid: str) -> None:
        note = self._take(uuid)
        if note is None:
            return
        step = Step("wait")
        facts: Facts | None = None
        try:
            for _ in range(_STEPS_IN_A_TURN):
                facts = self._facts(note)
                step = decide(facts)
                note, goes_on = self._act(note, step, facts)
                if not goes_on:
                    break
        except exception.DatabaseUnavailable:
            raise
        except exception.PmtError as error:
            self._failed(uuid, error, facts)
            return
        self._settle(note, step)

    def _take(self, uuid: str) -> Note | None:
        """A turn of ours; None: another manager has it, or nobody asks for anything."""
        note = self._notes.note(uuid)
        if note is None:
            if not self._concerns(uuid):
                pair = self._database.pair(uuid)
                with self._lock:
                    self._due.pop(uuid, None)
                    if pair is not None:
                        self._strangers.add((uuid, pair.generation))
                return None
            note = self._notes.keep(uuid)
        now = self._clock()
        with self._lock:
            due = self._due.setdefault(uuid, _Due(now))
            if note.turn != due.turn:
                due.turn, due.since = note.turn, now
            held = note.holder not in ("", self._name)
        pair = self._database.pair(uuid) if held else None
        if pair is not None and has_moved(pair, note):
            held = False  # whatever the other one is at was about a guest that is no more
        if held and now - due.since < LEASE_S:
            self._later(uuid, WAIT_S)
            return None
        return self._renew(note)

    def _concerns(self, uuid: str) -> bool:
        """Most servers ask for nothing, and have nothing of ours."""
        server = self._cloud.server(uuid)
        if server is None:
            return bool(self._cloud.standbys(uuid))
        wish = self._wish(server)
        if wish.wanted or wish.ignored:
            return True
        pair = self._database.pair(uuid)
        return (pair is not None and pair.state != "unprotected") or bool(
            self._cloud.standbys(uuid)
        )

    def _wish(self, server: Server) -> policy.Wish:
        metadata = dict(server.metadata)
        if server.user_id != self._cloud.user_id():
            # Anybody can write a standby's mark: nobody gets out of a flavor's word by it.
            metadata.pop(policy.STANDBY, None)
        return policy.wish(server.extra_specs, metadata, self._honour)

    def _renew(self, note: Note) -> Note:
        """Count on: so others see that we live, and we that nobody else is at it."""
        if not self._notes.take(note.uuid, note.turn, self._name):
            raise _Over
        return replace(note, turn=note.turn + 1, holder=self._name)

    def _facts(self, note: Note) -> Facts:
        server = self._cloud.server(note.uuid)
        standbys = self._cloud.standbys(note.uuid)
        standbys.sort(key=lambda one: (one.uuid != note.standby, one.uuid))
        wish = policy.Wish()
        if server is not None:
            wish = self._wish(server)
        return Facts(
            server,
            wish,
            self._database.pair(note.uuid),
            note,
            standbys,
            frozenset(host.name for host in self._database.hosts() if host.alive),
            _order(wish),
        )

    def _too_soon(self, note: Note, facts: Facts) -> bool:
        """It failed, and nothing is different. Whichever manager it was that failed."""
        now = self._clock()
        with self._lock:
            due = self._due[note.uuid]
            if note.attempts and due.attempts not in (note.attempts, -1):
                # (What it was with is not known: so not for longer than all is looked at again.)
                due.not_before = now + _backoff_s(note.attempts - 1, self._interval_s)
                due.with_ = _same(facts)
            due.attempts = note.attempts
            return now < due.not_before and due.with_ == _same(facts)

    def _act(self, note: Note, step: Step, facts: Facts) -> tuple[Note, bool]:
        """Do it; the note as it is then, and whether there is more to do at once."""
        if step.action in _QUIET:
            return note, False
        if step.action in ("create", "protect", "move") and self._too_soon(note, facts):
            return note, False
        LOG.info("%s: %s %s", note.uuid, step.action, step.reason)
        note = self._renew(note)
        if step.action == "failover":
            return self._fail_over(note)
        if step.action in ("delete", "failed"):
            for uuid in step.targets:
                self._cloud.delete(uuid)
            note = self._write(note, standby="")
            if step.action == "failed":
                raise exception.NoStandbyHost(step.reason)
            self._told(note, "delete", step.reason)
            return self._write(note, reason=step.reason), False
        server = self._cloud.server(note.uuid)
        if server is None:
            return note, True
        if step.action == "create":
            self._demand_possible(server, note)
            standby = self._cloud.create_standby(server)
            faultpoint.reach("nova.create")
            self._told(note, "create", step.reason)
            reason = note.reason or "its standby is being made"
            return self._write(note, standby=standby, reason=reason), False
        if step.action in ("unprotect", "release"):
            self._unprotect(note.uuid, ask=step.action == "unprotect")
            self._told(note, "unprotect", step.reason)
            return self._write(note, ordered=""), True
        return self._protect(note, server, step)

    def _protect(self, note: Note, server: Server, step: Step) -> tuple[Note, bool]:
        host, wish = step.targets[0], self._wish(server)
        self._replug(host, note.uuid)
        # Before it is ordered: what was ordered and is not written down would be an operator's.
        note = self._write(note, ordered=_order(wish))
        if step.action == "move":
            try:
                self._agents.move_standby(server.host, note.uuid, host)
                return note, False
            except exception.NotProtected:
                pass  # its agent has let go of it, or was made anew
        try:
            self._agents.protect(server.host, note.uuid, host, wish.mode, wish.options())
        except exception.AlreadyProtected:
            pair = self._database.pair(note.uuid)
            if pair is None or pair.state not in states.OPEN:
                raise  # its agent is at it
        faultpoint.reach("nova.protect")
        self._told(note, "protect", f"with a standby on {host}")
        return self._write(note, attempts=0, reason=""), False

    def _replug(self, host: str, uuid: str) -> None:
        """Its interfaces may be others than when the standby was made."""
        if self._computes is None:
            return
        try:
            self._computes.replug(host, uuid)
        except exception.NotProtected:
            pass  # nothing was plugged there yet
        except exception.PmtError as error:
            LOG.warning("%s: its interfaces on %s: %s", uuid, host, error)

    def _protects_again(self, note: Note) -> bool:
        """Its agent tries to by itself, with a standby that is gone: in vain, as long as there is
        no standby server."""
        pair = self._database.pair(note.uuid)
        return bool(note.ordered) and pair is not None and pair.state in _AGAIN

    def _demand_possible(self, server: Server, note: Note) -> None:
        """Before anything is made for it.

        :raises nova_pmt.exception.Refusal: why it cannot be protected.
        """
        if not server.image:
            raise exception.SharedStorage(f"server {server.uuid} was made from a volume")
        refusals = self._agents.check(server.host, server.uuid)["refusals"]
        if self._protects_again(note):
            refusals = [one for one in refusals if one["code"] != exception.AlreadyProtected.code]
        if refusals:
            raise exception.from_dict(refusals[0])

    def _unprotect(self, uuid: str, *, ask: bool) -> None:
        pair = self._database.pair(uuid)
        if pair is None:
            return
        try:
            if not ask:
                raise exception.NotProtected(f"no agent of {pair.active_host} is heard")
            self._agents.unprotect(pair.active_host, uuid)
        except (exception.NotProtected, exception.UnknownDomain):
            # Its agent has let go of it, as far as it had it; the pair's row follows.
            self._database.transition(
                uuid, pair.generation, "unprotected", host=pair.active_host, reason="not asked for"
            )

    def _fail_over(self, note: Note) -> tuple[Note, bool]:
        pair = self._database.pair(note.uuid)
        if pair is not None and has_moved(pair, note):
            note = self._begin(note, pair)
        self._tell_overdue(note)
        if note.step != "rebind" and not self._runs_there(note, pair):
            return self._write(note, reason=f"its standby on {note.target} is going on"), False
        if note.step in ("force_down", "evacuate"):
            self._demand_running(note)
        following = self._failover.step(note)
        changes: dict[str, Any] = {"step": following}
        if following != note.step:
            self._told(note, note.step, f"it runs on {note.target}")
        if not following:
            LOG.info("%s: Nova knows that it runs on %s", note.uuid, note.target)
            self._announce("failed_over", note.uuid, f"from {note.source} to {note.target}")
            self._begun.pop((note.uuid, note.generation), None)
            changes |= {"standby": "", "attempts": 0, "reason": ""}
        waits = following == note.step
        return self._write(note, **changes), not waits

    def _begin(self, note: Note, pair: PairRow) -> Note:
        """A failover; also one that overtakes another of which Nova did not hear yet."""
        server = self._cloud.server(note.uuid)
        source = pair.primary_host
        if server is not None and server.host in (note.source, note.target) and note.step:
            source = server.host
        self._announce("failing_over", note.uuid, f"from {source} to {pair.standby_host}")
        return self._write(
            note,
            step=failover.STEPS[0],
            source=source,
            target=pair.standby_host,
            generation=pair.generation,
            attempts=0,
            reason=f"it runs on {pair.standby_host}",
        )

    def _let_go_of(self, uuid: str) -> None:
        """A server is deleted: its guest, if it still runs somewhere, is not protected again."""
        pair = self._database.pair(uuid)
        if pair is not None and pair.state in (*states.BROKEN, "error"):
            self._database.transition(
                uuid,
                pair.generation,
                "unprotected",
                host=pair.active_host,
                reason="the server was deleted",
            )

    def _tell_overdue(self, note: Note) -> None:
        """Once for each failover, by each manager that has it in hand for so long."""
        now = self._clock()
        since = self._begun.setdefault((note.uuid, note.generation), now)
        if since is not None and now - since >= self._failover_timeout_s:
            self._begun[note.uuid, note.generation] = None
            reason = (
                f"for {now - since:.0f} s Nova has not followed its failover from {note.source} to "
                f"{note.target}: step '{note.step}'. {note.reason}"
            ).strip()
            LOG.error("%s runs on %s, but %s", note.uuid, note.target, reason)
            self._told(note, "overdue", reason)
            self._announce("overdue", note.uuid, reason)

    def _runs_there(self, note: Note, pair: PairRow | None) -> bool:
        """The arbiter said so, and its standby's host."""
        if pair is None or self._database.winner(note.uuid, note.generation) != "standby":
            return False
        if pair.generation > note.generation:
            return pair.primary_host == note.target
        return pair.state in ("standby_active", "unprotected", "error")

    def _demand_running(self, note: Note) -> None:
        """Nova would boot a second copy where there is none to adopt.

        :raises nova_pmt.exception.PmtError: it does not run there, or nobody can say so.
        """
        if not self._agents.find(note.target, note.uuid).get("running"):
            raise exception.NotReady(
                f"{note.target} does not say yet that {note.uuid} runs there",
                cure="It is asked again by itself; look at the log of nova-pmt-agent there.",
            )

    def _told(self, note: Note, what: str, reason: str) -> None:
        self._notes.remark(note.uuid, what, reason, generation=note.generation)

    def _write(self, note: Note, **values: Any) -> Note:
        if not self._notes.write(note.uuid, note.turn, **values):
            raise _Over
        return replace(note, **values)

    def _failed(self, uuid: str, error: exception.PmtError, facts: Facts | None) -> None:
        """Said once, and tried again, after longer and longer."""
        note = self._notes.note(uuid)
        if note is None or note.holder != self._name:
            raise _Over
        reason = f"{error.message} [{error.code}]"
        if reason != note.reason:
            LOG.warning("%s: %s", uuid, error)
            self._told(note, "refused", reason)
            self._announce("refused", uuid, reason)
        step = failover.AGAIN.get(note.step, note.step)
        self._write(note, holder="", attempts=note.attempts + 1, reason=reason, step=step)
        # A failover is told of to the end; what is refused waits longer and longer.
        after_s = _backoff_s(note.attempts, MAX_WAIT_S if note.step else MAX_BACKOFF_S)
        self._later(uuid, after_s)
        with self._lock:
            due = self._due[uuid]
            due.attempts = note.attempts + 1
            due.not_before = self._clock() + after_s
            due.with_ = () if facts is None else _same(facts)

    def _settle(self, note: Note, step: Step) -> None:
        """End the turn."""
        if step.action == "forget":
            if step.reason == GONE:
                self._let_go_of(note.uuid)
            self._notes.drop(note.uuid, note.turn)
            for begun in [key for key in self._begun if key[0] == note.uuid]:
                del self._begun[begun]
        elif step.action == "nothing":
            if step.reason and step.reason != note.reason:
                self._told(note, "nothing", step.reason)
                self._announce("unprotected", note.uuid, step.reason)
            self._write(note, holder="", reason=step.reason, attempts=0)
        else:
            reason = note.reason
            if step.action == "wait" and not (note.attempts and note.reason):
                reason = step.reason  # (else what failed is of more interest)
            self._write(note, holder="", reason=reason)
            with self._lock:
                looks = self._due[note.uuid].looks = self._due[note.uuid].looks + 1
            self._later(note.uuid, min(WAIT_S * 2.0 ** min(looks // _LOOKS, 4), MAX_WAIT_S))
            return
        with self._lock:
            self._due.pop(note.uuid, None)


def _backoff_s(attempts: int, longest_s: float = MAX_BACKOFF_S) -> float:
    """How long to wait after so many attempts and one more."""
    return float(min(BACKOFF_S * 2.0 ** min(attempts, 16), longest_s))


def _same(facts: Facts) -> tuple[str, ...]:
    """What an attempt is made with."""
    server = facts.server
    if server is None:
        return ()
    return facts.order, server.host, server.flavor, server.image, server.status


def _order(wish: policy.Wish) -> str:
    """How an agent is told to protect it, to compare."""
    options = (f"{name}={value:g}" for name, value in sorted(wish.options().items()))
    return " ".join((wish.mode, *options)) if wish.wanted else ""
