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

"""Versioned notifications: one for every change of a pair's state.

Event type ``nova_pmt.pair.<state>``, published as ``nova-pmt-agent.<host>``. Topics and driver are
oslo.messaging's own options, group ``[oslo_messaging_notifications]``; with its default driver
none are sent. The payload has the shape of Nova's versioned notifications.
"""

from __future__ import annotations

import datetime
import queue
import threading
from typing import Any, Protocol

from oslo_log import log

from nova_pmt.agent.control import Pair

LOG = log.getLogger(__name__)

VERSION = "1.0"
#: What waits for a slow message bus; the newest are thrown away beyond it.
_MAX_WAITING = 1000
#: States of which an operator should hear at night.
_WARNINGS = frozenset({"primary_alone", "failing_over", "standby_active", "undecided"})
_ERRORS = frozenset({"error"})


def payload(
    pair: Pair, host: str, state: str, previous_state: str | None, reason: str, at: float
) -> dict[str, Any]:
    """The payload of one change.

    :param at: seconds since 1970.
    """
    moment = datetime.datetime.fromtimestamp(at, datetime.timezone.utc)
    return {
        "nova_pmt_object.name": "PairPayload",
        "nova_pmt_object.namespace": "nova_pmt",
        "nova_pmt_object.version": VERSION,
        "nova_pmt_object.data": {
            "uuid": pair.uuid,
            "name": pair.name,
            "generation": pair.generation,
            "primary_host": pair.primary_host,
            "standby_host": pair.standby_host,
            "state": state,
            "previous_state": previous_state,
            "reason": reason,
            "host": host,
            "at": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        },
    }


class OsloNotifier(Protocol):
    """What is used of :class:`oslo_messaging.Notifier`."""

    def info(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None: ...

    def warn(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None: ...

    def error(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None: ...


class Notifications:
    """Sends in a thread of its own: a message bus that hangs never holds up a pair."""

    def __init__(self, notifier: OsloNotifier | None) -> None:
        self._notifier = notifier
        self._waiting: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(_MAX_WAITING)
        self._failing = False
        self._thread = threading.Thread(target=self._send_all, name="notifications", daemon=True)
        self._thread.start()

    def emit(self, state: str, content: dict[str, Any]) -> None:
        """Queue a notification; never raises, never waits."""
        try:
            self._waiting.put_nowait((state, content))
        except queue.Full:
            self._complain("the message bus does not take them")

    def close(self, timeout_s: float) -> None:
        """Send what waits, for at most that long."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _send_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            state, content = item
            if self._notifier is None:
                continue
            send = self._notifier.info
            if state in _ERRORS:
                send = self._notifier.error
            elif state in _WARNINGS:
                send = self._notifier.warn
            try:
                send({}, f"nova_pmt.pair.{state}", content)
            except Exception as error:  # noqa: BLE001 - whatever a driver raises: it may not harm
                self._complain(str(error))
            else:
                self._failing = False

    def _complain(self, why: str) -> None:
        if not self._failing:  # once for each time that it begins to fail
            self._failing = True
            LOG.error("Notifications cannot be sent: %s", why)
