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

"""What each command of ``nova-pmt`` does. All raise :class:`nova_pmt.exception.PmtError`."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.live import Live

from nova_pmt import exception
from nova_pmt.agent import inputs
from nova_pmt.client import evacuate, hosts, managers, progress, render
from nova_pmt.client.session import (
    STATUS_OK,
    STATUS_REFUSED,
    STATUS_USAGE,
    Session,
    exit_status,
)

_REFRESH_S = 0.5


def check(session: Session) -> int:
    """``check``: reasons on stderr, the verdict on stdout."""
    args = session.args
    found = session.api.check(session.host(), args.domain, args.standby)
    if session.json:
        session.give(found)
        return STATUS_OK if found["ok"] else STATUS_REFUSED
    domain = found["domain"]
    name = f"{domain['name']} ({domain['uuid']}) on {found['host']}"
    for warning in found["warnings"]:
        session.say(f"warning: {warning}")
    for refusal in found["refusals"]:
        session.complain(exception.from_dict(refusal))
    where = f" with its standby on {args.standby}" if args.standby else ""
    verdict = "can be protected" if found["ok"] else "cannot be protected"
    session.say(f"{name} {verdict}{where}")
    return STATUS_OK if found["ok"] else STATUS_REFUSED


def protect(session: Session) -> int:
    """``protect``: begin, then show the first synchronisation until it is done."""
    args = session.args
    wishes = {
        name: getattr(args, name)
        for name in inputs.OPTION_BOUNDS
        if getattr(args, name) is not None
    }
    host = session.host()
    pair = session.api.protect(host, args.domain, args.standby, args.strategy, wishes)
    if not args.no_wait:
        uuid = pair["uuid"]
        try:
            pair = progress.wait(
                lambda: session.api.status(host, uuid), session.err, args.timeout, session.sleep
            )
        except KeyboardInterrupt:
            session.say(f"{pair['name']}: the synchronisation goes on; see 'nova-pmt status'")
            raise
    if session.json:
        session.give(pair)
    else:
        session.say(
            f"{pair['name']} ({pair['uuid']}): {pair['state']}, "
            f"{pair['primary_host']} -> {pair['standby_host']}"
        )
    return STATUS_OK


def unprotect(session: Session) -> int:
    """``unprotect``."""
    host = session.host()
    try:
        pair = session.api.unprotect(host, session.args.domain)
    except exception.NotProtected:
        if session.managers is None:
            raise
        # It went on here, and waits for the managers to protect it again.
        pair = session.managers.release(session.args.domain) | {"host": host}
    if session.json:
        session.give(pair)
    else:
        session.say(
            f"{pair['name']} ({pair['uuid']}): {pair['state']}; it runs on, on {pair['host']}"
        )
    return STATUS_OK


def list_pairs(session: Session) -> int:
    """``list``."""
    answers = session.ask(session.api.list)
    pairs = [
        {**pair, "host": host}
        for host, answer in answers.results.items()
        for pair in answer["pairs"]
    ]
    if session.json:
        session.give({"pairs": pairs, "errors": _errors(answers)})
    else:
        session.out.print(render.short_table(pairs))
        if not pairs and answers.results:
            session.say("no pairs")
    return _report(session, answers)


def status(session: Session) -> int:
    """``status``: every pair in full, and what became of those that are no more."""
    domain = session.args.domain
    answers = session.ask(lambda host: session.api.status(host, domain))
    pairs = [pair for answer in answers.results.values() for pair in answer["pairs"]]
    recent = [pair for answer in answers.results.values() for pair in answer["recent"]]
    if domain is not None:
        _forgive(answers)
    if session.json:
        session.give({"pairs": pairs, "recent": recent, "errors": _errors(answers)})
        return _report(session, answers)
    for pair in pairs:
        session.out.print(render.status_table(pair))
        session.out.print()
    if recent:
        session.say("earlier:")
    for pair in recent:
        session.say(
            f"  {render.moment(pair['since'])} {pair['name']} ({pair['uuid']}) on {pair['host']}: "
            f"{pair['state']}, {pair['primary_host']} -> {pair['standby_host']}; {_story(pair)}"
        )
    if not pairs and not recent and answers.results:
        session.say("no pairs")
    return _report(session, answers)


def top(session: Session) -> int:
    """``top``: live on a terminal, one table after the other elsewhere."""
    args = session.args
    count = 1 if args.once else args.iterations
    answers = hosts.Answers()
    with contextlib.ExitStack() as stack:
        live = None
        if session.out.is_terminal and not session.json and count != 1:
            live = Live(console=session.out, auto_refresh=False, screen=count is None)
            stack.enter_context(live)
        for turn in range(count) if count else itertools.count():
            if turn:
                session.sleep(_REFRESH_S)
            answers = session.ask(lambda host: session.api.status(host, None))
            _show_top(session, answers, live)
    return _report(session, answers)


def _show_top(session: Session, answers: hosts.Answers, live: Live | None) -> None:
    pairs = [
        pair
        for answer in answers.results.values()
        for pair in answer["pairs"]
        if pair["role"] == "primary"
    ]
    if session.json:
        rows = [render.top_row(pair) for pair in pairs]
        session.give({"pairs": rows, "errors": _errors(answers)})
        return
    table = render.top_table(pairs)
    if live is None:
        session.out.print(table)
        return
    if answers.errors:
        table.caption = render.cell(f"no answer: {', '.join(answers.errors)}", "red")
    live.update(table, refresh=True)


def failover(session: Session) -> int:
    """``failover``: planned on the primary's host, forced on the standby's."""
    args = session.args
    host = session.host("standby" if args.force else "primary")
    if not args.yes and not _agreed(session, host):
        return STATUS_USAGE
    begun = time.monotonic()
    done = session.api.failover(host, args.domain, args.force)
    took_s = time.monotonic() - begun
    if session.json:
        session.give(done)
    else:
        session.say(
            f"{done['name']} ({done['uuid']}) runs on {done['active_host']}, after {took_s:.1f} s"
        )
        for key, value in (done.get("details") or {}).items():
            session.say(f"  {key}: {value}")
    return STATUS_OK


def _agreed(session: Session, host: str) -> bool:
    if not (sys.stdin.isatty() and session.err.is_terminal):
        session.complain(
            exception.PmtError(
                "failover asks before it acts, and there is no terminal to ask on",
                code="USAGE",
                cure="Add --yes.",
            )
        )
        return False
    what = "take over by force from" if session.args.force else "move away from"
    session.err.print(
        render.clean(f"{session.args.domain}: {what} its primary (ask {host})? [y/N] "),
        markup=False, highlight=False, end="",
    )  # fmt: skip
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _story(pair: dict[str, Any]) -> str:
    details = ", ".join(f"{key} {value}" for key, value in (pair.get("details") or {}).items())
    return "; ".join(text for text in (pair.get("reason"), details) if text) or "no more is known"


def _forgive(answers: hosts.Answers) -> None:
    """A host that knows nothing of a domain is no error when another one does."""
    strangers = (exception.UnknownDomain, exception.NotProtected)
    others = {host: e for host, e in answers.errors.items() if isinstance(e, strangers)}
    if not answers.results and others:
        # 'not protected' says more than 'unknown here': one of them, not one for each host
        best = max(others, key=lambda host: isinstance(others[host], exception.NotProtected))
        others.pop(best)
    for host in others:
        del answers.errors[host]


def _errors(answers: hosts.Answers) -> dict[str, Any]:
    return {host: error.to_dict() for host, error in answers.errors.items()}


def _report(session: Session, answers: hosts.Answers) -> int:
    """Hosts that could not answer, and the exit status that follows."""
    for error in answers.errors.values():
        session.complain(error)
    return max((exit_status(error) for error in answers.errors.values()), default=STATUS_OK)


COMMANDS: dict[str, Callable[[Session], int]] = {
    "check": check,
    "protect": protect,
    "unprotect": unprotect,
    "list": list_pairs,
    "status": status,
    "top": top,
    "failover": failover,
    "pairs": managers.pairs,
    "hosts": managers.hosts,
    "events": managers.events,
    "maintenance": managers.maintenance,
    "evacuate-host": evacuate.evacuate_host,
}
