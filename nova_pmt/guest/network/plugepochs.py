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

"""Epochs in the slots of the buffer ``plug``: which is where, which may leave."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nova_pmt.guest.network.plugqdisc import SLOTS, Plugs, Slot
from nova_pmt.guest.network.rtnetlink import Request, Rtnl

#: How often it is asked whether packets still come this way.
CHECK_S = 0.5
#: How long a release waits for earlier epochs to be out; what it could not do is done later.
ORDER_WAIT_S = 0.002
POLL_S = 0.0005


@dataclass
class Counters:
    """What was seen when it was last looked; for other threads to read."""

    held_bytes: int = 0
    peak_bytes: int = 0
    dropped_packets: int = 0
    released_bytes: int = 0


@dataclass(frozen=True)
class _Epoch:
    """An epoch that was cut, and waits in a slot.

    :param first_at: its first packet came then or later (monotonic clock).
    """

    number: int
    slot: int
    first_at: float


class EpochQueue:
    """Turns cuts and commits of epochs into requests to the kernel. One thread.

    :param rtnl: for all but cuts; :param cutter: for cuts, whose answers wait in it.
    :param plugs: new ones, that hold nothing.
    :param limit_bytes: most that is held.
    :param check: says why packets do not come this way any more; empty: they do.
    """

    def __init__(
        self,
        rtnl: Rtnl,
        cutter: Rtnl,
        plugs: Plugs,
        limit_bytes: int,
        check: Callable[[], str],
    ) -> None:
        self._rtnl, self._cutter, self._plugs = rtnl, cutter, plugs
        self._limit = limit_bytes
        self._check = check
        self.counters = Counters()
        #: Why nothing is let out any more; empty while all is well.
        self.broken = ""
        self._slots = [Slot() for _ in range(SLOTS)]
        self._limits = [limit_bytes] * SLOTS
        self._current = 0
        #: Slots behind the current one that were empty when it was looked: a packet that still
        #: leaves a slot must not meet those of a new epoch, since the kernel counts both.
        self._ready = SLOTS - 1
        self._waiting: deque[_Epoch] = deque()
        self._committed = -1
        #: Slots that were released and not yet seen empty.
        self._leaving: list[int] = []
        self._first_at = 0.0
        self._cut_at = self._looked_at = self._checked_at = time.monotonic()

    @property
    def first_at(self) -> float:
        """When the first packet since the last cut came, as far as was looked; 0: none did."""
        return self._first_at

    def cut(self, epoch: int) -> None:
        """End of the epoch's packets; sends one request and does nothing else."""
        if not self._ready:
            # So many epochs are under way that no slot is free: these packets go with the next's.
            return
        following = (self._current + 1) % SLOTS
        try:
            # Made beforehand, its answer read after the pause. But the kernel takes the RTNL lock
            # for it: who holds that (interfaces that come and go, large dumps) prolongs the pause.
            self._cutter.send(self._plugs.turn_to[following])
        except OSError as error:
            self._fail(f"epoch {epoch} was not cut: {error}")
            return
        first_at = self._first_at or max(self._looked_at, self._cut_at)
        self._waiting.append(_Epoch(epoch, self._current, first_at))
        self._current = following
        self._ready -= 1
        self._first_at = 0.0
        self._cut_at = time.monotonic()

    def release(self, epoch: int) -> float | None:
        """Let out what was held up to the epoch's cut.

        :returns: seconds for which the oldest of it was held, at most; None when there was none.
        """
        self._committed = max(self._committed, epoch)
        return self.let_out(ORDER_WAIT_S)

    def let_out(self, patience_s: float = 0.0) -> float | None:
        """Let out what is committed, in order, and share the limit anew.

        The kernel empties lower slots first. So before a slot is released that begins a new lap,
        those at the end of the last must be empty; it takes the kernel some microseconds. If it
        has not come to it after ``patience_s``, the rest is let out at the next call.
        """
        held: float | None = None
        give_up = time.monotonic() + patience_s
        while self.look():
            requests: list[Request] = []
            while self._waiting and self._waiting[0].number <= self._committed:
                out = self._waiting[0]
                if self._slots[out.slot].packets:
                    if any(slot > out.slot for slot in self._leaving):
                        break
                    held = max(held or 0.0, time.monotonic() - out.first_at)
                    requests += self._plugs.release[out.slot]
                    self._leaving.append(out.slot)
                self._waiting.popleft()
            try:
                self._rtnl.call(*requests, *self._new_limits())
            except OSError as error:
                self._fail(f"epoch {self._committed} was not released: {error}")
            due = bool(self._waiting) and self._waiting[0].number <= self._committed
            if not due or time.monotonic() >= give_up:
                break
            time.sleep(POLL_S)
        return held

    def look(self) -> bool:
        """Read the kernel's counters, and its answers to cuts; false when something is broken."""
        if self.broken:
            return False
        now = time.monotonic()
        try:
            for _, fault in self._cutter.answers():
                if fault is not None:
                    return self._fail(f"an epoch was not cut: {fault}")
            if not self._plugs.look(self._rtnl, self._slots):
                return self._fail("somebody took its queue away")
            if now - self._checked_at >= CHECK_S:
                self._checked_at = now
                why = self._check()
                if why:
                    return self._fail(why)
        except OSError as error:
            return self._fail(f"the kernel cannot be asked: {error}")
        self._leaving = [slot for slot in self._leaving if self._slots[slot].packets]
        taken = {out.slot for out in self._waiting}
        self._ready = 0
        while self._ready < SLOTS - 1:
            slot = (self._current + 1 + self._ready) % SLOTS
            if slot in taken or self._slots[slot].packets:
                break
            self._ready += 1
        self._count(now)
        return True

    def _count(self, now: float) -> None:
        counters = self.counters
        counters.held_bytes = sum(slot.held_bytes for slot in self._slots)
        counters.released_bytes = sum(slot.released_bytes for slot in self._slots)
        counters.dropped_packets = sum(slot.dropped_packets for slot in self._slots)
        counters.peak_bytes = max(counters.peak_bytes, counters.held_bytes)
        if self._slots[self._current].packets and not self._first_at:
            self._first_at = max(self._looked_at, self._cut_at)  # came since the last look
        self._looked_at = now

    def _new_limits(self) -> list[Request]:
        """Requests that let all slots together hold as much as may be held.

        The epoch under way may have what those before it leave. What the next may have has to be
        said before it begins, when it is not known what this one will take: so from a cut to the
        next look the sum may be above the limit, at most twice as much.
        """
        following = (self._current + 1) % SLOTS
        left = self._limit - sum(self._slots[out.slot].held_bytes for out in self._waiting)
        wanted = {
            self._current: left,
            following: left - self._slots[self._current].held_bytes,
        }
        requests = []
        for slot, value in wanted.items():
            # A little more or less is not worth a request.
            if abs(value - self._limits[slot]) > self._limit // 64:
                self._limits[slot] = value
                requests.append(self._plugs.limit(slot, value))
        return requests

    def open(self, deadline: float) -> None:
        """Let out all epochs, one after the other, and let pass what comes from now on.

        :param deadline: of the monotonic clock.
        :raises OSError: it did not work.
        """
        for slot in [*self._leaving, *(out.slot for out in self._waiting), self._current]:
            self._rtnl.call(self._plugs.open[slot])
            while self.packets(slot):
                if time.monotonic() > deadline:
                    raise TimeoutError("the kernel does not let them out")
                time.sleep(POLL_S)

    def packets(self, slot: int | None = None) -> int:
        """How many packets are in a slot, or in all.

        :raises OSError: the plugs are not there.
        """
        if not self._plugs.look(self._rtnl, self._slots):
            raise OSError("somebody took its queue away")
        chosen = self._slots if slot is None else [self._slots[slot]]
        return sum(one.packets for one in chosen)

    def _fail(self, why: str) -> bool:
        """Nothing is let out from now on."""
        self.broken = self.broken or why
        return False
