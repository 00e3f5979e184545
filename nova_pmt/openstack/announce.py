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

"""Versioned notifications of what managers do about servers of Nova.

Event type ``nova_pmt.server.<what>``, published as ``nova-pmt-manager.<host>``:

================  ==============================================================================
what              when
================  ==============================================================================
``unprotected``   a wish is not honoured, or not now: the flavor forbids it, the server is stopped
``refused``       it should be protected, or Nova told of a failover, and that failed; once for each
                  reason, however often it is tried
``failing_over``  its standby goes on; Nova is told next
``failed_over``   Nova knows where it runs
``overdue``       Nova has not followed a failover for ``[nova] failover_timeout_s``; it is tried on
================  ==============================================================================

Pairs have notifications of their own (:mod:`nova_pmt.agent.notifications`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MappingProxyType

from nova_pmt import outbox

_LEVELS: MappingProxyType[str, outbox.Level] = MappingProxyType(
    {"refused": "warn", "failing_over": "warn", "overdue": "error"}
)


class Announcements(outbox.Outbox):
    """A manager's."""

    def __init__(self, notifier: outbox.OsloNotifier, now: Callable[[], float] = time.time) -> None:
        super().__init__(notifier, "server", _LEVELS)
        self._now = now

    def __call__(self, what: str, uuid: str, reason: str) -> None:
        """Queue one; never raises, never waits."""
        self.put(what, outbox.payload("ServerPayload", self._now(), uuid=uuid, reason=reason))
