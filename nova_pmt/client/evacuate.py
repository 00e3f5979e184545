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

"""``nova-pmt evacuate-host``: a planned move of every protected guest of a host to its standby.

Can be asked again, and at the same time by two: what is done is done, and a move that somebody else
began is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nova_pmt import exception
from nova_pmt.client.session import STATUS_FAILED, STATUS_OK, Session

_POLL_S = 1.0
#: Moves of one guest that fail until it is left where it is.
_MAX_ATTEMPTS = 3
#: What an agent calls a pair that it is about to let go of.
_OVER = frozenset({"standby_active", "unprotected", "ended", "cancelled"})


@dataclass
class _Guest:
    """A guest of a pair, on the host that is to be emptied."""

    uuid: str
    name: str
    state: str
    standby_host: str
    reason: str = ""
    attempts: int = 0
    error: exception.PmtError | None = None

    @property
    def title(self) -> str:
        return f"{self.name} ({self.uuid})"

    def view(self) -> dict[str, Any]:
        return {
            "uuid": self.uuid,
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "attempts": self.attempts,
            "error": self.error.to_dict() if self.error else None,
        }


@dataclass
class _Move:
    """One planned move, in a thread of its own: Ctrl-C must not wait for it."""

    guest: _Guest
    begun: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    answer: dict[str, Any] | None = None
    error: exception.PmtError | None = None
    done: bool = False


def evacuate_host(session: Session) -> int:
    """Maintenance on, then move; what is left at the end is named."""
    host = session.args.target
    session.ask_managers(lambda managers: managers.maintain(host, True))
    session.note(f"{host}: in maintenance")
    work = _Evacuation(session, host)
    try:
        work.run()
    except KeyboardInterrupt:
        for move in work.moves:
            session.note(f"{move.guest.title}: its move goes on; see 'nova-pmt status'")
        raise
    return _report(session, host, work)


class _Evacuation:
    """The guests of one host, and their moves."""

    def __init__(self, session: Session, host: str) -> None:
        self.moves: list[_Move] = []
        self.moved: list[_Move] = []
        self.left: list[_Guest] = []
        self.standbys: list[dict[str, Any]] = []
        self._session = session
        self._host = host
        self._guests: dict[str, _Guest] = {}
        self._shown: dict[str, str] = {}
        self._strangers: set[str] = set()
        self._silent = False

    def run(self) -> None:
        """Until nothing is left to do, or the time is over; moves under way come to their end.

        :raises nova_pmt.exception.PmtError: the managers or the host's agent do not answer: at the
            beginning, or at the end of the time.
        """
        deadline = time.monotonic() + self._session.args.timeout
        self._look(tolerant=False)
        while True:
            over = time.monotonic() >= deadline
            if not over:
                self._begin()
            elif not self.moves:
                return
            if not self.moves and not self._hopeful():
                return
            self._session.sleep(_POLL_S)
            self._collect()
            self._look(tolerant=time.monotonic() < deadline or bool(self.moves))

    def _look(self, tolerant: bool) -> None:
        """See who is there."""
        try:
            rows = self._session.ask_managers(lambda managers: managers.pairs(self._host))
            listed = self._session.api.list(self._host)["pairs"]
        except (exception.HostUnreachable, exception.ArbiterUnavailable) as error:
            if not tolerant:
                raise
            if not self._silent:
                self._session.complain(error)
            self._silent = True
            return
        self._silent = False
        self.standbys = [row for row in rows if _waits(row, self._host)]
        there = {row["uuid"]: row for row in rows if _runs(row, self._host)}
        # What the managers do not know of the host knows: it must not be left behind unseen.
        known = {row["uuid"] for row in rows}
        for pair in listed:
            if pair["role"] != "primary" or pair["state"] in _OVER:
                continue
            if pair["uuid"] not in known:
                there[pair["uuid"]] = pair
        self._take(there)

    def _take(self, there: Mapping[str, Mapping[str, Any]]) -> None:
        for uuid in set(self._guests) - set(there):
            del self._guests[uuid]
        for uuid, row in there.items():
            guest = self._guests.setdefault(uuid, _Guest(uuid, row["name"], "", ""))
            guest.state, guest.reason = row["state"], row["reason"]
            guest.standby_host = row["standby_host"]
        # (One that was moved is seen there until everybody has heard of it.)
        busy = {move.guest.uuid for move in (*self.moves, *self.moved)} | self._strangers
        self.left = [guest for guest in self._guests.values() if guest.uuid not in busy]
        for guest in self.left:
            if guest.state != "protected" and self._shown.get(guest.uuid) != guest.state:
                self._session.note(f"{guest.title}: waits: it is {guest.state}; {guest.reason}")
            self._shown[guest.uuid] = guest.state

    def _hopeful(self) -> bool:
        """Whether waiting may bring more."""
        return any(guest.attempts < _MAX_ATTEMPTS for guest in self.left)

    def _begin(self) -> None:
        for guest in list(self.left):
            if len(self.moves) >= self._session.args.at_once:
                return
            if guest.state == "protected" and guest.attempts < _MAX_ATTEMPTS:
                guest.attempts += 1
                self.left.remove(guest)
                move = _Move(guest)
                self.moves.append(move)
                self._session.note(f"{guest.title}: moves, {self._host} -> {guest.standby_host}")
                threading.Thread(target=self._do, args=(move,), daemon=True).start()

    def _do(self, move: _Move) -> None:
        try:
            move.answer = self._session.api.failover(self._host, move.guest.uuid)
        except exception.PmtError as error:
            move.error = error
        except Exception as error:  # noqa: BLE001 - whoever waits for it must learn of it
            move.error = exception.PmtError(f"the move failed: {error!r}", code="INTERNAL")
        move.took_s = time.monotonic() - move.begun
        move.done = True

    def _collect(self) -> None:
        """Take note of moves that have ended."""
        for move in [move for move in self.moves if move.done]:
            self.moves.remove(move)
            guest, error = move.guest, move.error
            if error is None:
                self.moved.append(move)
                where = (move.answer or {}).get("active_host")
                self._session.note(f"{guest.title}: runs on {where}, after {move.took_s:.1f} s")
                continue
            if isinstance(error, exception.UnknownDomain):
                self._strangers.add(guest.uuid)  # the managers' memory is older than the truth
            if isinstance(error, exception.NotReady):
                guest.attempts -= 1  # somebody else is at it, or it broke just now
            if guest.error is None or guest.error.message != error.message:
                text = f"was not moved: {error.message} [{error.code}]"
                self._session.note(f"{guest.title}: {text}")
            guest.error = error


def _runs(row: Mapping[str, Any], host: str) -> bool:
    """Whether the guest of this pair is on the host, as far as the managers know."""
    return bool(row["active_host"] == host and row["state"] != "unprotected")


def _waits(row: Mapping[str, Any], host: str) -> bool:
    """Whether the host has the pair's standby."""
    return bool(row["standby_host"] == host and not row["winner"])


