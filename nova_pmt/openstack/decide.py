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

"""What is to be done next about a server: a pure function of all that is known of it.

It never plans ahead. Whatever happened meanwhile, and whoever did it, the next step from there is
found again; so nothing is lost with a manager that dies, or with a notification.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nova_pmt.manager import states
from nova_pmt.manager.db.api import PairRow
from nova_pmt.manager.db.nova import Note
from nova_pmt.openstack.clients import Server
from nova_pmt.openstack.policy import Wish

Action = Literal[
    "wait",  # somebody else is at it, or nothing can be done now
    "nothing",  # all is as it is to be
    "forget",  # it is no concern of ours any more
    "failover",  # Nova has to be told where it runs
    "create",  # a standby server
    "delete",  # standby servers
    "failed",  # the same, of one that Nova could not make
    "protect",  # order its agent to
    "move",  # order its agent to have the standby elsewhere
    "unprotect",  # order its agent to
    "release",  # its pair has ended, and there is no agent that could say so
]
#: In these a server keeps its standby's room: it comes back as it was.
_KEEPS_STANDBY = frozenset(
    # (ERROR is Nova's record: the server itself may well run, and be protected.)
    {"ACTIVE", "SHUTOFF", "PAUSED", "SUSPENDED", "REBOOT", "HARD_REBOOT", "ERROR"}
)


@dataclass(frozen=True)
class Facts:
    """All that is known.

    :param server: None: there is none any more.
    :param wish: what it is to have.
    :param pair: None: it never was in one.
    :param standbys: standby servers that are there, the one of the note first.
    :param alive: hosts whose agents are heard.
    :param order: how it would be protected now; compared with the note's ``ordered``.
    """

    server: Server | None
    wish: Wish
    pair: PairRow | None
    note: Note
    standbys: Sequence[Server]
    alive: Collection[str]
    order: str = ""


@dataclass(frozen=True)
class Step:
    """What to do.

    :param targets: of ``delete``: UUIDs; of ``protect`` and ``move``: the standby's host.
    """

    action: Action
    reason: str = ""
    targets: tuple[str, ...] = ()


def decide(facts: Facts) -> Step:
    """The next step."""
    # (Nova may not get to it while the standby's host is away: it is as good as gone.)
    standbys = tuple(one for one in facts.standbys if one.task_state != "deleting")
    facts = replace(facts, standbys=standbys)
    server, pair, note = facts.server, facts.pair, facts.note
    if server is None:
        return _gone(facts)
    if pair is not None and has_moved(pair, note):
        known = (pair.primary_host, pair.standby_host, note.source, note.target)
        if server.host not in known:
            text = f"Nova says that it runs on {server.host or 'no host'}, and it went on on"
            return Step("wait", f"{text} {pair.standby_host}: an operator has to decide")
        return Step("failover", f"it runs on {pair.standby_host}")
    if note.step:
        return Step("failover", f"it runs on {note.target}")
    extra = facts.standbys[1:]
    if extra:
        return Step("delete", "it has more than one", tuple(one.uuid for one in extra))
    if server.task_state:
        return Step("wait", f"Nova is at it: {server.task_state}")
    if not facts.wish.wanted:
        return _unwanted(facts, server)
    if server.status not in _KEEPS_STANDBY:
        return _without_standby(facts, f"the server is {server.status}")
    if server.status != "ACTIVE":
        return Step("nothing", f"the server is {server.status}")
    if server.host not in facts.alive:
        return Step("wait", f"the agent of {server.host} is silent")
    return _wanted(facts, server)


#: Why a deleted server is forgotten.
GONE = "the server is gone"


def has_moved(pair: PairRow, note: Note) -> bool:
    """Its standby won, and nobody began to tell Nova of it.

    Not whether Nova says another host: a server that failed over may be migrated afterwards.
    """
    if pair.winner != "standby" or pair.generation == note.generation:
        return False
    return pair.state in ("failing_over", "standby_active")


def _gone(facts: Facts) -> Step:
    """The server was deleted: what it had goes, too."""
    if facts.standbys:
        uuids = tuple(one.uuid for one in facts.standbys)
        return Step("delete", "its server is gone", uuids)
    return Step("forget", GONE)


def _open(pair: PairRow | None) -> bool:
    """It is, or may be, in a pair."""
    return pair is not None and pair.state != "unprotected"


def _unwanted(facts: Facts, server: Server) -> Step:
    reason = facts.wish.ignored or "nobody asks for it"
    if facts.pair is not None and _open(facts.pair):
        if not facts.note.ordered:
            # An operator protects it by hand. (Kept in mind: of which failover Nova knows.)
            return Step("nothing")
        if facts.pair.active_host not in facts.alive:
            return Step("wait", f"the agent of {facts.pair.active_host} is silent")
        return Step("unprotect", reason)
    return _without_standby(facts, reason)


def _without_standby(facts: Facts, reason: str) -> Step:
    if facts.standbys:
        return Step("delete", reason, tuple(one.uuid for one in facts.standbys))
    if facts.wish.wanted or facts.wish.ignored:
        return Step("nothing", reason)
    return Step("forget", reason)


def _wanted(facts: Facts, server: Server) -> Step:
    pair = facts.pair
    if not facts.standbys:
        return Step("create", "it has no standby server")
    standby = facts.standbys[0]
    if standby.status == "ERROR":
        return Step("failed", f"its standby failed: {standby.fault}", (standby.uuid,))
    in_pair = pair is not None and pair.state in states.OPEN
    if standby.flavor != server.flavor:
        if in_pair:
            return Step("unprotect", f"its flavor is {server.flavor} now")
        return Step("delete", f"its flavor is {server.flavor} now", (standby.uuid,))
    if standby.task_state or standby.status != "ACTIVE" or not standby.host:
        return Step("wait", f"its standby is {standby.status} {standby.task_state}".strip())
    if standby.host == server.host:
        return Step("delete", f"the server is on {server.host} itself now", (standby.uuid,))
    protected = (
        pair is not None
        and pair.state in states.OPEN
        and (pair.primary_host, pair.standby_host) == (server.host, standby.host)
    )
    if protected:
        if facts.note.ordered not in ("", facts.order):
            return Step("unprotect", f"it is to be protected otherwise: {facts.order}")
        return Step("nothing")
    if standby.host not in facts.alive:
        return Step("delete", f"the agent of {standby.host} is silent", (standby.uuid,))
    if pair is None or pair.state == "unprotected":
        return Step("protect", "", (standby.host,))
    if pair.state == "failing_over":
        return Step("wait", "its standby is going on")
    if pair.active_host != server.host:
        # It was moved: its pair ended, or ends now.
        reason = f"it runs on {server.host}, and its pair says {pair.active_host}"
        return Step("unprotect" if pair.active_host in facts.alive else "release", reason)
    if pair.state == "primary_alone" and pair.wanted and pair.standby_host == standby.host:
        return Step("wait", f"its agent is at it: {pair.reason}")
    if pair.state == "primary_alone":
        return Step("move", "", (standby.host,))
    if pair.state in states.OPEN:
        return Step("unprotect", f"its standby is to be on {standby.host}")
    return Step("protect", "", (standby.host,))
