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

"""How long a peer may be silent before it is lost: longer where silences are usual.

On a loaded host heartbeats come late although nobody died, and a timeout below what is usual there
would fail over for nothing. So the longest recent gap counts: the limit is three times that, at
least what is configured and at most four times as much.
"""

from __future__ import annotations

#: The limit, in gaps as long as the longest recent one.
GAPS = 3.0
#: The limit is never more than this times what is configured.
MOST = 4.0
#: A gap counts half as much after this time, in seconds.
HALF_LIFE_S = 30.0


class SilenceLimit:
    """Learns from the gaps between arrivals.

    :param timeout_s: as configured.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._last: float | None = None
        self._gap = 0.0

    def heard(self, now: float) -> None:
        """Something came.

        :param now: seconds of a monotonic clock.
        """
        last, self._last = self._last, now
        if last is not None and now > last:  # what came before the first is no gap
            gap = now - last
            self._gap = max(gap, self._gap * 0.5 ** (gap / HALF_LIFE_S))

    @property
    def seconds(self) -> float:
        """The limit now."""
        return min(max(self.timeout_s, GAPS * self._gap), MOST * self.timeout_s)
