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

"""What can be asked of, and done to, the managers' memory.

Every change of a pair is a compare-and-swap on (uuid, generation, state), in one transaction with
its line in the audit trail. A transaction that changes a pair takes the row's lock by a write
first: so it reads what is newest, on each of the three databases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nova_pmt import exception
from nova_pmt.arbiter.base import Arrangement, Side
from nova_pmt.manager import states
from nova_pmt.manager.db import models
from nova_pmt.manager.db.engine import Engine, retried
from nova_pmt.manager.states import State

MAX_REASON = 2000
#: As a winner it keeps off both.
_NOBODY = "nobody"


@dataclass(frozen=True)
class PairRow:
    """A pair as it is remembered; see :class:`nova_pmt.manager.db.models.Pair`."""

    uuid: str
    name: str
    generation: int
    state: State
    winner: str
    primary_host: str
    standby_host: str
    strategy: str
    options: dict[str, float]
    wanted: bool
    reason: str
    changed_at: float
    attempts: int

    @property
    def active_host(self) -> str:
        """Where the guest runs, as far as anybody knows."""
        return self.standby_host if self.winner == "standby" else self.primary_host


@dataclass(frozen=True)
class HostRow:
    """A compute host; see :class:`nova_pmt.manager.db.models.Host`."""

    name: str
    beats: int
    alive: bool
    maintenance: bool
    seen_at: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class EventRow:
    """A line of the audit trail; see :class:`nova_pmt.manager.db.models.Event`."""

    id: int
    at: float
    kind: str
    pair_uuid: str
    generation: int
    host: str
    old: str
    new: str
    reason: str


class Database:
    """Used by any number of threads.

    Every method raises :class:`nova_pmt.exception.DatabaseUnavailable` when the database cannot be
    asked now.

    :param now: seconds since 1970; only shown to people.
    """

    def __init__(self, engine: Engine, now: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._now = now

    # -- arrangements -------------------------------------------------------------------

    @retried
    def begin(self, wanted: Arrangement) -> PairRow:
        """Open a generation; only the host on which the guest runs may. Can be asked again.

        What was under way before can be claimed by nobody from now on.

        :raises nova_pmt.exception.PairMismatch: another host has the guest, or this generation is
            not newer than the last one.
        """
        with self._engine.writer() as session:
            pair = self._locked(session, wanted.uuid)
            if pair is None:
                pair = models.Pair(
                    **_columns(wanted),
                    state="checking",
                    winner="",
                    wanted=True,
                    reason="",
                    changed_at=self._now(),
                    attempts=0,
                )
                session.add(pair)
                session.flush()  # a duplicate: somebody else was faster, and we try again
                self._note(session, pair, "transition", "", "checking", wanted.primary_host, "")
                return _pair(pair)
            winner = self._winner(session, pair)
            if _same(pair, wanted) and not winner:
                return _pair(pair)  # its answer got lost
            self._demand_newer(pair, wanted, winner)
            new = states.BEGINS[pair.state]
            old, before = pair.state, pair.generation
            if not winner:
                # Whatever was open is closed in favour of the host that asks: it has the guest.
                self._decide(session, pair, _part(pair, wanted.primary_host))
            self._swap(
                session,
                pair,
                new,
                **_columns(wanted),
                winner="",
                wanted=True,
                reason="",
                attempts=pair.attempts if new == "reprotecting" else 0,
            )
            reason = f"generation {before} ends"
            self._note(session, pair, "transition", old, new, wanted.primary_host, reason)
            return _pair(pair)

    def _demand_newer(self, pair: models.Pair, wanted: Arrangement, winner: str) -> None:
        if wanted.generation <= pair.generation:
            raise exception.PairMismatch(
                f"generation {wanted.generation} of {pair.uuid} is not newer than "
                f"{pair.generation}, which began already"
            )
        if pair.state == "unprotected" or (pair.state == "error" and not winner):
            return
        host = pair.standby_host if winner == "standby" else pair.primary_host
        if wanted.primary_host != host:
            raise exception.PairMismatch(
                f"server {pair.uuid} runs on {host}: {wanted.primary_host} cannot begin a pair of "
                "it",
                cure="End the other copy of the domain; 'nova-pmt events' tells what happened.",
            )

    @retried
    def claim(self, uuid: str, generation: int, side: Side, reason: str = "") -> bool:
        """Ask to go on: the first side of a generation wins, for ever. Can be asked again.

        What is reserved for the standby only the standby can win.

        :raises nova_pmt.exception.ArbiterUnavailable: nothing is known of this pair or generation.
        """
        with self._engine.writer() as session:
            pair = self._known(session, uuid, generation)
            if generation < pair.generation:
                winner = self._decided(session, uuid, generation)
                if not winner:
                    raise _unknown(uuid, generation)
            else:
                winner = self._winner(session, pair)
            if generation == pair.generation and not pair.winner and winner in ("", side):
                old, new = pair.state, states.CLAIMED[side]
                if not winner:
                    self._decide(session, pair, side)
                self._swap(session, pair, new, winner=side, reason=reason[:MAX_REASON])
                host = pair.primary_host if side == "primary" else pair.standby_host
                self._note(session, pair, "claim", old, new, host, reason)
                return True
            if winner != side:
                host = pair.primary_host if side == "primary" else pair.standby_host
                if generation < pair.generation:
                    host = ""  # it had other hosts
                text = f"generation {generation}: {side} asked, {winner} has it"
                self._note_once(session, pair, generation, side, host, text)
            return winner == side

    @retried
    def reserve(self, uuid: str, generation: int, reason: str = "") -> str | None:
        """Keep a generation for its standby, whose claim must wait. Can be asked again.

        From now on its primary has lost. The standby has not won: nobody is to act on it yet.

        :returns: the primary's host; None where there is nothing to wait for: somebody has won, or
            nothing is known of this generation.
        """
        with self._engine.writer() as session:
            pair = self._locked(session, uuid)
            if pair is None or pair.generation != generation or pair.winner:
                return None
            if not self._winner(session, pair):
                self._decide(session, pair, "standby")
                host = pair.primary_host
                text = f"{host} must be off before the standby goes on: {reason}"
                self._note(session, pair, "reserved", pair.state, pair.state, host, text)
            return pair.primary_host

    @retried
    def winner(self, uuid: str, generation: int) -> Side | None:
        """Which side won; None while nobody has claimed (what is reserved is not won), or what has
        not begun here.
        """
        with self._engine.reader() as session:
            pair = session.get(models.Pair, uuid)
            if pair is None or generation > pair.generation:
                return None
            if generation == pair.generation:
                return _side(pair.winner)
            # A number that was skipped is not free any more.
            return _side(self._decided(session, uuid, generation) or "primary")

    @retried
    def transition(
        self,
        uuid: str,
        generation: int,
        new: State,
        *,
        host: str,
        reason: str = "",
        old: Collection[State] | None = None,
        withdraw: bool = False,
    ) -> bool:
        """One step of a pair's life.

        Generations begin, and are won, elsewhere: no step leads there.

        :param old: states from which; by default all from which there is a step.
        :param withdraw: an operator wants ``unprotected`` of a pair in ``error``, also if it is
            reserved for its standby, which cannot win any more then.
        :returns: whether the pair is in ``new`` now; false when this comes too late.
        """
        with self._engine.writer() as session:
            pair = self._locked(session, uuid)
            if pair is None or pair.generation != generation:
                return False
            if pair.state == new:
                return True
            allowed = states.before(new) if old is None else frozenset(old) & states.before(new)
            if pair.state not in allowed or new in states.BEGINS.values():
                return False
            winner = self._winner(session, pair)
            values: dict[str, Any] = {"reason": reason[:MAX_REASON]}
            if new == "protected":
                values["attempts"] = 0
            if new == "primary_alone" and not winner:
                # Its generation came to nothing: the host that has the guest gives it up.
                self._decide(session, pair, "primary")
                values["winner"] = "primary"
            elif new in states.CLAIMED.values() and states.CLAIMED.get(pair.winner) != new:
                return False  # that is for a claim to do
            if new == "unprotected":
                if winner == "standby" and pair.state not in ("standby_active", "error"):
                    return False
                if winner and not pair.winner:
                    if not withdraw:
                        return False  # what became of the side that has lost says nothing
                    self._withdraw(session, pair)
                    values["winner"] = _NOBODY
                values["wanted"] = False
                if not winner:
                    # Its standby must not come back to life.
                    self._decide(session, pair, "primary")
                    values["winner"] = "primary"
            before = pair.state
            self._swap(session, pair, new, **values)
            self._note(session, pair, "transition", before, new, host, reason)
            return True

    @retried
    def want(self, uuid: str, wanted: bool) -> None:
        """Whether the pair is to be repaired when it breaks."""
        with self._engine.writer() as session:
            session.execute(
                sa.update(models.Pair).where(models.Pair.uuid == uuid).values(wanted=wanted)
            )

    @retried
    def attempt(self, uuid: str, generation: int, attempts: int) -> bool:
        """Take the next repair of a pair, which only one manager may.

        :param attempts: as they were when the pair was looked at.
        """
        with self._engine.writer() as session:
            done = session.execute(
                sa.update(models.Pair)
                .where(
                    models.Pair.uuid == uuid,
                    models.Pair.generation == generation,
                    models.Pair.attempts == attempts,
                    models.Pair.state.in_(states.BROKEN),
                )
                .values(attempts=attempts + 1)
            )
            return bool(done.rowcount == 1)

    # -- the token of a shared arbiter --------------------------------------------------

    @retried
    def challenge(self, uuid: str, token: str) -> None:
        """Leave a token for the pair's other host to see."""
        with self._engine.writer() as session:
            # A write first: SQLite does not let two that have read before they write both go on.
            done = session.execute(
                sa.update(models.Challenge)
                .where(models.Challenge.pair_uuid == uuid)
                .values(token=token, left_at=self._now())
            )
            if not done.rowcount:
                session.add(models.Challenge(pair_uuid=uuid, token=token, left_at=self._now()))

    @retried
    def challenged(self, uuid: str) -> str:
        """The token that was left last; empty when there is none."""
        with self._engine.reader() as session:
            found = session.get(models.Challenge, uuid)
            return found.token if found is not None else ""

    # -- hosts --------------------------------------------------------------------------

    @retried
    def beat(self, name: str, facts: dict[str, Any]) -> HostRow:
        """A heartbeat of a host's agent."""
        with self._engine.writer() as session:
            done = session.execute(
                sa.update(models.Host)
                .where(models.Host.name == name)
                .values(beats=models.Host.beats + 1, seen_at=self._now(), facts=facts)
            )
            if not done.rowcount:
                session.add(
                    models.Host(
                        name=name,
                        beats=1,
                        alive=True,
                        maintenance=False,
                        seen_at=self._now(),
                        facts=facts,
                    )
                )
                session.flush()
                self._add_event(session, "host", host=name, new="alive", reason="seen first")
            return _host(session.get(models.Host, name, populate_existing=True))

    @retried
    def judge(self, name: str, beats: int, alive: bool, reason: str) -> bool:
        """Note that a host is alive or not; false when it has beaten since, or nothing changes."""
        with self._engine.writer() as session:
            query = sa.update(models.Host).where(
                models.Host.name == name, models.Host.alive.is_(not alive)
            )
            if not alive:
                query = query.where(models.Host.beats == beats)
            if session.execute(query.values(alive=alive)).rowcount != 1:
                return False
            words = ("dead", "alive")
            self._add_event(
                session, "host", host=name, old=words[not alive], new=words[alive], reason=reason
            )
            return True

    @retried
    def maintain(self, name: str, on: bool) -> bool:
        """Take a host out of service for new standbys, or back; false when it is unknown."""
        with self._engine.writer() as session:
            done = session.execute(
                sa.update(models.Host)
                .where(models.Host.name == name, models.Host.maintenance.is_(not on))
                .values(maintenance=on)
            )
            if not done.rowcount:
                return session.get(models.Host, name) is not None
            self._add_event(session, "host", host=name, new="maintenance" if on else "in service")
            return True

    @retried
    def hosts(self) -> list[HostRow]:
        """All hosts that were ever heard of, by name."""
        with self._engine.reader() as session:
            rows = session.scalars(sa.select(models.Host).order_by(models.Host.name))
            return [_host(row) for row in rows]

    # -- looking ------------------------------------------------------------------------

    @retried
    def pair(self, uuid: str) -> PairRow | None:
        """One pair."""
        with self._engine.reader() as session:
            row = session.get(models.Pair, uuid)
            return None if row is None else _pair(row)

    @retried
    def pairs(
        self,
        *,
        in_states: Iterable[State] | None = None,
        host: str | None = None,
        name: str | None = None,
    ) -> list[PairRow]:
        """Pairs by name; of a host, whatever its part in them is."""
        query = sa.select(models.Pair).order_by(models.Pair.name, models.Pair.uuid)
        if in_states is not None:
            query = query.where(models.Pair.state.in_(sorted(in_states)))
        if host is not None:
            query = query.where(
                sa.or_(models.Pair.primary_host == host, models.Pair.standby_host == host)
            )
        if name is not None:
            query = query.where(models.Pair.name == name)
        with self._engine.reader() as session:
            return [_pair(row) for row in session.scalars(query)]

    @retried
    def events(
        self, *, uuid: str | None = None, after: int = 0, limit: int = 100
    ) -> list[EventRow]:
        """Lines of the audit trail, the oldest first: the last ones, or those after a number."""
        query = sa.select(models.Event)
        if uuid is not None:
            query = query.where(models.Event.pair_uuid == uuid)
        if after:
            query = query.where(models.Event.id > after).order_by(models.Event.id)
        else:
            query = query.order_by(models.Event.id.desc())
        with self._engine.reader() as session:
            rows = [_event(row) for row in session.scalars(query.limit(limit))]
        return rows if after else rows[::-1]

    @retried
    def counts(self) -> dict[State, int]:
        """How many pairs are in each state."""
        query = sa.select(models.Pair.state, sa.func.count()).group_by(models.Pair.state)
        with self._engine.reader() as session:
            found = {str(state): int(count) for state, count in session.execute(query)}
        return {state: found.get(state, 0) for state in states.STATES}

    @retried
    def load(self) -> dict[str, int]:
        """Guests that are in a pair, running or waiting, by host."""
        pair = models.Pair
        active = sa.case((pair.winner == "standby", pair.standby_host), else_=pair.primary_host)
        running = sa.select(active, sa.func.count()).where(pair.state != "unprotected")
        waiting = sa.select(pair.standby_host, sa.func.count())
        waiting = waiting.where(pair.state.in_(sorted(states.OPEN)))
        found: dict[str, int] = {}
        with self._engine.reader() as session:
            for query, host in ((running, active), (waiting, pair.standby_host)):
                for name, count in session.execute(query.group_by(host)):
                    found[name] = found.get(name, 0) + int(count)
        return found

    @retried
    def forget(self, before: float) -> int:
        """Delete lines of the audit trail that are older; how many there were."""
        with self._engine.writer() as session:
            done = session.execute(sa.delete(models.Event).where(models.Event.at < before))
            return int(done.rowcount)

    # -- inside a transaction -----------------------------------------------------------

    def _locked(self, session: Any, uuid: str) -> models.Pair | None:
        """The newest row, ours until the transaction ends.

        A write that changes nothing comes first: SQLite and MariaDB would otherwise give what was
        there when the transaction began.
        """
        session.execute(
            sa.update(models.Pair)
            .where(models.Pair.uuid == uuid)
            .values(changed_at=models.Pair.changed_at)
            .execution_options(synchronize_session=False)
        )
        found: models.Pair | None = session.get(models.Pair, uuid, populate_existing=True)
        return found

    def _known(self, session: Any, uuid: str, generation: int) -> models.Pair:
        pair = self._locked(session, uuid)
        if pair is None or generation > pair.generation:
            raise _unknown(uuid, generation)
        return pair

    def _winner(self, session: Any, pair: models.Pair) -> str:
        """Who has the newest generation, or for whom it is reserved."""
        return pair.winner or self._decided(session, pair.uuid, pair.generation)

    def _decided(self, session: Any, uuid: str, generation: int) -> str:
        """Who won an older generation. One that nobody claimed was closed by the next; empty: it
        never began.
        """
        found = session.get(models.Decision, (uuid, generation))
        return found.winner if found is not None else ""

    def _decide(self, session: Any, pair: models.Pair, side: str) -> None:
        """Write the winner down; a second one is a duplicate key."""
        session.add(
            models.Decision(
                pair_uuid=pair.uuid,
                generation=pair.generation,
                winner=side,
                decided_at=self._now(),
            )
        )
        session.flush()

    def _withdraw(self, session: Any, pair: models.Pair) -> None:
        """Let nobody have what is reserved. (Not the primary: it may have heard that it lost.)"""
        session.execute(
            sa.update(models.Decision)
            .where(
                models.Decision.pair_uuid == pair.uuid,
                models.Decision.generation == pair.generation,
            )
            .values(winner=_NOBODY)
            .execution_options(synchronize_session=False)
        )

    def _swap(self, session: Any, pair: models.Pair, new: str, **values: Any) -> None:
        done = session.execute(
            sa.update(models.Pair)
            .where(
                models.Pair.uuid == pair.uuid,
                models.Pair.generation == pair.generation,
                models.Pair.state == pair.state,
            )
            .values(state=new, changed_at=self._now(), **values)
            .execution_options(synchronize_session=False)
        )
        if done.rowcount != 1:  # the lock was not one: never go on from here
            raise exception.DatabaseUnavailable(f"pair {pair.uuid} was changed by somebody else")
        session.refresh(pair)

    def _note(
        self, session: Any, pair: models.Pair, kind: str, old: str, new: str, host: str, reason: str
    ) -> None:
        self._add_event(
            session,
            kind,
            pair_uuid=pair.uuid,
            generation=pair.generation,
            host=host,
            old=old,
            new=new,
            reason=reason,
        )

    def _note_once(
        self, session: Any, pair: models.Pair, generation: int, side: str, host: str, reason: str
    ) -> None:
        """A refusal; whoever lost may ask again and again."""
        known = session.scalars(
            sa.select(models.Event.id)
            .where(
                models.Event.pair_uuid == pair.uuid,
                models.Event.generation == generation,
                models.Event.kind == "refused",
                models.Event.new == side,
            )
            .limit(1)
        ).first()
        if known is None:
            self._add_event(
                session,
                "refused",
                pair_uuid=pair.uuid,
                generation=generation,
                host=host,
                new=side,
                reason=reason,
            )

    def _add_event(self, session: Any, kind: str, **values: Any) -> None:
        values["reason"] = str(values.get("reason", ""))[:MAX_REASON]
        session.add(models.Event(at=self._now(), kind=kind, **values))


