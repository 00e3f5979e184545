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

"""The life of a pair on its standby's host: prepare, watch, clean up."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import pairs
from nova_pmt.agent.control import Pair, StandbySpec
from nova_pmt.agent.pairs import Entry
from nova_pmt.agent.parts import Parts
from nova_pmt.agent.records import Record
from nova_pmt.agent.supervisor import Outcome, Worker

LOG = log.getLogger(__name__)


class Standbys:
    """The pairs whose guest waits here."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def check(
        self,
        uuid: str,
        memory_bytes: int,
        arbiter_token: str,
        primary_host: str,
        disks: list[dict[str, Any]],
    ) -> list[exception.PmtError]:
        """Why this host cannot hold that standby now; changes nothing."""
        parts = self._parts
        try:
            entry = parts.pairs.settled(uuid, parts.timing.settle_s)
            if entry is not None and not self._replaceable(entry):
                return [pairs.already_protected(entry)]
            if parts.host.is_running(uuid):
                return [self._duplicate(uuid)]
            # A standby that is replaced gives its memory back first; the check is on the safe side.
            found: list[exception.PmtError] = list(
                parts.host.check_standby(uuid, memory_bytes, disks)
            )
            if not parts.arbiter.answer(uuid, arbiter_token):
                found.append(
                    exception.ArbiterUnavailable(
                        f"{parts.name} does not see what {primary_host} left at the arbiter: "
                        "they do not share one"
                    )
                )
            return found
        except exception.PmtError as error:
            return [error]

    def prepare(
        self,
        pair: Pair,
        domain_xml: str,
        layout: list[dict[str, Any]],
        disks: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Start a standby and wait until it listens.

        :returns: ``address`` and ``port``.
        :raises nova_pmt.exception.PmtError: it failed and nothing is left of it.
        """
        parts = self._parts
        entry = parts.pairs.settled(pair.uuid, parts.timing.settle_s)
        if entry is not None:
            self._replace(entry, pair)
        if pair.generation <= parts.generations.last(pair.uuid):
            raise exception.PairMismatch(
                f"generation {pair.generation} of {pair.uuid} is not newer than what "
                f"{parts.name} has seen"
            )
        if parts.host.is_running(pair.uuid):
            raise self._duplicate(pair.uuid)
        parts.host.cleanup_standby(pair.uuid, pair.generation)
        parts.generations.saw(pair.uuid, pair.generation)
        entry = parts.pairs.add(Record("standby", pair))
        try:
            worker = parts.supervisor.start(
                StandbySpec(pair, domain_xml, layout, disks), entry.on_event, entry.on_exit
            )
        except exception.PmtError as error:
            parts.pairs.drop(entry, "cancelled", error.message)
            raise
        entry.worker = worker
        # From here on its end, however it comes, is cleaned up after by its watch.
        threading.Thread(
            target=self._live, args=(entry, worker), name=f"standby-{entry.uuid}", daemon=True
        ).start()
        return self._await_ready(entry, worker)

    def release(self, uuid: str, generation: int, forget: bool) -> dict[str, Any]:
        """End a standby of that generation or an older one.

        :param forget: delete the images of its disks, too.
        :returns: ``gone``: that there is none which could still go on.
        """
        entry = self._parts.pairs.get(uuid)
        if entry is None or entry.record.role != "standby":
            gone = not self._parts.host.is_running(uuid)
        elif entry.pair.generation > generation:
            return {"gone": True}
        else:
            gone = self._end(entry)
        if gone and forget:
            self._parts.host.forget_images(uuid)
        return {"gone": gone}

    def take_over(self, entry: Entry) -> dict[str, Any]:
        """An operator's order to go on here; the arbiter has the last word.

        :raises nova_pmt.exception.NotReady: there is no checkpoint to go on from, or it is busy.
        :raises nova_pmt.exception.PmtError: it did not go on; the message tells why.
        """
        with entry.changed:
            if entry.state != "protected" or entry.activity is not None or entry.worker is None:
                raise exception.NotReady(
                    f"the standby of {entry.uuid} is {entry.activity or entry.state} "
                    "and cannot be told to take over now"
                )
            entry.activity = "taking_over"
            worker = entry.worker
        try:
            worker.command("takeover")
            outcome = worker.wait(self._parts.timing.command_s)
        finally:
            with entry.changed:
                entry.activity = None
        if outcome is not None and outcome.state == "standby_active":
            return {**entry.view(self._parts.name), "state": "standby_active",
                    "active_host": self._parts.name, "details": outcome.details}  # fmt: skip
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        how = "is not done yet" if outcome is None else f"ended as {outcome.state}"
        why = "" if outcome is None else f": {outcome.reason}"
        raise exception.PmtError(
            f"the takeover of {entry.uuid} {how}{why}",
            code="TAKEOVER_FAILED",
            cure="See 'nova-pmt status' on both hosts for where the server runs.",
        )

    def resume(self, record: Record) -> None:
        """Clean up what an earlier life of this agent left; the primary asks again by itself."""
        self._parts.generations.saw(record.pair.uuid, record.pair.generation)
        entry = self._parts.pairs.add(replace(record, state="interrupted"))
        threading.Thread(
            target=self._clean_up,
            args=(entry, "the agent was restarted"),
            name=f"clean-{entry.uuid}",
            daemon=True,
        ).start()

    def _await_ready(self, entry: Entry, worker: Worker) -> dict[str, Any]:
        limit_s = self._parts.timing.worker_start_s
        with entry.changed:
            entry.changed.wait_for(lambda: entry.ready or worker.outcome, limit_s)
            ready = entry.ready
            if ready is not None and worker.outcome is None:
                if entry.state == "starting":
                    entry.transition("waiting", f"for {entry.pair.primary_host}")
                return {
                    "address": str(ready.get("address") or self._parts.address),
                    "port": int(ready["port"]),
                }
        worker.stop(self._parts.timing.stop_s)
        outcome = worker.outcome
        if outcome is not None and outcome.error is not None and entry.last_error is not None:
            raise outcome.error
        raise exception.WorkerDied(
            f"the standby worker of {entry.uuid} on {self._parts.name} was not ready "
            f"within {limit_s:g} s"
        )

    def _replaceable(self, entry: Entry) -> bool:
        """A standby that no generation of its own can save any more, or that has not begun."""
        return entry.record.role == "standby" and entry.state not in (
            "failing_over",
            "standby_active",
        )

    def _replace(self, entry: Entry, pair: Pair) -> None:
        """End an older standby of the same server before a newer one is made."""
        if not self._replaceable(entry):
            raise pairs.already_protected(entry)
        if pair.generation <= entry.pair.generation:
            raise exception.PairMismatch(
                f"{self._parts.name} holds generation {entry.pair.generation} of {pair.uuid}, "
                f"not older than {pair.generation}"
            )
        if not self._end(entry):
            raise pairs.already_protected(entry)

    def _end(self, entry: Entry) -> bool:
        """End a standby; false when it went on instead, or does not end."""
        if entry.worker is not None:
            entry.worker.stop(self._parts.timing.stop_s)
        with entry.changed:
            entry.changed.wait_for(lambda: entry.gone, self._parts.timing.stop_s)
            return entry.gone and entry.state != "standby_active"

    def _live(self, entry: Entry, worker: Worker) -> None:
        try:
            outcome = worker.wait()
            if outcome is None or self._parts.stopping.is_set():
                return  # the record stays: the next life of this agent cleans up
            self._after(entry, outcome)
        except Exception as error:
            LOG.exception("%s: the watch over this standby failed", entry.uuid)
            self._clean_up(entry, f"the agent failed: {error}")

    def _after(self, entry: Entry, outcome: Outcome) -> None:
        if outcome.state == "standby_active":
            entry.stats = None
            self._parts.pairs.drop(entry, "standby_active", outcome.reason, **outcome.details)
        elif outcome.state in ("cancelled", "unprotected", "ended"):
            self._parts.tidy(entry.uuid)
            self._parts.pairs.drop(entry, outcome.state, outcome.reason, **outcome.details)
        else:
            self._clean_up(entry, outcome.reason)

    def _clean_up(self, entry: Entry, reason: str) -> None:
        """After a worker that could not: either the guest had gone on, or nothing may be left.

        Until it is done, or for the next life of this agent: without its record nobody would know
        of a domain that waits, and its memory would stay taken.
        """
        parts = self._parts
        while not parts.stopping.is_set():
            try:
                found = self._conclude(entry)
            except Exception as error:  # noqa: BLE001 - the next may succeed
                entry.undecided(entry.failed(error))
                parts.stopping.wait(parts.timing.retry_s)
                continue
            if found is not None:
                parts.pairs.drop(entry, found[0], f"{reason}{found[1]}")
                return

    def _conclude(self, entry: Entry) -> tuple[str, str] | None:
        """The state that it ends in, and why; None when the agent stops before that is known."""
        host, pair = self._parts.host, entry.pair
        if host.is_running(pair.uuid):
            return self._runs_here(entry)
        won = self._won(entry)
        if won is None:
            return None
        if not won:
            host.cleanup_standby(pair.uuid, pair.generation)
            return "cancelled", ""
        if self._finish(entry):
            # A standby loads its state before it claims, so it can go on without its worker.
            return "standby_active", "; it had won, and goes on"
        why = "; it had won but cannot go on: start the server again"
        LOG.critical("%s: its worker died%s", pair.uuid, why)
        host.cleanup_standby(pair.uuid, pair.generation)
        return "error", why

    def _runs_here(self, entry: Entry) -> tuple[str, str] | None:
        """The guest went on here; or it is another copy, that libvirt or an operator started."""
        parts, pair = self._parts, entry.pair
        deadline = parts.clock.monotonic() + parts.timing.follow_s
        # A standby runs after it won. So whoever is to win this is still about to.
        while (winner := parts.arbiter.winner(pair.uuid, pair.generation)) is None:
            if parts.clock.monotonic() >= deadline:
                break
            entry.undecided(exception.DuplicateDomain(f"it runs on {parts.name}, and nobody won"))
            if parts.stopping.wait(min(parts.timing.retry_s, parts.timing.follow_s)):
                return None
        if winner != "primary":
            return "standby_active", "; the guest had gone on here"
        if not parts.host.holds_state(pair.uuid, pair.generation):
            # Not ours: libvirt's autostart, an operator, a migration while this agent was away. Who
            # destroys the wrong one loses the guest, so that is for a person to say.
            why = f"; {pair.primary_host} won, but a copy that is not the standby runs here"
            LOG.critical("%s: two copies may run: %s", pair.uuid, why[2:])
            return "error", why
        LOG.warning("%s: %s won: the standby here is destroyed", pair.uuid, pair.primary_host)
        parts.host.destroy(pair.uuid)
        parts.host.forget_images(pair.uuid)  # it has written to them
        return "cancelled", f"; {pair.primary_host} won, and the standby that ran was destroyed"

    def _finish(self, entry: Entry) -> bool:
        """Let the winner go on; a libvirtd that is away is waited for, since nobody else runs."""
        while True:
            try:
                return self._parts.host.finish_takeover(entry.uuid)
            except Exception as error:
                failure = entry.failed(error)
                LOG.error("%s: won, but cannot go on yet: %s", entry.uuid, failure)
                if self._parts.stopping.wait(self._parts.timing.retry_s):
                    raise

    def _won(self, entry: Entry) -> bool | None:
        """Whether this side won; None when the agent stops.

        :raises nova_pmt.exception.ArbiterUnavailable: nobody answers.
        """
        parts, pair = self._parts, entry.pair
        winner = parts.arbiter.winner(pair.uuid, pair.generation)
        if winner is not None or not parts.host.holds_state(pair.uuid, pair.generation):
            return winner == "standby"
        # Its worker was about to claim, or its claim is still on its way: to destroy the state now
        # could leave nobody. As with the worker, a primary that lives is first.
        if parts.stopping.wait(parts.timing.claim_delay_s):
            return None
        return parts.arbiter.claim(pair.uuid, pair.generation, "standby", reason="its worker died")

    def _duplicate(self, uuid: str) -> exception.DuplicateDomain:
        return exception.DuplicateDomain(f"a domain {uuid} runs on {self._parts.name} already")
