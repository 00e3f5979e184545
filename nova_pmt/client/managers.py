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

"""What is asked of the managers: pairs, hosts, the audit trail, maintenance."""

from __future__ import annotations

import itertools
from typing import Any

from nova_pmt import exception
from nova_pmt.client import render
from nova_pmt.client.session import STATUS_OK, Session

_WATCH_S = 1.0
#: Lines that are asked for at once while watching; a manager gives no more.
_PAGE = 1000
#: Two managers may write a smaller number after a greater one: we look back so far.
_OVERLAP = 100
#: Looks without an answer, one after the other, until watching is given up.
_MAX_FAILURES = 30


def pairs(session: Session) -> int:
    """``pairs``."""
    args = session.args
    found = session.ask_managers(lambda managers: managers.pairs(args.host, args.state))
    if session.json:
        session.give({"pairs": found})
        return STATUS_OK
    session.out.print(render.pairs_table(found))
    if not found:
        session.say("no pairs")
    return STATUS_OK


def hosts(session: Session) -> int:
    """``hosts``."""
    found = session.ask_managers(lambda managers: managers.hosts())
    if session.json:
        session.give({"hosts": found})
        return STATUS_OK
    session.out.print(render.hosts_table(found))
    if not found:
        session.say("no hosts: no agent was heard by a manager")
    return STATUS_OK


def maintenance(session: Session) -> int:
    """``maintenance``: no new standbys on a host, or again."""
    host, on = session.args.target, session.args.on
    session.ask_managers(lambda managers: managers.maintain(host, on))
    rows = session.ask_managers(lambda managers: managers.hosts())
    row = next((row for row in rows if row["name"] == host), {"name": host, "maintenance": on})
    if session.json:
        session.give(row)
        return STATUS_OK
    session.say(f"{host}: {'in maintenance' if on else 'in service'}")
    if on and (row.get("primaries") or row.get("standbys")):
        session.say(
            f"  {row['primaries']} guests of pairs and {row['standbys']} standbys are still there; "
            f"'nova-pmt evacuate-host {host}' moves the guests"
        )
    return STATUS_OK


def events(session: Session) -> int:
    """``events``: the last lines of the audit trail; with ``--watch`` those that follow, too."""
    args = session.args
    if args.watch:
        return _watch(session)
    found = session.ask_managers(lambda managers: managers.events(args.domain, 0, args.limit))
    if session.json:
        session.give({"events": found})
        return STATUS_OK
    session.out.print(render.events_table(found))
    if not found:
        session.say("no events")
    return STATUS_OK


def _watch(session: Session) -> int:
    """One line for each event, until Ctrl-C or for so many looks."""
    trail, failures, count = _Trail(session.args.limit), 0, session.args.iterations
    for turn in range(count) if count else itertools.count():
        if turn:
            session.sleep(_WATCH_S)
        try:
            found = _look(session, trail)
            failures = 0
        except (exception.HostUnreachable, exception.ArbiterUnavailable) as error:
            failures += 1
            if turn == 0 or failures >= _MAX_FAILURES:
                raise
            if failures == 1:
                session.complain(error)
            continue
        for event in found:
            if session.json:
                session.give_line(event)
            else:
                session.say(render.event_line(event))
                session.out.file.flush()
    return STATUS_OK


def _look(session: Session, trail: _Trail) -> list[dict[str, Any]]:
    domain, after, limit = session.args.domain, trail.after, trail.limit
    found = session.ask_managers(lambda managers: managers.events(domain, after, limit))
    return trail.new(found)


class _Trail:
    """Which lines were shown.

    :param limit: how many of those that are there already.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.after = 0
        self._seen: set[int] = set()
        self._floor: int | None = None

    def new(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of these lines that were not shown yet."""
        if self._floor is None:
            # What is older than the first lines was left out on purpose.
            self._floor = found[0]["id"] - 1 if len(found) == self.limit else 0
        fresh = [one for one in found if one["id"] > self._floor and one["id"] not in self._seen]
        self._seen.update(one["id"] for one in fresh)
        # A full page has no end of its own: go on right behind it.
        last = max(self._seen, default=0)
        full = self.limit == _PAGE and len(found) == _PAGE
        self.after = last if full else max(0, last - _OVERLAP)
        self.limit = _PAGE
        self._seen = {number for number in self._seen if number > last - _OVERLAP}
        return fresh
