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

"""The pairs of this host as they are now: state, what the worker said last, the record."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import notifications
from nova_pmt.agent.control import Pair
from nova_pmt.agent.records import Record, RecordStore
from nova_pmt.agent.supervisor import Outcome, Worker

LOG = log.getLogger(__name__)

_RECENT = 100
#: Decided; only the worker has still to clean up.
_PASSING = frozenset({"standby_active", "cancelled", "unprotected", "ended"})
#: A worker has taken up its pair.
_BEGUN = frozenset({"syncing", "protected"})


@dataclass(frozen=True)
class Clock:
    """Where time comes from: ``wall`` in seconds since 1970, ``monotonic`` for intervals."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


class Entry:
    """One pair. ``changed`` guards every attribute and is notified of every change."""

    def __init__(
        self,
        record: Record,
        clock: Clock,
        on_change: Callable[[Entry, str], None],
        save: Callable[[Entry], None],
    ) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.record = record
        self.state = ""
        self.reason = ""
        self.details: dict[str, Any] = {}
        self.since = clock.wall()
        self.worker: Worker | None = None
        #: The worker has taken up the pair: from here on its standby may come to hold a checkpoint.
        self.begun = False
        #: The arbiter knows of the generation.
        self.announced = True
        self.gone = False
        #: What an operator has asked for and is not done yet.
        self.activity: str | None = None
        self.progress: dict[str, Any] | None = None
        self.stats: dict[str, Any] | None = None
        self.ready: dict[str, Any] | None = None
        self.last_error: exception.PmtError | None = None
        self.errors = 0
        #: Failures to protect since it was protected last; decides the back-off.
        self.failures = 0
        self.next_attempt: float | None = None
        #: Where its next standby shall be, if not where the last one was.
        self.next_standby: str | None = None
        self._clock = clock
        self._on_change = on_change
        self._save = save

    @property
    def pair(self) -> Pair:
        return self.record.pair

    @property
    def uuid(self) -> str:
        return self.record.pair.uuid

    @property
    def wanted(self) -> bool:
        """Whether protection is still asked for."""
        return self.record.desired == "protected"

    def transition(self, state: str, reason: str = "", **details: Any) -> None:
        """Go to a state: on disk, in the log and as a notification."""
        with self.changed:
            previous, self.state = self.state, state
            self.reason, self.details = reason, details
            self.since = self._clock.wall()
            if state == "protected":
                self.failures, self.last_error, self.progress = 0, None, None
                self.next_standby = None
            self._on_change(self, previous)
            self.changed.notify_all()

    def explain(self, reason: str) -> None:
        """Say more about a state that stays as it is."""
        with self.changed:
            self.reason = reason
            self.changed.notify_all()

    def rearrange(self, pair: Pair) -> None:
        """Begin a new generation; its worker is still to come."""
        with self.changed:
            self.record = replace(self.record, pair=pair)
            self.worker, self.begun = None, False
            self.progress = self.stats = self.ready = self.next_attempt = None

    def want(self, desired: str) -> None:
        """Set what is asked for; a restart of the agent keeps to it."""
        with self.changed:
            self.record = replace(self.record, desired=desired)
            self._save(self)
            self.changed.notify_all()

    def on_event(self, message: dict[str, Any]) -> None:
        """Take what the worker says."""
        event = message.get("event")
        content = {key: value for key, value in message.items() if key != "event"}
        with self.changed:
            if event == "state":
                state = str(message.get("state"))
                self.begun = self.begun or state in _BEGUN
                # An error is not where a pair stays: whoever waits for the worker decides.
                if state != "error" and state != self.state:
                    details = message.get("details")
                    details = details if isinstance(details, dict) else {}
                    self.transition(state, str(message.get("reason", "")), **details)
            elif event == "progress":
                self.progress = content
            elif event == "stats":
                self.stats = content
            elif event == "ready":
                self.ready = content
            elif event == "error" and isinstance(message.get("error"), dict):
                self.last_error = exception.from_dict(message["error"])
                self.errors += 1
                LOG.error("%s: worker: %s", self.uuid, self.last_error)
            self.changed.notify_all()

    def on_exit(self, outcome: Outcome) -> None:
        """Take note that the worker has ended."""
        with self.changed:
            if outcome.error is not None:
                self.last_error = outcome.error
            self.changed.notify_all()

    def failed(self, error: Exception) -> exception.PmtError:
        """Take note of an error of whatever kind: none may end the watch over a pair.

        :returns: it, as one of ours.
        """
        with self.changed:
            known, ours = self.last_error, error
            if not isinstance(ours, exception.PmtError):
                ours = exception.GuestError(f"{type(error).__name__}: {error}")
                if known is None or known.message != ours.message:  # else it is asked again
                    LOG.error("%s: nobody thought of this error", self.uuid, exc_info=error)
            self.last_error = ours
            return ours

    def undecided(self, error: exception.PmtError) -> None:
        """The arbiter or libvirt does not answer; it is asked again."""
        with self.changed:
            if self.state != "undecided" or self.reason != error.message:
                LOG.error("%s: undecided: %s", self.uuid, error)
                self.transition("undecided", error.message)

    def view(self, host: str) -> dict[str, Any]:
        """The pair as it is shown to operators."""
        with self.changed:
            wait_s = None
            if self.next_attempt is not None:
                wait_s = round(max(0.0, self.next_attempt - self._clock.monotonic()), 1)
            return {
                "uuid": self.uuid,
                "name": self.pair.name,
                "role": self.record.role,
                "host": host,
                "state": self.state,
                "reason": self.reason,
                "details": self.details,
                "since": self.since,
                "primary_host": self.pair.primary_host,
                "standby_host": self.pair.standby_host,
                "generation": self.pair.generation,
                "strategy": self.record.strategy,
                "options": self.record.options,
                "desired": self.record.desired,
                "progress": self.progress,
                "stats": self.stats,
                "output_commit": bool((self.stats or {}).get("output_commit", False)),
                "attempts": self.failures,
                "next_attempt_s": wait_s,
                "last_error": self.last_error.to_dict() if self.last_error else None,
                "worker_pid": self.worker.pid if self.worker else None,
            }


