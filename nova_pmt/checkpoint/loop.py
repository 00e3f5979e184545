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

"""The loop of rounds: when to pass, when to pause, when to hold back."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence

from nova_pmt import exception, faultpoint
from nova_pmt.checkpoint.interfaces import GuestExecution, OutputBuffer
from nova_pmt.checkpoint.round import PRESSURE_POLL_S, Checkpointer
from nova_pmt.checkpoint.strategies.base import Strategy

#: How often a guest that its operator paused is looked at.
PAUSED_POLL_S = 0.1
#: Young objects are collected this often, between rounds; never by chance in a pause.
COLLECT_EVERY = 64
#: Output that is held to this degree ends the wait for the next round.
EARLY_PRESSURE = 0.5
#: A pass that found no more pages than this is the last: copying what is written meanwhile hides in
#: the pause behind QEMU's saving of the devices, and each further scan costs the guest more.
FEW_PAGES = 1024
#: Passes of a planned switchover end when one finds no more than this.
SWITCHOVER_GOAL_PAGES = 256
SWITCHOVER_MAX_PASSES = 8


class Loop:
    """Drives a :class:`Checkpointer` by a :class:`Strategy` until it is told to end.

    :param depth: checkpoints that may be in flight when a pause starts.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        execution: GuestExecution,
        strategy: Strategy,
        *,
        depth: int = 2,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.checkpointer = checkpointer
        self.strategy = strategy
        self.guest_running = True
        self._execution = execution
        self._depth = depth
        self._clock = clock
        self._ending = False
        self._passes_s = 0.0
        self._since_collect = 0

    def end(self) -> None:
        """Let :meth:`run` return after the round under way. Own thread (posted)."""
        self._ending = True

    def synchronise(
        self,
        progress: Callable[[int, int], None] | None = None,
        arm: Callable[[], Sequence[OutputBuffer]] | None = None,
    ) -> None:
        """First synchronisation and checkpoint 1; returns when it is committed.

        :param arm: called just before checkpoint 1: holds network output from then on.
        """
        self.checkpointer.synchronise(progress)
        if arm is not None:
            self.checkpointer.arm(arm())
            faultpoint.reach("sync.armed")
        if self.strategy.output_wait_s is not None:
            self.checkpointer.watch(logs=self.strategy.disks_are_output)
        self._round()
        with self.checkpointer.waiting() as wait:
            while not self.checkpointer.committed:
                wait(1.0)

    def run(self) -> None:
        """Rounds until :meth:`end`.

        :raises nova_pmt.exception.PmtError: whatever was posted as a failure, or went
            wrong with the guest. The guest runs on.
        """
        last = self._clock()
        while not self._ending:
            for_output = self._await_round(last)
            if not self._ending and self._may_run():
                self.checkpointer.statistics.output_rounds += for_output
                last = self._round()

    def _await_round(self, last: float) -> bool:
        """Wait until a round is due; whether for output.

        :param last: when the last pause began.
        """
        checkpointer = self.checkpointer
        while not self._ending and self._left(last) > 0:
            if not checkpointer.has_outputs:
                checkpointer.pump(self._left(last))
                continue
            if checkpointer.pressure() >= EARLY_PRESSURE:
                break
            # Looking at buffers that cannot tell by themselves has shown what they hold.
            if (left := self._left(last)) > 0:
                checkpointer.pump(min(left, PRESSURE_POLL_S))
        for_output = self._output_due() - self._passes_s <= self._clock()
        self._hold_back()
        return for_output

    def _left(self, last: float) -> float:
        """Seconds until the round's passes are to begin; the strategy may change its mind."""
        due = min(last + self.strategy.interval_s, self._output_due())
        return due - self._passes_s - self._clock()

    def _output_due(self) -> float:
        """When output wants a pause to begin; infinite where it does not."""
        wait = self.strategy.output_wait_s
        if wait is not None and (since := self.checkpointer.output_since()):
            return since + max(wait, self._passes_s)
        return math.inf

    def _hold_back(self) -> None:
        """``throttle``: too much is in flight, or the cache is at its limit."""
        checkpointer = self.checkpointer
        checkpointer.pump()
        held = False
        with checkpointer.waiting() as wait:
            while not self._ending and (
                checkpointer.in_flight >= self._depth or not checkpointer.has_room()
            ):
                held = checkpointer.throttled = True
                wait(1.0)
        if held:
            checkpointer.statistics.throttled_rounds += 1
        else:
            checkpointer.throttled = False

    def _may_run(self) -> bool:
        """False while the guest's operator has paused it: our ``cont`` would undo that."""
        running = self._execution.running()
        self.checkpointer.pressure()  # a log of ours that failed may have stopped it
        if not running:
            self.checkpointer.pump(PAUSED_POLL_S)
        self.guest_running = running
        return running

    def _round(self) -> float:
        """Passes, pause, transfer. Returns when the pause began."""
        checkpointer = self.checkpointer
        begin = self._clock()
        self._execution.prepare()
        for _ in range(self.strategy.passes):
            if checkpointer.copy_pass() <= FEW_PAGES:
                break
        checkpointer.prepare()
        start = self._clock()
        self._passes_s += 0.2 * (start - begin - self._passes_s)
        if self.strategy.synchronous:
            start = checkpointer.capture_and_commit()
            self._collect()
            return start
        while (checkpoint := checkpointer.capture()) is None:
            # More than the cache can hold. Passes would only send more of it twice.
            checkpointer.drain()
            checkpointer.prepare()
            start = self._clock()
        checkpointer.transfer(checkpoint)
        self._collect()
        return start

    def _collect(self) -> None:
        self._since_collect += 1
        if self._since_collect >= COLLECT_EVERY:
            self._since_collect = 0
            gc.collect(0)

    def final_round(self, timeout_s: float) -> None:
        """The zero-loss round of a planned switchover: the guest stays paused.

        :raises nova_pmt.exception.NotReady: the first synchronisation was not complete.
        :raises nova_pmt.exception.PmtError: it did not work; the guest runs on.
        """
        checkpointer = self.checkpointer
        if not checkpointer.committed:
            raise exception.NotReady("the standby has no whole checkpoint yet")
        for _ in range(SWITCHOVER_MAX_PASSES):
            if checkpointer.copy_pass() <= SWITCHOVER_GOAL_PAGES:
                break
        self._execution.running()
        checkpointer.prepare()
        try:
            checkpoint = checkpointer.capture(resume=False)
            if checkpoint is None:
                raise exception.GuestError("the final checkpoint was not complete")
            faultpoint.reach("switchover.paused")
            checkpointer.transfer(checkpoint)
            deadline = self._clock() + timeout_s
            while checkpointer.in_flight:
                left = deadline - self._clock()
                if left <= 0:
                    raise exception.PeerLost(
                        f"standby did not commit the final checkpoint in {timeout_s:.0f} s"
                    )
                checkpointer.pump(left)
        except BaseException:
            self._execution.resume()
            raise
