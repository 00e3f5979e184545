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

"""What sending a byte takes on this link, for whoever could send fewer of them.

From two measurements. Where there is much to send: how long it took to hand it to the kernel, whose
buffers are small against it. Otherwise: how long it took until the peer said that it has it, less
what that takes when there is next to nothing to send. Time in which there was nothing to send does
not count; nor that in which nothing was allowed to be sent, or in which our thread made frames,
unless the kernel had enough to send meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

#: With so many bytes at a stretch, the kernel's buffers do not count any more.
STRETCH_BYTES = 4 << 20
#: The answer to fewer bytes says more of the round trip than of the link.
ANSWERED_BYTES = 64 << 10
#: The answer to so few says what the round trip is.
TRIP_BYTES = 16 << 10
#: Of less than this share of a stretch nothing is concluded: the rest was not the link's.
LEAST_SHARE = 0.2
#: How much one measurement counts against those before it.
_WEIGHT = 0.2
#: What a measurement is worth after another checkpoint that was too small to measure: whoever sends
#: little because of an old measurement must not keep it for good.
_FADES = 0.998
#: As fast the least round trip is forgotten.
_GROWS = 1.01


@dataclass(frozen=True)
class Mark:
    """A place in what is sent.

    :param other_s: seconds until then in which nothing was handed to the kernel, for other reasons.
    :param refused: how often the kernel had refused to take more.
    """

    at: float
    sent: int
    other_s: float
    refused: int


class Speed:
    """See the module's text. Used by one thread, but for :attr:`held_s`.

    :param clock: seconds.
    :ivar s_per_byte: seconds; 0: not known yet.
    :ivar held_s: for how long nothing was allowed to be sent, in all. Whoever holds the link counts
        it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.s_per_byte = 0.0
        self.held_s = 0.0
        self._worked_s = 0.0
        self._trip_s = 0.0
        self._began: Mark | None = None
        self._stretch: Mark | None = None
        self._answered = Mark(0.0, 0, 0.0, 0)
        self._refused = 0

    def worked(self, seconds: float) -> None:
        """So long our thread made a frame, and did not send."""
        self._worked_s += seconds

    def _mark(self, sent: int) -> Mark:
        return Mark(self._clock(), sent, self._worked_s + self.held_s, self._refused)

    def refused(self) -> None:
        """The kernel takes no more: it has enough to send for a while."""
        self._refused += 1

    def busy(self, sent: int) -> None:
        """There is something to send.

        :param sent: bytes sent so far.
        """
        if self._stretch is None:
            self._began = self._stretch = self._mark(sent)
        elif sent - self._stretch.sent >= STRETCH_BYTES:
            now = self._mark(sent)
            self._note(self._stretch, now, 0.0)
            self._stretch = now

    def idle(self) -> None:
        """There is nothing to send any more."""
        self._began = self._stretch = None

    def asked(self, sent: int) -> tuple[Mark, int]:
        """Something is sent now that the peer will answer; for :meth:`answered`."""
        return self._began or self._mark(sent), sent

    def answered(self, asked: tuple[Mark, int]) -> None:
        """The peer has all that was sent until it was asked."""
        begun, sent = asked
        before, now = self._answered, self._mark(sent)
        # What was asked before was under way as well, until it was answered.
        since = begun if begun.at >= before.at else before
        self._answered = now
        if sent - since.sent >= ANSWERED_BYTES:
            self._note(since, now, self._trip_s)
            return
        self.s_per_byte *= _FADES
        if sent - since.sent <= TRIP_BYTES:
            trip = max(0.0, now.at - since.at - self._other_s(since, now))
            self._trip_s = min(trip, self._trip_s * _GROWS) if self._trip_s else trip

    @staticmethod
    def _other_s(since: Mark, now: Mark) -> float:
        return now.other_s - since.other_s if now.refused == since.refused else 0.0

    def _note(self, since: Mark, now: Mark, trip_s: float) -> None:
        elapsed = now.at - since.at
        links = elapsed - self._other_s(since, now) - trip_s
        if links < LEAST_SHARE * elapsed:
            return
        found = links / (now.sent - since.sent)
        self.s_per_byte += (found - self.s_per_byte) * (_WEIGHT if self.s_per_byte else 1.0)
