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

"""Notifications on their way out, in a thread of their own: a bus that hangs holds nobody up.

Topics and driver are oslo.messaging's own options, group ``[oslo_messaging_notifications]``; with
its default driver none are sent.
"""

from __future__ import annotations

import datetime
import queue
import threading
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from oslo_log import log

LOG = log.getLogger(__name__)

Level = Literal["info", "warn", "error"]

VERSION = "1.0"
#: What waits for a slow message bus; the newest are thrown away beyond it.
_MAX_WAITING = 1000


class OsloNotifier(Protocol):
    """What is used of :class:`oslo_messaging.Notifier`."""

    def info(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None: ...

    def warn(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None: ...

    def error(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None: ...


def payload(kind: str, at: float, /, **data: Any) -> dict[str, Any]:
    """In the shape of Nova's versioned notifications.

    :param kind: of the object, say ``PairPayload``.
    :param at: seconds since 1970.
    """
    moment = datetime.datetime.fromtimestamp(at, datetime.timezone.utc)
    return {
        "nova_pmt_object.name": kind,
        "nova_pmt_object.namespace": "nova_pmt",
        "nova_pmt_object.version": VERSION,
        "nova_pmt_object.data": {
            **data,
            "at": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        },
    }


class Outbox:
    """Of one kind of notification.

    :param notifier: None: all are thrown away.
    :param family: event types are ``nova_pmt.<family>.<what>``.
    :param levels: of those that are more than ``info``.
    """

    def __init__(
        self, notifier: OsloNotifier | None, family: str, levels: Mapping[str, Level]
    ) -> None:
        self._notifier = notifier
        self._family = family
        self._levels = levels
        self._waiting: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(_MAX_WAITING)
        self._failing = False
        self._thread = threading.Thread(
            target=self._send_all, name=f"notifications-{family}", daemon=True
        )
        self._thread.start()

    def put(self, what: str, content: dict[str, Any]) -> None:
        """Queue one; never raises, never waits."""
        try:
            self._waiting.put_nowait((what, content))
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
            what, content = item
            if self._notifier is None:
                continue
            send = getattr(self._notifier, self._levels.get(what, "info"))
            try:
                send({}, f"nova_pmt.{self._family}.{what}", content)
            except Exception as error:  # noqa: BLE001 - whatever a driver raises: it may not harm
                self._complain(type(error).__name__)  # (its text may have the bus's password)
            else:
                self._failing = False

    def _complain(self, why: str) -> None:
        if not self._failing:  # once for each time that it begins to fail
            self._failing = True
            LOG.error("Notifications of a %s cannot be sent: %s", self._family, why)
