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

"""Tells the managers that this host lives, and how its pairs are.

One message serves for both: each has all pairs, so that one that was lost is made up for by the
next. A change of a pair's state is told at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent.pairs import Pairs

LOG = log.getLogger(__name__)

_TOLD = ("uuid", "generation", "role", "state", "reason")
_REASON_CHARACTERS = 500


class Managers(Protocol):
    """What is used of :class:`nova_pmt.manager.rpcapi.ManagerAPI`."""

    def beat(
        self,
        host: str,
        facts: dict[str, Any],
        pairs: list[dict[str, Any]],
        running: list[str] | None = None,
    ) -> dict[str, Any]: ...


class Heartbeats:
    """A thread of its own: a message bus that hangs never holds up a pair.

    :param facts: of this host, for the choice of standbys; may be slow, may raise PmtError.
    """

    def __init__(
        self,
        host: str,
        managers: Managers,
        pairs: Pairs,
        facts: Callable[[], dict[str, Any]],
        interval_s: float,
    ) -> None:
        self._host = host
        self._managers = managers
        self._pairs = pairs
        self._facts = facts
        self._interval_s = interval_s
        self._news = threading.Event()
        self._stopping = False
        self._failing = False
        pairs.on_change(self._news.set)
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._beat()
            except Exception:  # a host whose heartbeats end is taken for dead
                LOG.exception("this heartbeat failed")
            self._news.wait(self._interval_s)
            self._news.clear()

    def _beat(self) -> None:
        try:
            facts = self._facts()
        except exception.PmtError as error:
            facts = {"error": error.message[:_REASON_CHARACTERS]}
        except Exception as error:
            LOG.exception("the facts of this host cannot be told")
            facts = {"error": repr(error)[:_REASON_CHARACTERS]}
        running = facts.pop("running", None)
        try:
            self._managers.beat(self._host, facts, self._reports(), running)
        except exception.PmtError as error:
            if not self._failing:  # once for each time that it begins to fail
                LOG.warning("no manager hears this host: %s", error)
            self._failing = True
        else:
            if self._failing:
                LOG.info("a manager hears this host again")
            self._failing = False

    def _reports(self) -> list[dict[str, Any]]:
        """The oldest first: what became of a pair before it began anew is told before that."""
        views = [*reversed(self._pairs.recent()), *(one.view(self._host) for one in self._pairs)]
        return [_report(view) for view in views]

    def close(self, timeout_s: float) -> None:
        """End the thread."""
        self._stopping = True
        self._news.set()
        self._thread.join(timeout_s)


def _report(view: dict[str, Any]) -> dict[str, Any]:
    report = {key: view[key] for key in _TOLD}
    report["reason"] = view["reason"][:_REASON_CHARACTERS]
    if view["details"].get("undecided"):
        # Nobody has won: "ended" would close the generation, and its standby may still ask.
        report["state"] = "error"
    return report
