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

"""The life of a pair on its primary's host: begin, watch, decide, begin again.

The worker runs the rounds. What is here is what must outlive a worker: the claim for one
that died, the end of a guest that lost, and the next generation.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent.control import Pair
from nova_pmt.agent.generation import Beginner
from nova_pmt.agent.host import DomainInfo
from nova_pmt.agent.pairs import Entry
from nova_pmt.agent.parts import Parts
from nova_pmt.agent.prechecks import Prechecks
from nova_pmt.agent.records import Record
from nova_pmt.agent.supervisor import Outcome, Worker

LOG = log.getLogger(__name__)

#: States of a record whose generation the arbiter may not know: no worker of it has lived yet.
_UNANNOUNCED = frozenset({"starting", "reprotecting"})


class Primaries:
    """The pairs whose guest runs here."""

    def __init__(self, parts: Parts, prechecks: Prechecks) -> None:
        self._parts = parts
        self._prechecks = prechecks
        self._beginner = Beginner(parts)

    def protect(
        self, info: DomainInfo, standby_host: str, strategy: str, options: dict[str, float]
    ) -> Entry:
        """Begin a pair; returns when its first synchronisation is under way.

        :raises nova_pmt.exception.Refusal: nothing was changed.
        :raises nova_pmt.exception.PmtError: it failed half-way, and was undone.
        """
        self._prechecks.demand(info, standby_host)
        pair = Pair(
            uuid=info.uuid,
            name=info.name,
            generation=self._beginner.new_generation(info.uuid),
            primary_host=self._parts.name,
            standby_host=standby_host,
        )
        entry = self._parts.pairs.add(Record("primary", pair, strategy, options))
        try:
            worker = self._beginner.start(entry)
        except BaseException as error:
            entry.want("unprotected")
            if not entry.begun or self._beginner.released(entry.pair):
                self._parts.pairs.drop(entry, "unprotected", f"could not begin: {_text(error)}")
            else:
                self._spawn(entry, None)  # its standby may have everything: decide, then let go
            raise
        self._spawn(entry, worker)
        return entry

    def resume(self, record: Record) -> None:
        """Take up a pair that an earlier life of this agent left, in a thread of its own."""
        self._parts.generations.saw(record.pair.uuid, record.pair.generation)
        entry = self._parts.pairs.add(
            replace(record, state="interrupted"), "the agent was restarted"
        )
        entry.announced = record.state not in _UNANNOUNCED
        self._spawn(entry, None)

    def unprotect(self, entry: Entry) -> dict[str, Any]:
        """End protection, and wait until it has ended.

        :raises nova_pmt.exception.PmtError: the pair ended otherwise, or has not ended in time.
        """
        with entry.changed:
            if entry.worker is not None and not entry.begun:
                raise exception.NotReady(
                    f"protection of {entry.uuid} is just being started",
                    cure="Wait some seconds, then try again.",
                )
            entry.want("unprotected")
            self._beginner.pass_on(entry)
            if not entry.changed.wait_for(lambda: entry.gone, self._parts.timing.command_s):
                raise exception.PmtError(
                    f"server {entry.uuid} is still {entry.state}: {entry.reason}",
                    code="UNPROTECT_PENDING",
                    cure="Protection ends as soon as that is decided; see 'nova-pmt status'.",
                )
            if entry.state == "standby_active":
                raise exception.PmtError(
                    f"server {entry.uuid} failed over to {entry.pair.standby_host} before",
                    code="FAILED_OVER",
                    cure="Nothing is left to do here; the server runs there, unprotected.",
                )
            return entry.view(self._parts.name)

    def switch_over(self, entry: Entry) -> dict[str, Any]:
        """Move the running guest to its standby without loss, and wait until that is done.

        :raises nova_pmt.exception.NotReady: the pair is not protected just now.
        :raises nova_pmt.exception.PmtError: it failed; the message tells where the guest runs.
        """
        with entry.changed:
            if entry.state != "protected" or entry.activity is not None or entry.worker is None:
                raise exception.NotReady(
                    f"server {entry.uuid} is {entry.activity or entry.state}: it cannot be moved"
                )
            entry.activity = "switching_over"
            worker, errors = entry.worker, entry.errors
        try:
            # Its standby will have to ask: the guest must not stand still until somebody answers.
            self._parts.arbiter.winner(entry.uuid, entry.pair.generation)
        except exception.ArbiterUnavailable:
            with entry.changed:
                entry.activity = None
            raise
        limit_s = self._parts.timing.command_s
        try:
            worker.command("switchover")
            with entry.changed:
                entry.changed.wait_for(lambda: worker.outcome or entry.errors > errors, limit_s)
            # An error may be the worker's last word; then the final state follows at once.
            outcome = worker.wait(self._parts.timing.stop_s)
        finally:
            with entry.changed:
                entry.activity = None
        if outcome is not None and outcome.state == "standby_active":
            return {**entry.view(self._parts.name), "state": "standby_active",
                    "active_host": entry.pair.standby_host, "details": outcome.details}  # fmt: skip
        if entry.errors > errors and entry.last_error is not None:
            raise entry.last_error
        if outcome is None:
            raise exception.PmtError(
                f"the switchover of {entry.uuid} was not done within {limit_s:g} s",
                code="SWITCHOVER_TIMEOUT",
                cure="See 'nova-pmt status' on both hosts for where the server runs.",
            )
        raise exception.PmtError(
            f"the switchover of {entry.uuid} ended as {outcome.state}: {outcome.reason}",
            code="SWITCHOVER_FAILED",
            cure="The server runs on its old host; protection resumes by itself, then try again.",
        )

    def move_standby(self, entry: Entry, standby_host: str) -> dict[str, Any]:
        """Have the next standby of a guest that runs alone made elsewhere, and begin at once.

        :raises nova_pmt.exception.NotReady: it does not wait for a standby just now.
        :raises nova_pmt.exception.Refusal: it cannot be there.
        """
        self._prechecks.demand_again(entry, standby_host)
        with entry.changed:
            # An attempt with the old host may be under way: it ends, and this one is the next.
            alone = entry.state == "primary_alone" or (
                entry.state == "reprotecting" and entry.worker is None
            )
            if not alone or not entry.wanted:
                raise exception.NotReady(
                    f"server {entry.uuid} is {entry.state}: it gets no new standby"
                )
            entry.next_standby = standby_host
            entry.changed.notify_all()
            return entry.view(self._parts.name)

    # Watching it

    def _spawn(self, entry: Entry, worker: Worker | None) -> None:
        threading.Thread(
            target=self._live, args=(entry, worker), name=f"pair-{entry.uuid}", daemon=True
        ).start()

    def _live(self, entry: Entry, worker: Worker | None) -> None:
        try:
            restarted = worker is None
            while not self._parts.stopping.is_set():
                if worker is None:
                    alone = self._decide(entry, entry.reason)
                else:
                    outcome = worker.wait()
                    if outcome is None or self._parts.stopping.is_set():
                        return  # the record stays: the next life of this agent takes it up
                    alone = self._after(entry, outcome)
                if not alone or not self._stays(entry):
                    return
                worker = self._resynchronise(entry, at_once=restarted)
                restarted = False
                if worker is None:
                    return
        except Exception as error:
            LOG.exception("%s: the watch over this pair failed", entry.uuid)
            entry.last_error = exception.PmtError(f"the agent failed: {error}")
            entry.transition("error", "the agent failed; restart nova-pmt-agent on this host")

    def _after(self, entry: Entry, outcome: Outcome) -> bool:
        """Decide after a worker's end; whether the guest runs here, alone."""
        if outcome.state in ("unprotected", "ended", "cancelled"):
            if outcome.state != "unprotected":  # that one runs on
                self._parts.tidy(entry.uuid)
            self._parts.pairs.drop(entry, outcome.state, outcome.reason, **outcome.details)
            return False
        if outcome.state == "primary_alone":
            return True
        if outcome.state == "standby_active":
            return self._lost(entry, outcome.reason, outcome.details)
        return self._decide(entry, outcome.reason)

    def _decide(self, entry: Entry, reason: str) -> bool:
        """Claim a pair whose worker did not; asks until arbiter and libvirt have answered."""
        uuid, generation = entry.uuid, entry.pair.generation
        parts = self._parts
        while not parts.stopping.is_set():
            try:
                # A claim for a guest that is dead would keep its standby from going on.
                if not parts.host.is_running(uuid):
                    return self._follow(entry, reason)
                if not entry.announced:
                    self._announce(entry)
                if not parts.arbiter.claim(uuid, generation, "primary", reason=reason):
                    return self._lost(entry, reason, {})
                parts.host.recover(uuid)
            except Exception as error:  # noqa: BLE001 - undecided, the guest may stand still
                entry.undecided(entry.failed(error))
                parts.stopping.wait(parts.timing.retry_s)
                continue
            entry.transition("primary_alone", reason)
            return True
        return False

    def _announce(self, entry: Entry) -> None:
        """Begin, at the arbiter, a generation that may not have been begun; nothing hangs on it."""
        with contextlib.suppress(exception.PairMismatch):  # it is over: the claim will say so
            self._beginner.announce(entry)
        entry.announced = True

    def _follow(self, entry: Entry, reason: str) -> bool:
        """The guest is not here any more: watch whether its standby goes on."""
        parts = self._parts
        if entry.state != "failing_over":
            entry.transition("failing_over", f"{reason}; the guest does not run here")
        deadline = parts.clock.monotonic() + parts.timing.follow_s
        while True:
            try:
                if parts.arbiter.winner(entry.uuid, entry.pair.generation) == "standby":
                    return self._lost(entry, reason, {})
            except exception.ArbiterUnavailable:
                # Its standby may be asking in vain, too: only an answer brings us nearer to the end
                deadline = parts.clock.monotonic() + parts.timing.follow_s
            if parts.clock.monotonic() >= deadline:
                break
            if parts.stopping.wait(min(parts.timing.retry_s, parts.timing.follow_s)):
                return False
        parts.pairs.drop(
            entry,
            "ended",
            f"{reason}; the guest does not run here and no standby went on",
            undecided=True,
        )
        return False

    def _lost(self, entry: Entry, reason: str, details: dict[str, Any]) -> bool:
        """The standby won: what is left of the guest here is destroyed, for there is only one."""
        parts = self._parts
        while not parts.stopping.is_set():
            try:
                if parts.host.is_running(entry.uuid):
                    LOG.warning(
                        "%s: lost to %s: destroyed here", entry.uuid, entry.pair.standby_host
                    )
                    parts.host.destroy(entry.uuid)
            except Exception as error:  # noqa: BLE001 - two would run
                entry.undecided(entry.failed(error))
                parts.stopping.wait(parts.timing.retry_s)
                continue
            parts.tidy(entry.uuid)
            where = entry.pair.standby_host
            parts.pairs.drop(entry, "standby_active", f"{reason}; runs on {where}", **details)
            return False
        return False

    # Protecting again

    def _stays(self, entry: Entry) -> bool:
        """Whether a guest that runs alone is to be protected again; otherwise let go of it."""
        if entry.wanted and self._parts.resync:
            return True
        try:
            self._parts.host.let_go(entry.uuid)
        except Exception as error:  # noqa: BLE001 - the guest runs on all the same
            left = entry.failed(error)
            LOG.warning("%s: something is left of its protection: %s", entry.uuid, left)
        if not entry.wanted:
            self._parts.pairs.drop(entry, "unprotected", "on request")
        else:
            self._parts.pairs.drop(entry, "primary_alone", f"{entry.reason}; [agent] resync is off")
        self._beginner.released(entry.pair, forget=True)
        return False

    def _resynchronise(self, entry: Entry, at_once: bool) -> Worker | None:
        """Try until it is protected again; None when there is nothing to protect any more."""
        parts = self._parts
        while True:
            if not at_once and not self._back_off(entry):
                return None
            at_once = False
            if not self._stays(entry):
                return None
            entry.failures += 1
            try:
                if not parts.host.is_running(entry.uuid):
                    parts.tidy(entry.uuid)
                    parts.pairs.drop(entry, "ended", "the guest was shut down while unprotected")
                    return None
                old = entry.pair
                standby_host = entry.next_standby or old.standby_host
                self._prechecks.demand_again(entry, standby_host)
                generation = self._beginner.new_generation(entry.uuid)
                with entry.changed:  # nobody may see the new generation in the old one's state
                    entry.rearrange(Pair(old.uuid, old.name, generation, parts.name, standby_host))
                    entry.next_standby = None
                    entry.transition("reprotecting", f"attempt {entry.failures}")
                return self._beginner.start(entry)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next may succeed
                if parts.stopping.is_set():
                    return None
                failure = entry.failed(error)
                LOG.warning("%s: cannot be protected again yet: %s", entry.uuid, failure)
                if entry.begun and not self._decide(entry, failure.message):
                    return None

    def _back_off(self, entry: Entry) -> bool:
        """Wait before an attempt, visibly; false when the agent shuts down."""
        parts, timing = self._parts, self._parts.timing
        wait_s = min(timing.resync_s * 2 ** min(entry.failures, 30), timing.resync_max_s)
        with entry.changed:
            error = entry.last_error
            reason = f"next attempt in {wait_s:g} s"
            if error is not None:
                reason = f"{error.message} [{error.code}]; {reason}"
            if entry.state != "primary_alone":
                entry.transition("primary_alone", reason)
            entry.explain(reason)
            entry.next_attempt = parts.clock.monotonic() + wait_s
            deadline = entry.next_attempt
            # Woken by what an operator wants; looks up now and then whether the agent stops.
            while not parts.stopping.is_set() and entry.wanted:
                left_s = deadline - parts.clock.monotonic()
                if left_s <= 0 or entry.next_standby is not None:
                    break
                entry.changed.wait(min(left_s, 1.0))
            entry.next_attempt = None
        return not parts.stopping.is_set()


def _text(error: BaseException) -> str:
    return error.message if isinstance(error, exception.PmtError) else str(error)
