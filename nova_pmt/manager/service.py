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

"""What a manager can be asked for; :mod:`nova_pmt.manager.endpoint` puts it on the message bus.

Whatever comes in is checked here, before the database is asked.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, get_args

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import inputs
from nova_pmt.arbiter.base import Arrangement, Side
from nova_pmt.manager import states
from nova_pmt.manager.db.api import Database, PairRow
from nova_pmt.manager.db.nova import Note, NovaNotes
from nova_pmt.manager.fencing import Fencing
from nova_pmt.manager.states import State

LOG = log.getLogger(__name__)

MAX_PAIRS, MAX_FACTS_BYTES, MAX_EVENTS, MAX_REASON = 10_000, 16_384, 1000, 2000
_SIDES = get_args(Side)
#: Heartbeats in which a pair is missed before that is believed: one may have been under way when
#: the pair began.
_MISSES = 3


class ManagerService:
    """The manager's operations. All raise :class:`nova_pmt.exception.PmtError` only.

    :param fencing: what to do to a primary's host before its standby may win.
    :param on_takeover: told of each pair whose standby has won; must not wait.
    :param notes: of servers of Nova; None: Nova is not followed.
    """

    def __init__(
        self,
        database: Database,
        fencing: Fencing | None = None,
        on_takeover: Callable[[str], None] = lambda uuid: None,
        notes: NovaNotes | None = None,
    ) -> None:
        self._database = database
        self._fencing = fencing
        self._on_takeover = on_takeover
        self._notes = notes
        self._lock = threading.Lock()
        self._missed: dict[tuple[str, int, str], int] = {}
        self._claims: collections.Counter[tuple[str, str]] = collections.Counter()

    # -- the arbiter --------------------------------------------------------------------

    def begin(self, arrangement: Any) -> dict[str, Any]:
        """Open a generation."""
        return _view(self._database.begin(_arrangement(arrangement)))

    def claim(
        self,
        uuid: Any,
        generation: Any,
        side: Any,
        reason: Any = "",
        other_stopped: Any = False,
    ) -> bool:
        """Whether this side goes on."""
        if side not in _SIDES:
            raise exception.InvalidInput(f"side must be one of {', '.join(_SIDES)}")
        pair, number = inputs.uuid(uuid), inputs.generation(generation)
        if side == "standby" and not inputs.flag(other_stopped, "other_stopped"):
            self._fence_primary(pair, number, _text(reason))
        won = self._database.claim(pair, number, side, _text(reason))
        outcome = "won" if won else "lost"
        LOG.info("%s: generation %d: %s claims: %s", pair, number, side, outcome)
        if won and side == "standby":
            self._on_takeover(pair)
        with self._lock:
            self._claims[side, outcome] += 1
        return won

    def claims(self) -> dict[tuple[str, str], int]:
        """How many claims of each side were won and lost here."""
        with self._lock:
            return dict(self._claims)

    def _fence_primary(self, uuid: str, generation: int, reason: str) -> None:
        """Before a claim that could win; one that has lost already turns nobody off.

        Not where the primary said itself that its guest is gone or stands still: other guests are
        well on its host.

        :raises nova_pmt.exception.FencingFailed: ask again.
        """
        if self._fencing is None or not self._fencing.needed:
            return
        # A primary that came back and won now would be turned off, and nobody would be left.
        host = self._database.reserve(uuid, generation, reason)
        if host is not None:
            self._fencing.demand(host)

    def winner(self, uuid: Any, generation: Any) -> Side | None:
        """Which side won."""
        return self._database.winner(inputs.uuid(uuid), inputs.generation(generation))

    def challenge(self, uuid: Any) -> str:
        """Leave a token."""
        token = secrets.token_hex(16)
        self._database.challenge(inputs.uuid(uuid), token)
        return token

    def answer(self, uuid: Any, token: Any) -> bool:
        """Whether this token was left."""
        pair, seen = inputs.uuid(uuid), inputs.token(token)
        return secrets.compare_digest(self._database.challenged(pair), seen)

    # -- agents -------------------------------------------------------------------------

    def beat(self, host: Any, facts: Any, pairs: Any, running: Any = None) -> dict[str, Any]:
        """Take note of a host, and of what became of its pairs.

        One pair that is described badly must not keep the others from being heard.
        """
        name = inputs.host(host)
        _demand_facts(facts)
        if not isinstance(pairs, list) or len(pairs) > MAX_PAIRS:
            raise exception.InvalidInput(f"pairs must be a list of at most {MAX_PAIRS}")
        known = {pair.uuid: pair for pair in self._database.pairs(host=name)}
        for report in pairs:
            try:
                self._report(name, report, known)
            except exception.InvalidInput as error:
                LOG.warning("%s reports a pair badly: %s", name, error)
        self._reconcile(name, known, pairs, running)
        found = self._database.beat(name, facts)
        return {"alive": found.alive, "maintenance": found.maintenance}

    def _reconcile(
        self, host: str, known: Mapping[str, PairRow], reports: list[Any], running: Any
    ) -> None:
        """What a host should have told of and does not: its agent was made anew, or told in vain.

        :param known: its pairs, as they were before this heartbeat.
        :param running: UUIDs of the guests that run there; what is not said is not concluded from.
        """
        if running is None:
            return
        if not isinstance(running, list) or len(running) > MAX_PAIRS:
            raise exception.InvalidInput(f"running must be a list of at most {MAX_PAIRS}")
        here = {uuid for uuid in running if isinstance(uuid, str)}
        told = {report.get("uuid") for report in reports if isinstance(report, dict)}
        for pair in known.values():
            goes_on = pair.state == "failing_over" and pair.standby_host == host
            if goes_on and pair.winner == "standby" and pair.uuid in here:
                self._database.transition(
                    pair.uuid, pair.generation, "standby_active", host=host, reason="it runs there"
                )
            if pair.state not in states.OPEN:
                continue
            key = (pair.uuid, pair.generation, host)
            with self._lock:
                missed = 0 if pair.uuid in told else self._missed.get(key, 0) + 1
                self._missed[key] = missed
                if not missed or missed >= _MISSES:
                    del self._missed[key]
            if missed < _MISSES:
                continue  # it may just have begun
            if pair.primary_host != host:
                self._without_standby(pair, host, here)
                continue
            new: State = "primary_alone" if pair.uuid in here else "error"
            reason = f"nova-pmt-agent of {host} knows nothing of this pair"
            self._database.transition(pair.uuid, pair.generation, new, host=host, reason=reason)

    def _without_standby(self, pair: PairRow, host: str, here: set[str]) -> None:
        """The standby's host knows nothing of its side: if the primary's is silent, nobody else
        would ever close the generation, and nobody could start the guest again.
        """
        if pair.uuid in here or pair.winner:
            return
        alive = {one.name for one in self._database.hosts() if one.alive}
        if pair.primary_host not in alive:
            self._database.transition(
                pair.uuid,
                pair.generation,
                "primary_alone",
                host=host,
                reason=f"{pair.primary_host} is silent, and {host} has no standby of it any more",
            )

    def _report(self, host: str, report: Any, known: Mapping[str, PairRow]) -> None:
        if not isinstance(report, dict):
            raise exception.InvalidInput("a pair must be a dictionary")
        uuid = inputs.uuid(report.get("uuid"))
        generation = inputs.generation(report.get("generation"))
        role = report.get("role")
        new = states.REPORTED.get((str(role), str(report.get("state"))))
        if new is None:
            return
        pair = known.get(uuid)
        if pair is None or pair.generation != generation or pair.state == new:
            return
        if host != (pair.standby_host if role == "standby" else pair.primary_host):
            LOG.warning("%s: %s is not its %s's host: not believed", uuid, host, role)
            return
        if pair.winner not in ("", role):
            return  # what becomes of the side that lost says nothing of the guest
        self._database.transition(
            uuid, generation, new, host=host, reason=_text(report.get("reason", ""))
        )

    def release(self, domain: Any) -> dict[str, Any]:
        """Let go of a pair that waits to be protected again: an operator does not want it.

        :raises nova_pmt.exception.Refusal: there is none that waits.
        """
        pair = self._find(domain)
        if pair.state not in states.BROKEN | {"error"}:
            raise exception.NotProtected(
                f"server {pair.uuid} is {pair.state}: nothing waits to be protected again"
            )
        self._database.transition(
            pair.uuid,
            pair.generation,
            "unprotected",
            host=pair.active_host,
            reason="on request",
            withdraw=True,
        )
        return _view(self._find(pair.uuid))

    # -- looking ------------------------------------------------------------------------

    def pairs(self, host: Any = None, state: Any = None) -> list[dict[str, Any]]:
        """Pairs that are remembered; and, asked for all, servers of Nova that have none."""
        if state is not None and state not in states.STATES:
            raise exception.InvalidInput(
                "there is no such state", cure=f"Choose one of: {', '.join(states.STATES)}."
            )
        rows = self._database.pairs(
            host=None if host is None else inputs.host(host),
            in_states=None if state is None else (state,),
        )
        notes = {} if self._notes is None else {note.uuid: note for note in self._notes.notes()}
        found = [_view(row, notes.pop(row.uuid, None)) for row in rows]
        if host is None and state is None:
            found += [_without_pair(note) for note in notes.values()]
        return found

    def pair(self, domain: Any) -> dict[str, Any]:
        """One pair by UUID or name."""
        row = self._find(domain)
        return _view(row, None if self._notes is None else self._notes.note(row.uuid))

    def events(self, domain: Any = None, after: Any = 0, limit: Any = 100) -> list[dict[str, Any]]:
        """Lines of the audit trail."""
        for number, what, most in ((after, "after", 1 << 62), (limit, "limit", MAX_EVENTS)):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
                raise exception.InvalidInput(f"{what} must be a whole number up to {most}")
        uuid = None if domain is None else self._known(domain)
        rows = self._database.events(uuid=uuid, after=after, limit=limit)
        return [dataclasses.asdict(row) for row in rows]

    def hosts(self) -> list[dict[str, Any]]:
        """Every host that was ever heard of, with how many pairs it is in."""
        used: dict[str, list[int]] = {}
        for pair in self._database.pairs(in_states=set(states.STATES) - {"unprotected"}):
            used.setdefault(pair.active_host, [0, 0])[0] += 1
            if pair.state in states.OPEN:
                used.setdefault(pair.standby_host, [0, 0])[1] += 1
        found = []
        for row in self._database.hosts():
            primaries, standbys = used.get(row.name, [0, 0])
            found.append({**dataclasses.asdict(row), "primaries": primaries, "standbys": standbys})
        return found

    def maintain(self, host: Any, on: Any) -> None:
        """Take a host out of service, or back."""
        name = inputs.host(host)
        if not self._database.maintain(name, inputs.flag(on, "on")):
            raise exception.UnknownHost(f"no agent of a host {name} was ever heard of")

    def _known(self, domain: Any) -> str:
        """Also of a server of Nova that never was in a pair."""
        if self._notes is not None and len(wanted := inputs.domain(domain)) == 36:
            note = self._notes.note(wanted)
            if note is not None:
                return note.uuid
        return self._find(domain).uuid

    def _find(self, domain: Any) -> PairRow:
        wanted = inputs.domain(domain)
        found = self._database.pair(wanted) if len(wanted) == 36 else None
        if found is None:
            named = self._database.pairs(name=wanted)
            if len(named) > 1:
                raise exception.InvalidInput(
                    f"{len(named)} servers are called {wanted!r}", cure="Name it by its UUID."
                )
            found = named[0] if named else None
        if found is None:
            raise exception.NotProtected(f"server {wanted} was never protected")
        return found


def _arrangement(value: Any) -> Arrangement:
    if not isinstance(value, dict):
        raise exception.InvalidInput("an arrangement must be a dictionary")
    try:
        given = Arrangement(**value)
    except TypeError as error:
        raise exception.InvalidInput(f"arrangement: {error}") from error
    found = Arrangement(
        uuid=inputs.uuid(given.uuid),
        name=_text(inputs.domain(given.name)),
        generation=inputs.generation(given.generation),
        primary_host=inputs.host(given.primary_host),
        standby_host=inputs.host(given.standby_host),
        strategy=inputs.word(given.strategy, "a strategy's name"),
        options=inputs.options(given.options),
    )
    if found.primary_host == found.standby_host:
        raise exception.SameHost(f"both sides of {found.uuid} would be on {found.primary_host}")
    return found


def _demand_facts(value: Any) -> None:
    # One level: databases bound how deep JSON may be, each in its own way; and none knows NaN.
    try:
        good = isinstance(value, dict) and len(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        good = False
    if (
        not good
        or good > MAX_FACTS_BYTES
        or any(isinstance(v, dict | list) for v in value.values())
    ):
        raise exception.InvalidInput("facts must be a small dictionary of words and numbers")


def _text(value: Any) -> str:
    # (JSON can hold half characters and zeros, databases cannot.)
    text = str(value)[:MAX_REASON].replace("\0", "")
    return text.encode("utf-8", "replace").decode()


def _view(row: PairRow, note: Note | None = None) -> dict[str, Any]:
    found = {**dataclasses.asdict(row), "active_host": row.active_host}
    return found if note is None else {**found, "nova": _nova(note)}


def _nova(note: Note) -> dict[str, Any]:
    return {"step": note.step, "reason": note.reason, "ordered": note.ordered}


def _without_pair(note: Note) -> dict[str, Any]:
    """A server of Nova that asks for protection, and never had it."""
    blank = dict.fromkeys(("winner", "primary_host", "standby_host", "active_host", "strategy"), "")
    return {
        **blank,
        "uuid": note.uuid,
        "name": "",
        "generation": 0,
        "state": "unprotected",
        "options": {},
        "wanted": True,
        "reason": "",
        "changed_at": note.changed_at,
        "attempts": note.attempts,
        "nova": _nova(note),
    }