def _unknown(uuid: str, generation: int) -> exception.ArbiterUnavailable:
    return exception.ArbiterUnavailable(
        f"the managers know nothing of generation {generation} of pair {uuid}",
        cure="Was the database restored from an older copy? Decide by hand which side goes "
        "on: 'nova-pmt unprotect' on the primary's host, or start the server again.",
    )


def _part(pair: models.Pair, host: str) -> str:
    """What this host is in the pair: a side, or nobody."""
    if host == pair.primary_host:
        return "primary"
    return "standby" if host == pair.standby_host else _NOBODY


def _columns(wanted: Arrangement) -> dict[str, Any]:
    return {
        "uuid": wanted.uuid,
        "name": wanted.name,
        "generation": wanted.generation,
        "primary_host": wanted.primary_host,
        "standby_host": wanted.standby_host,
        "strategy": wanted.strategy,
        "options": dict(wanted.options),
    }


def _same(pair: models.Pair, wanted: Arrangement) -> bool:
    return (pair.generation, pair.primary_host, pair.standby_host) == (
        wanted.generation,
        wanted.primary_host,
        wanted.standby_host,
    )


def _side(text: str) -> Side | None:
    if text == "primary":
        return "primary"
    if text == "standby":
        return "standby"
    return None


def _pair(row: models.Pair) -> PairRow:
    return PairRow(**{name: getattr(row, name) for name in PairRow.__dataclass_fields__})


def _host(row: models.Host) -> HostRow:
    return HostRow(**{name: getattr(row, name) for name in HostRow.__dataclass_fields__})


def _event(row: models.Event) -> EventRow:
    return EventRow(**{name: getattr(row, name) for name in EventRow.__dataclass_fields__})