def _report(session: Session, host: str, work: _Evacuation) -> int:
    status = STATUS_FAILED if work.left else STATUS_OK
    if session.json:
        session.give(
            {
                "host": host,
                "moved": [
                    {
                        "uuid": move.guest.uuid,
                        "name": move.guest.name,
                        "active_host": (move.answer or {}).get("active_host"),
                        "took_s": round(move.took_s, 1),
                    }
                    for move in work.moved
                ],
                "left": [guest.view() for guest in work.left],
                "standbys": work.standbys,
            }
        )
    else:
        session.say(f"{host}: {len(work.moved)} guests moved, {len(work.left)} left")
        for guest in work.left:
            why = f"{guest.error.message} [{guest.error.code}]" if guest.error else guest.reason
            session.say(f"  left: {guest.title}: {guest.state}; {why or 'no more is known'}")
        for row in work.standbys:
            session.say(
                f"  standby: {row['name']} ({row['uuid']}) of {row['primary_host']}: it gets "
                f"another one when {host} goes"
            )
    if work.left:
        session.complain(
            exception.PmtError(
                f"{len(work.left)} guests of pairs are still on {host}",
                code="HOST_NOT_EMPTY",
                cure="See 'nova-pmt pairs --host' for what they wait for, then run the command "
                "again; it goes on where it was.",
            )
        )
    return status