class Pairs:
    """All pairs of this host, and what became of those that are no more."""

    def __init__(
        self,
        host: str,
        store: RecordStore,
        outlet: notifications.Notifications,
        clock: Clock | None = None,
    ) -> None:
        self.host = host
        self._store = store
        self._outlet = outlet
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=_RECENT)
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call this after each change of a state; it must not wait for anything."""
        self._listeners.append(listener)

    def __iter__(self) -> Iterator[Entry]:
        with self._lock:
            entries = list(self._entries.values())
        return iter(sorted(entries, key=lambda entry: (entry.pair.name, entry.uuid)))

    def add(self, record: Record, reason: str = "") -> Entry:
        """Take up a pair, in its record's state.

        :raises nova_pmt.exception.AlreadyProtected: this host has one of this server.
        """
        entry = Entry(record, self._clock, self._changed, self._save)
        with self._lock:
            known = self._entries.setdefault(record.pair.uuid, entry)
        if known is not entry:
            raise already_protected(known)
        entry.transition(record.state, reason)
        return entry

    def get(self, uuid: str) -> Entry | None:
        with self._lock:
            return self._entries.get(uuid)

    def settled(self, uuid: str, timeout_s: float) -> Entry | None:
        """A pair that stays: waits, for at most that long, for one that is about to go."""
        entry = self.get(uuid)
        if entry is None:
            return None
        with entry.changed:
            if entry.state in _PASSING:
                entry.changed.wait_for(lambda: entry.gone, timeout_s)
            return None if entry.gone else entry

    def find(self, domain: str) -> Entry | None:
        """A pair by UUID or name."""
        return self.get(domain) or next((one for one in self if one.pair.name == domain), None)

    def drop(self, entry: Entry, state: str, reason: str = "", **details: Any) -> None:
        """Let go of a pair whose life is over in that state."""
        with entry.changed:
            if entry.gone:
                return
            entry.gone = True
            if entry.state != state:
                entry.transition(state, reason, **details)
            try:
                self._store.remove(entry.uuid)
            except OSError as error:
                # Only a restart of the agent would take it up again, and decide as now.
                LOG.error("%s: its record cannot be removed: %s", entry.uuid, error)
            view = entry.view(self.host)
            with self._lock:
                self._entries.pop(entry.uuid, None)
                self._recent.appendleft(view)
            entry.changed.notify_all()

    def recent(self, domain: str | None = None) -> list[dict[str, Any]]:
        """Pairs that are no more, the newest first."""
        with self._lock:
            return [
                one
                for one in self._recent
                if domain is None or domain in (one["uuid"], one["name"])
            ]

    def _changed(self, entry: Entry, previous: str) -> None:
        now = self._clock.wall()
        state = entry.state
        LOG.info(
            "%s: %s -> %s (%s, generation %d)%s",
            entry.uuid, previous or "new", state, entry.record.role, entry.pair.generation,
            f": {entry.reason}" if entry.reason else "",
        )  # fmt: skip
        entry.record = replace(entry.record, state=state, updated=now)
        self._save(entry)
        content = notifications.payload(
            entry.pair, self.host, state, previous or None, entry.reason, now
        )
        self._outlet.put(state, content)
        for listener in self._listeners:
            listener()

    def _save(self, entry: Entry) -> None:
        if entry.gone:
            return
        try:
            self._store.save(entry.record)
        except OSError as error:
            # The pair goes on: only a restart of the agent would miss what is not written.
            LOG.error("%s: its record cannot be written: %s", entry.uuid, error)


def already_protected(entry: Entry) -> exception.AlreadyProtected:
    """The refusal that names the pair which is there."""
    pair = entry.pair
    return exception.AlreadyProtected(
        f"server {pair.uuid} ({pair.name}) is in a pair already: primary on {pair.primary_host}, "
        f"standby on {pair.standby_host}, {entry.state}"
    )
