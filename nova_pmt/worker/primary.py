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

"""The primary worker: protects one running guest.

Two threads that matter. The main thread runs the rounds. The I/O thread owns the link, the
agent's socket and the watch on QEMU; what it learns it posts to the main thread. Only it
computes checksums, encrypts and sends, and it begins nothing while a pause lasts.

How it can end, and who then goes on, is decided here and nowhere else:

* on request, or for a fault of ours: the standby is told, and answers; if it does not answer the
  arbiter is asked. The guest runs on, untouched.
* the peer is lost: the arbiter is asked. Won: the guest runs on alone. Lost: the standby took
  over; this domain is destroyed. Nobody to ask: the guest is held until there is.
* QEMU died: the standby is told at once, and goes on.

What the guest puts out is let go (:meth:`_let_go`) only when the guest may run on alone. A worker
that dies takes its ends of the network buffers along, so that nothing leaves the guest until its
agent has asked the arbiter.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from oslo_log import log

from nova_pmt import exception, faultpoint
from nova_pmt.agent.control import Lines, PrimarySpec
from nova_pmt.arbiter.load import load as load_arbiter
from nova_pmt.checkpoint.cache import SLAB_BYTES, SlabCache
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, OutputBuffer
from nova_pmt.checkpoint.loop import Loop
from nova_pmt.checkpoint.round import Checkpointer
from nova_pmt.checkpoint.strategies.base import Strategy, StrategyOptions
from nova_pmt.codecs.base import Codec
from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest import layout as guest_layout
from nova_pmt.guest import prelude, process, vmstate
from nova_pmt.guest.execution import make_execution
from nova_pmt.guest.memory import TrackedMemory
from nova_pmt.guest.monitor import DirectMonitor
from nova_pmt.guest.tracker import MemoryTracker
from nova_pmt.plugins import load_class
from nova_pmt.replication import packing, protocol, tls
from nova_pmt.replication.link import Buffers, Link, RawFrame, read_frame
from nova_pmt.replication.protocol import Header, Type
from nova_pmt.replication.sender import Sender
from nova_pmt.worker import io, pausing
from nova_pmt.worker.outputs import Outputs
from nova_pmt.worker.side import Side

LOG = log.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
BYE_TIMEOUT_S = 1.0
ACTIVATION_TIMEOUT_S = 15.0
FINAL_COMMIT_TIMEOUT_S = 30.0
STATS_EVERY_S = 0.5
ARBITER_RETRY_S = 0.5
QEMU_END_TIMEOUT_S = 2.0
MIB = 1 << 20


class _Unprotect(Exception):
    """Protection shall end.

    :param ordered: by the operator, and not because the agent has ended.
    """

    def __init__(self, reason: str, *, ordered: bool) -> None:
        super().__init__(reason)
        self.ordered = ordered


class _Switchover(Exception):
    """Somebody wants the standby to go on."""


class Primary(Side):
    """See the module's text.

    :param agent: socket to the agent.
    """

    def __init__(self, conf: Any, spec: PrimarySpec, agent: socket.socket, lines: Lines) -> None:
        self._conf = conf
        self._spec = spec
        self._pair = spec.pair
        self._selector = selectors.DefaultSelector()
        self.agent = io.AgentChannel(agent, lines, self._on_command, self._on_agent_gone)
        self.agent.register(self._selector)
        self._arbiter = load_arbiter(conf)
        self._link: Link | None = None
        self._loop: Loop | None = None
        self._checkpointer: Checkpointer | None = None
        self._answers: dict[Type, dict[str, Any]] = {}
        self._answered = threading.Condition()
        self._ended = threading.Event()
        self._pending: list[Callable[[], None]] = []
        self._link_failure: exception.PeerError | None = None
        self._sender: Sender | None = None
        self._may_activate = False
        self._outputs: Outputs | None = None
        self._images: object = None
        self._codec: tuple[str, Codec] | None = None
        self._progress_at = 0.0
        self._last_commit = time.monotonic()
        self._rate_from = (time.monotonic(), 0)

    # -- frames from the standby (I/O thread) -------------------------------------------

    def buffers(self, header: Header) -> Buffers:
        """Every payload that a standby sends is small."""
        return [memoryview(bytearray(header.length))]

    def frame(self, header: Header, payload: Buffers) -> None:
        """A frame from the standby."""
        if header.type is Type.COMMITTED:
            epoch = header.epoch
            if self._sender is None:
                raise exception.PeerError("standby committed a checkpoint before there was one")
            self._sender.received(epoch, header.value)
            self._post(lambda: self._on_committed(epoch))
        elif header.type in (Type.BYE, Type.ACTIVATED, Type.ERROR):
            data = protocol.unpack_json(payload[0]) if payload else {}
            with self._answered:
                self._answers[header.type] = data
                self._answered.notify_all()
            if header.type is Type.ERROR:
                error = exception.from_dict(data)
                raise exception.PeerError(error.message, code=error.code, cure=error.cure)
            if header.type is Type.ACTIVATED and not self._may_activate:
                raise exception.PeerLost("the standby went on, by order of its operator")
            if header.type is Type.BYE:
                raise exception.PeerLost(f"the standby ended: {data.get('reason', 'no reason')}")
        elif header.type is not Type.HEARTBEAT:
            raise exception.ProtocolMismatch(f"standby sent a {header.type.name} frame")

    def _on_committed(self, epoch: int) -> None:
        self._last_commit = time.monotonic()
        assert self._checkpointer is not None
        if self._link_failure is not None:
            # It came before the link broke, and is heard after it: who knows what the standby does
            # by now. If we win, all is let out anyway.
            raise self._link_failure
        if self._link is not None and (self._link.stood_still or self._link.overdue):
            # It was said before we stood still: what is released now could come after what the
            # standby has sent, should it have gone on.
            raise exception.PeerLost("commits are heard late; the standby may have gone on")
        self._checkpointer.commit(epoch)

    # -- the I/O thread -----------------------------------------------------------------

    def _post(self, handler: Callable[[], None]) -> None:
        """Have the main thread do something between two steps."""
        if self._checkpointer is not None:
            self._checkpointer.post(handler)
        else:
            self._pending.append(handler)

    def _post_failure(self, error: BaseException) -> None:
        def fail() -> None:
            raise error

        self._post(fail)

    def _on_command(self, message: dict[str, Any]) -> None:
        command = message.get("command")
        if command == "unprotect":
            self._post_failure(_Unprotect("on request", ordered=True))
        elif command == "switchover":
            if self._checkpointer is None or not self._checkpointer.committed:
                refusal = exception.NotReady("the first synchronisation is not complete")
                self.agent.tell("error", error=refusal.to_dict())
                return
            self._post_failure(_Switchover())
        else:
            LOG.warning("%s: agent sent unknown command %r", self._pair.uuid, command)

    def _on_agent_gone(self) -> None:
        self._post_failure(_Unprotect("nova-pmt-agent has ended", ordered=False))

    def _on_devices(self, what: str) -> None:
        self._post_failure(exception.DevicesChanged(what))

    def _on_qemu_end(self) -> None:
        self._post_failure(exception.GuestGone("the guest's QEMU died"))

    def _run_io(self) -> None:
        next_stats = time.monotonic() + STATS_EVERY_S
        while not self._ended.is_set():
            try:
                wait = 0.1
                if self._link is not None and self._link_failure is None:
                    wait = max(0.001, self._link.tick())
                io.dispatch(self._selector, min(wait, 0.1))
                standing = self._checkpointer is not None and self._checkpointer.standing
                paused = standing or (self._link is not None and self._link.held)
                if time.monotonic() >= next_stats and not paused:
                    next_stats = time.monotonic() + STATS_EVERY_S
                    self._tell_stats()
            except exception.PeerError as error:
                self._lose_link(error)
            except Exception as error:
                LOG.exception("%s: I/O failed", self._pair.uuid)
                self._lose_link(exception.PeerError(f"I/O with the standby failed: {error}"))

    def _lose_link(self, error: exception.PeerError) -> None:
        if self._link_failure is not None:
            return
        self._link_failure = error
        LOG.info("%s: the link has ended: %s", self._pair.uuid, error.message)
        try:
            if self._link is not None:
                self._link.close()
        finally:  # the main thread must hear of it, whatever fails here: it may wait for just that
            with self._answered:
                self._answered.notify_all()
            self._post_failure(error)

    def _tell_stats(self) -> None:
        checkpointer, loop, link = self._checkpointer, self._loop, self._link
        outputs = self._outputs
        if checkpointer is None or loop is None or link is None or outputs is None:
            return
        now, sent = time.monotonic(), link.sent_bytes
        then, before = self._rate_from
        self._rate_from = (now, sent)
        cache, stats = checkpointer.cache, checkpointer.statistics.summary()
        mib = SLAB_BYTES / MIB
        self.agent.tell(
            "stats",
            epoch=checkpointer.epoch,
            committed=checkpointer.committed,
            in_flight=checkpointer.in_flight,
            strategy=self._spec.strategy,
            interval_ms=round(loop.strategy.interval_s * 1e3, 3),
            throttled=checkpointer.throttled,
            bytes_per_s=round((sent - before) / max(now - then, 1e-3)),
            sent_bytes=sent,
            cache={
                "used_mib": cache.used_slabs * mib,
                "backed_mib": cache.backed_slabs * mib,
                "peak_mib": cache.peak_slabs * mib,
                "limit_mib": cache.limit_slabs * mib,
            },
            codec=self._sender.codec if self._sender else None,
            delta_cache_mib=round(self._sender.delta_bytes / MIB, 1) if self._sender else 0.0,
            peer_timeout_ms=round(link.silence_limit_s * 1e3),
            last_commit_age_ms=round((now - self._last_commit) * 1e3, 1),
            guest_running=loop.guest_running,
            **outputs.summary(),
            **stats,
        )

    # -- the main thread ----------------------------------------------------------------

    def run(self) -> int:
        """Protect the guest until protection ends. Returns the process's exit status."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._ended.set)
            thread = threading.Thread(target=self._run_io, name="io", daemon=True)
            thread.start()
            try:
                connection = guest_domain.connect(self._conf.guest.libvirt_uri)
                stack.callback(connection.close)
                self._domain = guest_domain.Domain.find(connection, self._pair.uuid)
                self._pid = self._domain.pid()
                self._started = process.start_time(self._pid)
                self._protect(stack)
            except exception.PmtError as error:
                # Only what fails before the standby could ever take over comes here.
                self._end_with_error(error)
            self._ended.set()
            thread.join(2.0)
        return 0

    def _connect(self) -> socket.socket:
        peer = self._pair.standby_host
        try:
            sock = socket.create_connection(
                (self._spec.address, self._spec.port), HANDSHAKE_TIMEOUT_S
            )
        except OSError as error:
            raise exception.PeerLost(
                f"standby on {peer} ({self._spec.address}:{self._spec.port}) "
                f"cannot be reached: {error}"
            ) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return tls.connect(self._conf, sock, peer)

    def _handshake(self, sock: socket.socket, layout: guest_layout.Layout) -> None:
        blocks = [block.to_dict() for block in layout.blocks]
        try:
            assert self._outputs is not None
            codecs = packing.available(self._conf.replication.codecs)
            names = list(codecs)
            sock.sendall(protocol.hello(asdict(self._pair), blocks, self._outputs.specs, names))
        except OSError as error:
            raise tls.refused(error, self._pair.standby_host) from error
        header, payload = read_frame(sock)
        data = protocol.unpack_json(payload)
        if header.type is Type.ERROR:
            raise exception.from_dict(data)
        if header.type is not Type.WELCOME or data.get("protocol") != protocol.VERSION:
            raise exception.ProtocolMismatch(f"standby answered HELLO with {header.type.name}")
        self._images = data.get("images")
        self._codec = packing.agreed(codecs, data.get("codec"))

    def _protect(self, stack: contextlib.ExitStack) -> None:
        conf, spec = self._conf, self._spec
        directory = guest_domain.guest_directory(
            conf.guest.runtime_directory, self._pair.uuid, self._pid
        )
        monitor = stack.enter_context(self._domain.monitor(conf.guest.runtime_directory))
        self._monitor = monitor
        layout = guest_layout.discover(monitor)
        prelude.check(monitor)
        # Before the devices are looked at, so that none comes or goes unseen.
        stack.callback(self._domain.watch_devices(self._on_devices))
        outputs = self._outputs = Outputs(
            conf, self._pair.uuid, self._domain.xml(), self._pid, monitor, directory
        )
        stack.callback(outputs.close)
        sock = self._connect()
        try:
            self._handshake(sock, layout)
            self._link = Link(
                sock,
                self,
                peer=self._pair.standby_host,
                heartbeat_s=conf.replication.heartbeat_ms / 1e3,
                timeout_s=conf.replication.peer_timeout_ms / 1e3,
                strict=True,
            )
        except BaseException:
            sock.close()
            raise
        stack.callback(self._link.close)
        # Heartbeats from now on: what follows takes long for a large guest, or on a busy host.
        self._link.register(self._selector)
        self._state("syncing", f"first synchronisation to {self._pair.standby_host}")
        tracker_class = load_class(
            "nova_pmt.memory_trackers", conf.checkpoint.memory_tracker, MemoryTracker
        )
        tracker_class.check()
        tracker = tracker_class(self._pid, layout, threads=conf.checkpoint.scan_threads)
        taken = prelude.take(monitor, layout, directory)
        faultpoint.reach("sync.prelude")
        tracker.attach()
        self._tracker = tracker
        faultpoint.reach("sync.attached")
        memory = TrackedMemory(layout, self._pid, tracker)
        stack.callback(memory.close)
        self._execution = make_execution(monitor, directory)
        stack.callback(self._execution.close)
        limit = int(spec.options.get("cache_limit_mib", conf.checkpoint.cache_limit_mib))
        cache = SlabCache(limit * MIB)
        stack.callback(cache.close)
        strategy = load_class("nova_pmt.strategies", spec.strategy, Strategy)(
            StrategyOptions(
                interval_ms=spec.options.get("interval_ms", conf.checkpoint.interval_ms),
                max_pause_ms=spec.options.get("max_pause_ms", conf.checkpoint.max_pause_ms),
                epoch_limit_ms=spec.options.get("epoch_limit_ms", conf.checkpoint.epoch_limit_ms),
                passes=int(spec.options.get("passes", conf.checkpoint.passes)),
            )
        )
        if strategy.output_wait_s is not None and strategy.disks_are_output:
            outputs.await_writes()
        self._sender = Sender(
            self._link,
            memory.page_count,
            conf.replication.delta_cache_mib * MIB // PAGE_SIZE,
            self._codec,
        )
        self._checkpointer = Checkpointer(
            memory,
            self._execution,
            self._sender,
            cache,
            logs=dict(outputs.logs),
            on_round=strategy.observe,
        )
        for handler in self._pending:  # what came before there was someone to post it to
            self._checkpointer.post(handler)
        self._loop = Loop(
            self._checkpointer, self._execution, strategy, depth=conf.checkpoint.pipeline_depth
        )
        head = vmstate.activation_head(taken)
        self._link.send(RawFrame(Header(Type.PRELUDE, len(head)).pack() + head))
        io.watch_process(self._selector, self._pid, self._on_qemu_end)
        if isinstance(monitor, DirectMonitor):
            # The socket closes tens of ms before the process is gone.
            stack.callback(io.watch_hangup(self._selector, monitor.fileno(), self._on_qemu_end))
        self._link.go_on()  # wakes the I/O thread
        self._rounds()

    def _arm(self) -> Sequence[OutputBuffer]:
        """Just before checkpoint 1: when it is committed the standby may go on."""
        assert self._link is not None
        assert self._outputs is not None
        self._link.in_earnest()
        return self._outputs.arm()

    def _progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._progress_at < 0.2 and done < total:
            return
        self._progress_at = now
        assert self._link is not None
        self.agent.tell(
            "progress", done_pages=done, total_pages=total, sent_bytes=self._link.sent_bytes
        )

    def _disk_progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._progress_at < 0.2 and done < total:
            return
        self._progress_at = now
        assert self._link is not None
        self.agent.tell(
            "progress", done_bytes=done, total_bytes=total, sent_bytes=self._link.sent_bytes
        )

    def _copy_disks(self) -> None:
        """Logs on, then the first copy: all, or what changed since the standby's images."""
        outputs, checkpointer, link = self._outputs, self._checkpointer, self._link
        assert outputs is not None
        assert checkpointer is not None
        assert link is not None
        if not outputs.disks:
            return
        outputs.record_images()
        note = outputs.changes(self._images)
        outputs.start_logs(self._pair.generation)
        link.send(RawFrame(protocol.pack_json(Type.COPY, {"full": note is None})))
        LOG.info(
            "%s: copying %s", self._pair.uuid, "its disks" if note is None else "what has changed"
        )
        with outputs.source(note) as source:
            checkpointer.copy_disks(
                source,
                bytes_per_s=float(self._conf.disk.copy_limit_mib_s * MIB),
                progress=self._disk_progress,
            )
        outputs.forget_changes()

    def _rounds(self) -> None:
        """Rounds until something ends them; then decide who goes on."""
        assert self._loop is not None
        pausing.prepare()
        assert self._outputs is not None
        try:
            self._copy_disks()
            self._loop.synchronise(self._progress, self._arm)
            self._state("protected", "first checkpoint committed", epoch=1)
            while not self._switchover_ordered():
                LOG.warning("%s: paused by its operator: no switchover", self._pair.uuid)
                refusal = exception.NotRunning(
                    "the guest is paused by its operator and cannot be switched over",
                    cure="Resume the guest, then try again.",
                )
                self.agent.tell("error", error=refusal.to_dict())
            self._switchover()
        except _Unprotect as request:
            self._leave(str(request), "unprotected", keep=not request.ordered)
        except exception.PeerError as error:
            self.agent.tell("error", error=error.to_dict())
            self._claim_or_yield(error.message)
        except exception.GuestGone as error:
            self._guest_gone(error)
        except Exception as error:
            LOG.exception("%s: protection failed", self._pair.uuid)
            typed = (
                error
                if isinstance(error, exception.PmtError)
                else exception.GuestError(f"{type(error).__name__}: {error}")
            )
            if process.has_ended(self._pid, self._started):
                self._guest_gone(exception.GuestGone(typed.message))
                return
            self.agent.tell("error", error=typed.to_dict())
            self._leave(typed.message, "primary_alone")

    def _switchover_ordered(self) -> bool:
        """Rounds until a switchover is ordered; whether it can be done."""
        assert self._loop is not None
        try:
            while True:
                self._loop.run()
        except _Switchover:
            return self._execution.running()

    def _qemu_ended(self) -> bool:
        """Whether QEMU is gone for certain; a broken monitor alone is no proof of it."""
        deadline = time.monotonic() + QEMU_END_TIMEOUT_S
        while not process.has_ended(self._pid, self._started):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    # -- endings ------------------------------------------------------------------------

    def _wait_answer(self, kinds: tuple[Type, ...], timeout_s: float) -> Type | None:
        """Wait for one of these frames; None when the link broke or the time is over."""
        deadline = time.monotonic() + timeout_s
        with self._answered:
            while True:
                for kind in kinds:
                    if kind in self._answers:
                        return kind
                left = deadline - time.monotonic()
                if left <= 0 or self._link_failure is not None:
                    return None
                self._answered.wait(left)

    def _disarm(self) -> None:
        """Take the tracker out of QEMU."""
        try:
            self._tracker.detach()
        except (exception.PmtError, OSError) as error:
            LOG.warning("%s: userfaultfd stays in QEMU until it ends: %s", self._pair.uuid, error)

    def _let_go(self, state: str, reason: str, *, keep: bool = True, paused: bool = False) -> None:
        """The guest may run on alone: let out what is held, let go of its disks, and say so.

        :param keep: note what it writes from here on, for the next synchronisation.
        :param paused: the guest was paused by us, and runs on now.
        """
        assert self._outputs is not None
        try:
            self._outputs.open(self._execution.resume, keep=keep)
            if paused:
                self._execution.resume()
        except exception.GuestError as error:
            LOG.error("%s: its output is not let go: %s", self._pair.uuid, error)
            self.agent.tell("error", error=error.to_dict())
            # Not a good end: the agent has to free the guest, and tries until it can.
            state, reason = "error", f"{reason}; its output is not let go: {error.message}"
        self._state(state, reason)

    def _leave(self, reason: str, state: str, *, keep: bool = True) -> None:
        """End protection; the guest runs on. The standby must know, or have lost."""
        assert self._link is not None
        self._disarm()
        self._link.send(RawFrame(protocol.pack_json(Type.BYE, {"reason": reason, "keep": keep})))
        if self._wait_answer((Type.BYE,), BYE_TIMEOUT_S) is Type.BYE:
            self._let_go(state, reason, keep=keep)
            return
        self._claim_or_yield(reason, state, keep=keep)

    def _claim_or_yield(
        self,
        reason: str,
        state: str = "primary_alone",
        *,
        paused: bool = False,
        keep: bool = True,
    ) -> None:
        """The standby may or may not live: whoever claims first goes on.

        :param paused: the guest was paused by us, and runs on when it may.
        """
        while True:
            if process.has_ended(self._pid, self._started):
                # Never claim for a dead guest: the standby is the one that can go on.
                self._state("error", f"{reason}; and the guest's QEMU died")
                return
            try:
                won = self._arbiter.claim(
                    self._pair.uuid, self._pair.generation, "primary", reason=reason
                )
                break
            except exception.ArbiterUnavailable as error:
                if self._conf.arbiter.on_isolation == "release":
                    LOG.critical(
                        "%s: goes on, as [arbiter] on_isolation says: %s", self._pair.uuid, error
                    )
                    won = True
                    break
                if self._forced():
                    LOG.warning("%s: let go without the arbiter, on request", self._pair.uuid)
                    won = True
                    break
                if not paused:
                    # Neither peer nor arbiter: the standby may be running. What this guest sends
                    # stays held; it is stopped, too, so as not to do what will be taken back.
                    LOG.error("%s: guest is held: %s", self._pair.uuid, error)
                    self.agent.tell("error", error=error.to_dict())
                    with contextlib.suppress(exception.GuestError):
                        paused = self._execution.running()
                        self._monitor.execute("stop")
                self._tell_stats()  # so that the agent knows that we live
                time.sleep(ARBITER_RETRY_S)
        if not won:
            self._yield(reason)
            return
        self._disarm()
        self._let_go(state, reason, keep=keep, paused=paused)

    def _forced(self) -> bool:
        """Whether the operator wants the guest to run whatever the arbiter says."""
        assert self._checkpointer is not None
        try:
            self._checkpointer.pump()
        except _Unprotect as request:
            return request.ordered
        except (exception.PmtError, _Switchover):
            return False
        return False

    def _yield(self, reason: str, **details: Any) -> None:
        """The standby goes on: end this domain."""
        with contextlib.suppress(exception.GuestError):
            self._domain.destroy()
        self._abandon()
        self._state("standby_active", reason, **details)

    def _abandon(self) -> None:
        if self._outputs is not None:
            self._outputs.abandon()

    def _guest_gone(self, error: exception.GuestGone) -> None:
        assert self._link is not None
        if not self._qemu_ended():
            self.agent.tell("error", error=error.to_dict())
            self._leave(f"{error.message}, but QEMU lives", "primary_alone")
            return
        detected = time.monotonic()
        if self._monitor.saw_event("SHUTDOWN"):
            # Told to by its owner, by the guest itself or by libvirt: not a failure.
            # Its next QEMU knows nothing of what was written: the standby's images are of no use.
            farewell = {"reason": "the guest was shut down", "keep": False}
            self._link.send(RawFrame(protocol.pack_json(Type.BYE, farewell)), urgent=True)
            self._wait_answer((Type.BYE,), BYE_TIMEOUT_S)
            self._abandon()
            if self._outputs is not None:
                self._outputs.forget_images()
            self._state("ended", "the guest was shut down")
            return
        reason = "the guest's QEMU died"
        self._may_activate = True
        self._link.send(
            RawFrame(protocol.pack_json(Type.GUEST_DIED, {"reason": reason})), urgent=True
        )
        self._state("failing_over", reason, detected_at=detected)
        answer = self._wait_answer((Type.ACTIVATED, Type.ERROR, Type.BYE), ACTIVATION_TIMEOUT_S)
        self._abandon()
        if answer is Type.ACTIVATED:
            self._state("standby_active", reason, **self._answers[Type.ACTIVATED])
            return
        if answer is None:
            # It may have said so, and ended, while we were sending what it did not read any more.
            with contextlib.suppress(exception.ArbiterUnavailable):
                if self._arbiter.winner(self._pair.uuid, self._pair.generation) == "standby":
                    self._state("standby_active", f"{reason}; the standby's answer was lost")
                    return
        self.agent.tell("error", error=error.to_dict())
        self._state("error", f"{reason}; the standby did not say that it goes on")

    def _switchover(self) -> None:
        """Planned: a final round, then the standby goes on. Nothing is lost."""
        assert self._loop is not None
        assert self._link is not None
        assert self._checkpointer is not None
        self._state("failing_over", "planned switchover")
        started = time.monotonic()
        self._may_activate = True
        try:
            self._loop.final_round(FINAL_COMMIT_TIMEOUT_S)
        except _Unprotect as request:
            self._leave(str(request), "unprotected", keep=not request.ordered)
            return
        except exception.PeerError as error:
            self._claim_or_yield(error.message)
            return
        except exception.GuestGone as error:
            self._guest_gone(error)
            return
        except exception.PmtError as error:
            self.agent.tell("error", error=error.to_dict())
            self._leave(error.message, "primary_alone")
            return
        faultpoint.reach("switchover.committed")
        paused = time.monotonic()
        epoch = self._checkpointer.committed
        self._link.send(RawFrame(Header(Type.SWITCHOVER, 0, epoch).pack()))
        faultpoint.reach("switchover.ordered")
        answer = self._wait_answer((Type.ACTIVATED, Type.ERROR, Type.BYE), ACTIVATION_TIMEOUT_S)
        if answer is Type.ACTIVATED:
            times = dict(self._answers[Type.ACTIVATED])
            times["final_round_ms"] = round((paused - started) * 1e3, 1)
            self._yield("planned switchover", **times)
            return
        try:
            won = self._arbiter.claim(self._pair.uuid, self._pair.generation, "primary")
        except exception.ArbiterUnavailable:
            self._claim_or_yield("the standby did not go on in a planned switchover", paused=True)
            return
        if not won:
            self._yield("planned switchover; the standby's answer was lost")
            return
        self._execution.resume()
        self._leave("the standby could not go on in a planned switchover", "primary_alone")
