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

"""Which hosts are alive: whether their heartbeats move, seen with one's own clock.

No clock of another machine is compared with ours, and no silence is believed that could be our own:
a host is taken for dead only while another one is heard. No guest is moved for it: that is decided
by the two sides of a pair, whose link knows better than an agent's silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from oslo_log import log

from nova_pmt import exception
from nova_pmt.manager.db.api import Database

LOG = log.getLogger(__name__)


@dataclass
class _Seen:
    beats: int
    since: float


class HostWatch:
    """Looks at all hosts; one for each manager.

    :param timeout_s: of silence, after which a host is dead.
    """

    def __init__(
        self,
        database: Database,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._timeout_s = timeout_s
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._looked = clock()

    def look(self) -> None:
        """To be called much more often than a host may be silent.

        :raises nova_pmt.exception.DatabaseUnavailable: nothing can be said; all hosts get their
            whole time anew.
        """
        try:
            self._look()
        except exception.DatabaseUnavailable:
            self._seen.clear()
            raise

    def _look(self) -> None:
        hosts = self._database.hosts()
        now = self._clock()
        if now - self._looked > self._timeout_s / 2:
            # We, or the database, stood still: what looks like silence may be ours.
            self._seen.clear()
        self._looked = now
        for host in hosts:
            seen = self._seen.get(host.name)
            if seen is None:
                self._seen[host.name] = _Seen(host.beats, now)
            elif seen.beats != host.beats:
                self._seen[host.name] = _Seen(host.beats, now)
                if not host.alive and self._database.judge(host.name, host.beats, True, "heard"):
                    LOG.info("host %s is alive again", host.name)
        if not self._somebody_is_heard(now):
            # As a rule the message bus is away: who is heard first then says nothing of the others.
            self._seen = {host.name: _Seen(host.beats, now) for host in hosts}
        for host in hosts:
            silent_s = now - self._seen[host.name].since
            if host.alive and silent_s > self._timeout_s:
                reason = f"its agent was silent for {silent_s:.0f} s"
                if self._database.judge(host.name, host.beats, False, reason):
                    LOG.error("host %s is taken for dead: %s", host.name, reason)

    def _somebody_is_heard(self, now: float) -> bool:
        return any(now - seen.since < self._timeout_s / 2 for seen in self._seen.values())
