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

"""The round: pre-copy passes, the pause, the transfer, the commit.

One object, driven by one thread. Whatever other threads have to say (a slab was sent, a
checkpoint was committed, the link broke) they :meth:`Checkpointer.post`, and it is
handled between steps, never in a pause.

The pause holds: QMP stop, scan, copy of what the passes left, QMP's answer to the save,
the cut of output buffers, QMP cont. The order *protect first, then copy* makes pre-copied
pages safe: a page that is written during or after its copy is reported by the next scan.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nova_pmt import exception, faultpoint
from nova_pmt.checkpoint.cache import SLAB_PAGES, SlabCache
from nova_pmt.checkpoint.epoch import EpochPages, PageTable
from nova_pmt.checkpoint.interfaces import (
    CheckpointSink,
    DiskSource,
    GuestExecution,
    GuestMemory,
    OutputBuffer,
    PageNumbers,
    Pages,
    WriteLog,
)
from nova_pmt.checkpoint.statistics import RoundRecord, Statistics

#: Slabs that the first synchronisation fills before it waits for the network.
SYNC_WINDOW_SLABS = 32
#: At most this many more slabs are backed at a time, between copies.
GROW_STEP_SLABS = 16
#: Free slabs that a pause finds at least.
PAUSE_RESERVE_SLABS = 2
#: A pause that found too little cache lets the guest run on this often before it insists.
MAX_DEFERRALS = 3
#: Bytes of disk blocks and logs that wait to be sent before more is read.
DISK_WINDOW_BYTES = 32 << 20
#: How full logs may be before the first synchronisation sends what they have.
SYNC_LOG_PRESSURE = 0.2
#: How often, in seconds, held output is looked at in a wait; full to the one degree it stops the
#: guest until the wait is over or it is below the other.
PRESSURE_POLL_S = 0.01
STOP_PRESSURE, GO_PRESSURE = 0.9, 0.5
#: Number under which logs are cut in the first synchronisation.
SYNC_EPOCH = 0
#: The first synchronisation ends when a pass finds no more than this, or does not get better.
SYNC_GOAL_PAGES = 1024
SYNC_MAX_PASSES = 30

_NO_PAGES: PageNumbers = np.zeros(0, np.int64)


def _look_up() -> None:
    """Posted only to end a wait."""


@dataclass(frozen=True)
class Times:
    """Clock readings of one pause, in seconds of ``time.perf_counter``."""

    start: float
    stopped: float
    scanned: float
    copied: float
    saved: float
    resumed: float


@dataclass
class InFlight:
    """A checkpoint that is on its way.

    :param paused: its guest stays paused until it is committed.
    :param committed_at: reading of the clock.
    :param held_s: for how long the epoch's oldest output was held.
    """

    epoch: int
    slabs: list[int]
    pages: int
    pause_pages: int
    times: Times
    device_bytes: int
    log_bytes: int = 0
    paused: bool = False
    committed_at: float = 0.0
    held_s: float = 0.0


class Checkpointer:
    """The primary's side of one pair.

    :param cache: holds checkpoints until they are committed.
    :param logs: write logs by number of the disk.
    :param on_round: called with each committed round.
    :param clock: seconds; ``time.perf_counter`` or a test's.
    """

    def __init__(
        self,
        memory: GuestMemory,
        execution: GuestExecution,
        sink: CheckpointSink,
        cache: SlabCache,
        *,
        logs: Mapping[int, WriteLog] | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._memory = memory
        self._execution = execution
        self._sink = sink
        self.cache = cache
        self._logs = dict(logs or {})
        self._log_items = tuple(self._logs.items())
        self._outputs: tuple[OutputBuffer, ...] = tuple(self._logs.values())
        self._queued_bytes = 0
        self._on_round = on_round
        self._clock = clock
        self._table = PageTable(memory.page_count)
        self._numbers: PageNumbers = np.zeros(cache.limit_slabs * SLAB_PAGES, np.int64)
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._flying: dict[int, InFlight] = {}
        self._carry = _NO_PAGES
        self._spilled_slabs = 0
        self._window = cache.limit_slabs
        self._pause_pages_peak = 0.0
        self._deferrals = 0
        self._standing = False
        self._watched: tuple[OutputBuffer, ...] = ()
        #: The guest stands still until the standby has the checkpoint under way. Any thread.
        self.standing = False
        self.statistics = Statistics()
        self.committed = 0
        self.throttled = False
        self.sent_pages = 0
        self._open = self._new_epoch(1)

    def _new_epoch(self, number: int) -> EpochPages:
        return EpochPages(number, self.cache, self._table, self._numbers)

    @property
    def epoch(self) -> int:
        """Number of the checkpoint that the next pause takes."""
        return self._open.number

    @property
    def in_flight(self) -> int:
        """Checkpoints that were taken and are not committed."""
        return len(self._flying)

    # -- events from other threads ------------------------------------------------------

    def post(self, handler: Callable[[], None]) -> None:
        """Have ``handler`` run by the thread of the rounds, between two steps. Any thread."""
        self._events.put(handler)

    def pump(self, timeout_s: float = 0.0) -> None:
        """Handle what was posted; wait up to ``timeout_s`` for a first one.

        :raises nova_pmt.exception.PmtError: whatever a handler raises.
        """
        try:
            handler = (
                self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get(False)
            )
            while True:
                handler()
                handler = self._events.get(False)
        except queue.Empty:
            return

    def commit(self, epoch: int) -> None:
        """The standby has checkpoint ``epoch`` whole: release output, return slabs. Own thread.

        :raises nova_pmt.exception.PeerError: it was not this one's turn.
        """
        flying = self._flying.pop(epoch, None)
        if flying is None or epoch != self.committed + 1:
            raise exception.PeerError(
                f"standby committed checkpoint {epoch}, but {self.committed + 1} is next"
            )
        faultpoint.reach("round.releasing")
        for output in self._outputs:
            flying.held_s = max(flying.held_s, output.release(epoch) or 0.0)
        self.committed = epoch
        needed = len(flying.slabs) + sum(len(other.slabs) for other in self._flying.values())
        self.cache.give_back(flying.slabs)
        self.cache.adapt(needed + len(self._open.slabs))
        flying.committed_at = self._clock()
        if not flying.paused:
            self._record(flying, flying.times.resumed)
        faultpoint.reach("round.committed")

    def _record(self, flying: InFlight, resumed: float) -> None:
        """A round is over: its checkpoint is committed, and its guest runs."""
        times = flying.times
        # The end of the save; where the guest stays paused, the pause goes on from there.
        captured = times.resumed
        waited = max(0.0, flying.committed_at - captured) if flying.paused else 0.0
        record = RoundRecord(
            epoch=flying.epoch,
            started_s=times.start,
            pause_us=(resumed - times.start) * 1e6,
            stop_us=(times.stopped - times.start) * 1e6,
            scan_us=(times.scanned - times.stopped) * 1e6,
            copy_us=(times.copied - times.scanned) * 1e6,
            save_us=(times.saved - times.copied) * 1e6,
            wait_us=waited * 1e6,
            cont_us=(resumed - times.saved - waited) * 1e6,
            pages=flying.pages,
            pause_pages=flying.pause_pages,
            commit_us=(flying.committed_at - captured) * 1e6,
            device_bytes=flying.device_bytes,
            log_bytes=flying.log_bytes,
            output_us=flying.held_s * 1e6,
        )
        self.statistics.add(record)
        if self._on_round is not None:
            self._on_round(record)

    # -- output -------------------------------------------------------------------------

    def arm(self, buffers: Sequence[OutputBuffer]) -> None:
        """Network output is held from now on: before the first pause."""
        self._outputs = (*buffers, *self._logs.values())

    @property
    def has_outputs(self) -> bool:
        """Whether there is output that may press."""
        return bool(self._outputs)

    def pressure(self) -> float:
        """How full the fullest output buffer is, 0 to 1.

        :raises nova_pmt.exception.GuestError: one of them is broken.
        """
        highest = 0.0
        for output in self._outputs:
            if output.broken:
                raise exception.GuestError(
                    f"the guest's output cannot be held any more: {output.broken}",
                    code="OUTPUT_BUFFER_BROKEN",
                    cure="Protection resumes by itself.",
                )
            highest = max(highest, output.pressure)
        return highest

    def watch(self, *, logs: bool) -> None:
        """From now on output ends a :meth:`pump`, and :meth:`output_since` tells of it.

        :param logs: writes to the disks are output, too.
        :raises nova_pmt.exception.GuestError: it cannot be told.
        """
        hidden = () if logs else tuple(self._logs.values())
        self._watched = tuple(output for output in self._outputs if output not in hidden)
        for output in self._watched:
            output.watch(lambda: self.post(_look_up))

    def output_since(self) -> float:
        """When the first output since the last pause came that is watched; 0: none did."""
        times = [since for output in self._watched if (since := output.waiting_since)]
        return min(times, default=0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[float], None]]:
        """For waits on the link: brings :meth:`pump`, which stops the guest while its output
        presses, since only the link can relieve it. The guest runs on when the wait is over.
        """
        stopped = False

        def wait(timeout_s: float) -> None:
            nonlocal stopped
            if self._standing or not self._outputs:
                # (In a pause it stands still already; and whoever asks the monitor anything takes
                # the answer to the save.)
                self.pump(timeout_s)
                return
            pressure = self.pressure()
            if not stopped and pressure >= STOP_PRESSURE and self._execution.running():
                stopped = True
                self._execution.hold()
            elif stopped and pressure < GO_PRESSURE:
                stopped = False
                self._let_run()
            self.pump(min(timeout_s, PRESSURE_POLL_S))

        try:
            yield wait
        finally:
            if stopped:
                self._let_run()

    def _let_run(self) -> None:
        """Let a guest run on that we stopped; told twice, for nothing is worse than one that
        stays stopped."""
        try:
            self._execution.resume()
        except BaseException:
            with contextlib.suppress(exception.GuestError):
                self._execution.resume()
            raise

    # -- disks, before the first checkpoint ---------------------------------------------

    def copy_disks(
        self,
        source: DiskSource,
        *,
        bytes_per_s: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """First copy of the disks, while the guest writes on them and their logs are on.

        A block is sent as soon as it was read, and logs only behind it: what the guest wrote
        after the block was read comes later, and so the standby has it right.

        :param bytes_per_s: most that is sent; 0 for no limit.
        :param progress: called with bytes copied and bytes to copy.
        """
        started, done = self._clock(), 0
        for disk, offset, data in source.blocks():
            size = len(data)
            self._sink.send_block(disk, offset, data, self._queue(size))
            faultpoint.reach("sync.disk")
            done += size
            self._await_queue()
            while bytes_per_s and (left := started + done / bytes_per_s - self._clock()) > 0:
                self.pump(min(left, 0.05))
                self._relieve_logs()
            self._relieve_logs()
            if progress is not None:
                progress(done, max(done, source.total_bytes))

    def _queue(self, size: int) -> Callable[[], None]:
        """Count bytes that wait to be sent; returns what takes them off again."""

        def sent() -> None:
            self._queued_bytes -= size

        self._queued_bytes += size
        return lambda: self.post(sent)

    def _await_queue(self) -> None:
        self.pump()
        with self.waiting() as wait:
            while self._queued_bytes > DISK_WINDOW_BYTES:
                wait(1.0)

    def _relieve_logs(self) -> None:
        """Send what the logs have ahead of checkpoint 1, when they have much."""
        if self._logs and self.pressure() >= SYNC_LOG_PRESSURE:
            self.send_logs_ahead()

    def send_logs_ahead(self) -> None:
        """Send the logs so far; only before checkpoint 1, on which nothing depends yet.

        Only of a guest that stands still a log is known to end with a whole entry.
        """
        running = self._execution.running()
        try:
            if running:
                self._execution.hold()
            for log in self._logs.values():
                log.cut(SYNC_EPOCH)
        finally:
            if running:
                self._let_run()
        self._send_logs(SYNC_EPOCH, 1, windowed=True)
        for log in self._logs.values():
            log.release(SYNC_EPOCH)

    def _send_logs(self, cut: int, epoch: int, *, windowed: bool = False) -> int:
        total = 0
        for disk, log in self._log_items:
            for part in log.segments(cut):
                size = len(part)
                total += size
                self._sink.send_log(epoch, disk, part, self._queue(size) if windowed else None)
                if windowed:
                    self._await_queue()
        return total

    # -- while the guest runs -----------------------------------------------------------

    def synchronise(self, progress: Callable[[int, int], None] | None = None) -> None:
        """First synchronisation: pre-copy of everything into checkpoint 1; it is left open.

        The standby writes checkpoint 1 straight into its image, which nothing
        depends on before the first commit; so it is sent in parts through a small window.

        :param progress: called with pages sent and pages to send.
        """
        self._window = min(self.cache.limit_slabs, SYNC_WINDOW_SLABS)
        self._memory.scan()
        todo = self._memory.populated()
        total = len(todo)
        for at in range(0, total, SLAB_PAGES):
            self._send_unless_zero(todo[at : at + SLAB_PAGES])
            self._relieve_logs()
            faultpoint.reach("sync.streaming")
            if progress is not None:
                progress(min(at + SLAB_PAGES, total), total)
        before = total
        for _ in range(SYNC_MAX_PASSES):
            found = self.copy_pass()
            self._relieve_logs()
            if found <= SYNC_GOAL_PAGES or found > 0.9 * before:
                break
            before = found
        self._spill()
        if self._logs:
            self.send_logs_ahead()
        with self.waiting() as wait:
            while self._spilled_slabs:
                wait(1.0)
        self._window = self.cache.limit_slabs

    def _send_unless_zero(self, pages: PageNumbers) -> None:
        """Send pages for the first time: the standby's memory is all zeros, as many of them are."""
        self.pump()
        with self.waiting() as wait:
            while True:
                if not self.cache.free_slabs and self._spilled_slabs < self._window:
                    self.cache.grow(1)
                slab = self.cache.take()
                if slab is not None:
                    break
                wait(1.0)
        first = slab * SLAB_PAGES
        data = self.cache.pages[first : first + len(pages)]
        self._memory.copy(pages, data)
        kept = data.view(np.uint64).any(axis=1)
        count = int(np.count_nonzero(kept))
        if count == 0:
            self.cache.give_back((slab,))
            return
        if count < len(pages):
            pages = pages[kept]
            data[:count] = data[kept]
        self._spill_slab(slab, self._open.number, pages, data[:count])

    def copy_pass(self) -> int:
        """One pre-copy pass: protect and copy what was written, while the guest runs.

        :returns: how many pages there were.
        """
        pages = self._take_carry(self._memory.scan())
        self._copy(pages)
        faultpoint.reach("round.pass")
        return len(pages)

    def _take_carry(self, pages: PageNumbers) -> PageNumbers:
        if len(self._carry):
            pages = np.union1d(self._carry, pages)
            self._carry = _NO_PAGES
        return pages

    def _copy(self, pages: PageNumbers) -> None:
        """Copy pages into the open epoch; waits for room where there is none."""
        while True:
            pages = pages[self._open.add(self._memory, pages) :]
            if not len(pages):
                return
            self._carry = pages.copy()  # so that they are not lost when this is interrupted
            self._make_room(len(pages))
            self._carry = _NO_PAGES

    def _make_room(self, pages: int) -> None:
        """Back more slabs; at the limit wait for a commit, or send what the epoch has so far."""
        self.pump()
        with self.waiting() as wait:
            while not self.cache.free_slabs:
                room = self._window - len(self._open.slabs) - self._spilled_slabs
                if room > 0:
                    wanted = min(-(-pages // SLAB_PAGES), GROW_STEP_SLABS)
                    if self.cache.grow(min(wanted, room)):
                        return
                if self._flying:
                    # a commit is the cheapest way to room: nothing is sent twice
                    self.throttled = True
                    wait(1.0)
                elif self._open.slabs:
                    self._spill()
                    wait(0.05)
                else:
                    wait(1.0)

    def _spill(self) -> None:
        """Send the open epoch's pages ahead of its pause; later copies replace them."""
        chunks, number = self._open.chunks(), self._open.number
        slabs = self._open.detach()
        for slab, (numbers, data) in zip(slabs, chunks, strict=True):
            self._spill_slab(slab, number, numbers, data)

    def _spill_slab(self, slab: int, epoch: int, numbers: PageNumbers, data: Pages) -> None:
        def unspill() -> None:
            self._spilled_slabs -= 1
            self.cache.give_back((slab,))

        self._spilled_slabs += 1
        self.sent_pages += len(numbers)
        self._sink.send_pages(epoch, numbers, data, lambda: self.post(unspill))

    def drain(self) -> None:
        """After a pause that found too little cache: have all of it free for the next one."""
        self._spill()
        with self.waiting() as wait:
            while self._spilled_slabs or self._flying:
                self.throttled = True
                wait(1.0)

    def prepare(self) -> None:
        """Have slabs ready for the pause, from what the last ones needed."""
        expected = int(self._pause_pages_peak * 1.25) // SLAB_PAGES + PAUSE_RESERVE_SLABS
        missing = expected - self.cache.free_slabs
        if missing > 0:
            self.cache.grow(missing)

    def has_room(self) -> bool:
        """Whether a round of the recent size fits under the limit now."""
        return not self._flying or self.cache.available_slabs >= max(
            PAUSE_RESERVE_SLABS, *(len(other.slabs) for other in self._flying.values())
        )

    # -- the pause ----------------------------------------------------------------------

    def capture(self, *, resume: bool = True) -> InFlight | None:
        """The pause.

        :param resume: False leaves the guest paused (switchover).
        :returns: the checkpoint, to be given to :meth:`transfer`; None when the cache had no
            room and the guest was let run on: :meth:`drain` and try again, without passes.
        :raises nova_pmt.exception.GuestError: it failed; the guest runs on.
        """
        execution, clock, epoch = self._execution, self._clock, self._open
        insist = not resume or self._deferrals >= MAX_DEFERRALS
        self._sink.hold()
        complete = False
        start = clock()
        try:
            execution.pause()
            stopped = clock()
            faultpoint.reach("round.paused")
            pages = self._memory.scan()
            scanned = clock()
            faultpoint.reach("round.scanned")
            if len(self._carry):
                pages = self._take_carry(pages)
            added = epoch.add(self._memory, pages)
            complete = added == len(pages)
            if not complete:
                self._carry = pages[added:].copy()
                if insist:
                    self._drain_paused()
                    complete = True
            faultpoint.reach("round.copied")
            copied = clock()
            if complete:
                for output in self._outputs:
                    output.cut(epoch.number)
            execution.saved()
            saved = clock()
            faultpoint.reach("round.saved")
            if resume or not complete:
                execution.resume()
            resumed = clock()
        except BaseException:
            # Whatever went wrong, and whether or not QEMU got the stop: the guest comes first.
            try:
                with contextlib.suppress(exception.GuestError):
                    execution.resume()
            finally:
                self._sink.go_on()
            raise
        self._sink.go_on()
        if resume:
            self._resumed()
        pause_pages = len(pages)
        self._pause_pages_peak = max(float(pause_pages), self._pause_pages_peak * 0.9)
        if not complete:
            self._deferrals += 1
            self.statistics.deferred += 1
            return None
        self._deferrals = 0
        return InFlight(
            epoch.number,
            [],
            epoch.page_count,
            pause_pages,
            Times(start, stopped, scanned, copied, saved, resumed),
            0,
        )

    def _drain_paused(self) -> None:
        """The guest outruns cache and link: keep it paused until the rest is through."""
        self._sink.go_on()
        self._standing = True
        try:
            pages, self._carry = self._carry, _NO_PAGES
            self._copy(pages)
        finally:
            self._standing = False
        self._sink.hold()

    @staticmethod
    def _resumed() -> None:
        faultpoint.reach("round.resumed")

    def capture_and_commit(self) -> float:
        """A pause that lasts until the standby has committed (Kemari): capture, transfer, commit.

        What is said elsewhere of a pause (nothing is sent, read or handled in it) holds up to the
        end of the save.

        :returns: when it began.
        :raises nova_pmt.exception.PmtError: whatever was posted as a failure, or went wrong with
            the guest. The guest runs on.
        """
        checkpoint: InFlight | None = None
        self.standing = True
        try:
            checkpoint = self.capture(resume=False)
            assert checkpoint is not None  # left paused, it waits until there is room
            checkpoint.paused = True
            self.transfer(checkpoint)
            while self._flying:
                self.pump(1.0)
        except BaseException:
            with contextlib.suppress(exception.GuestError):
                self._let_run()
            if checkpoint is not None:
                if checkpoint.committed_at:
                    self._record(checkpoint, self._clock())
                checkpoint.paused = False  # if it is committed yet it counts as any other
            raise
        finally:
            self.standing = False
        self._let_run()
        self._resumed()
        self._record(checkpoint, self._clock())
        return checkpoint.times.start

    def transfer(self, checkpoint: InFlight) -> None:
        """Hand a captured checkpoint to the sink; returns at once. The next epoch begins."""
        state = self._execution.device_state()
        checkpoint.device_bytes = len(state)
        faultpoint.reach("round.sending")
        for numbers, data in self._open.chunks():
            self.sent_pages += len(numbers)
            self._sink.send_pages(checkpoint.epoch, numbers, data, None)
        checkpoint.log_bytes = self._send_logs(checkpoint.epoch, checkpoint.epoch)
        checkpoint.slabs = self._open.detach()
        self._flying[checkpoint.epoch] = checkpoint
        self._open = self._new_epoch(checkpoint.epoch + 1)
        self._sink.send_commit(checkpoint.epoch, state)
        faultpoint.reach("round.sent")
