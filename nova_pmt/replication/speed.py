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
buffers are small against it. Otherwise: how long it took until the peer said that it has it. Time
in which there was nothing to send, or in which our thread made bytes fewer, does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

#: With so many bytes at a stretch, the kernel's buffers do not count any more.
STRETCH_BYTES = 4 << 20
#: The answer to fewer bytes says more of the round trip than of the link.
ANSWERED_BYTES = 256 << 10
#: How much one measurement counts against those before it.
_WEIGHT = 0.2


@dataclass(frozen=True)
class Mark:
    """A place in what is sent: clock, bytes sent, and seconds worked until then."""

    at: float
    sent: int
    worked: float


class Speed:
    """See the module's text. Used by one thread.

    :param clock: seconds.
    :ivar s_per_byte: seconds; 0: not known yet.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.s_per_byte = 0.0
        self._worked_s = 0.0
        self._busy: Mark | None = None
        self._answered = Mark(0.0, 0, 0.0)

    def worked(self, seconds: float) -> None:
        """So long our thread made fewer bytes of something, and did not send."""
        self._worked_s += seconds

    def _mark(self, sent: int) -> Mark:
        return Mark(self._clock(), sent, self._worked_s)

    def busy(self, sent: int) -> None:
        """There is something to send.

        :param sent: bytes sent so far.
        """
        if self._busy is None:
            self._busy = self._mark(sent)
        elif sent - self._busy.sent >= STRETCH_BYTES:
            now = self._mark(sent)
            self._note(self._busy, now)
            self._busy = now

    def idle(self) -> None:
        """There is nothing to send any more."""
        self._busy = None

    def asked(self, sent: int) -> tuple[Mark, int]:
        """Something is sent now that the peer will answer; for :meth:`answered`."""
        return self._busy or self._mark(sent), sent

    def answered(self, asked: tuple[Mark, int]) -> None:
        """The peer has all that was sent until it was asked."""
        begun, sent = asked
        before, now = self._answered, self._mark(sent)
        # What was asked before was under way as well, until it was answered.
        since = begun if begun.at >= before.at else before
        self._answered = now
        if sent - since.sent >= ANSWERED_BYTES:
            self._note(since, now)

    def _note(self, since: Mark, now: Mark) -> None:
        elapsed = now.at - since.at
        # (Work that ended before the bytes of others had arrived took none of their time.)
        spent = max(elapsed - (now.worked - since.worked), elapsed / 4)
        found = spent / (now.sent - since.sent)
        self.s_per_byte += (found - self.s_per_byte) * (_WEIGHT if self.s_per_byte else 1.0)
