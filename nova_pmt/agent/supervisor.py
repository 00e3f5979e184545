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

"""Starts worker processes, listens to them, and notices when one dies."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import control

LOG = log.getLogger(__name__)

#: How long a worker may clean up after it reported a final state, in seconds.
CLEANUP_S = 30.0
#: A worker reports twice a second from when its first synchronisation begins; one that was silent
#: for this long hangs.
SILENCE_S = 30.0
_KILL_WAIT_S = 5.0
_POLL_MS = 1000

OnEvent = Callable[[dict[str, Any]], None]
OnExit = Callable[["Outcome"], None]


@dataclass(frozen=True)
class Outcome:
    """How a worker ended.

    :param state: its final state; None when it died without one.
    :param error: what it reported, or :class:`~nova_pmt.exception.WorkerDied`.
    :param returncode: of the process; None when even SIGKILL did not end it.
    """

    state: str | None
    reason: str
    details: dict[str, Any] = field(default_factory=dict)
    error: exception.PmtError | None = None
    returncode: int | None = None


class Worker:
    """One worker process and the thread that listens to it.

    The callbacks run in that thread, events in the order in which the worker sent them.
    """

    def __init__(
        self,
        spec: control.PrimarySpec | control.StandbySpec,
        process: subprocess.Popen[bytes],
        sock: socket.socket,
        on_event: OnEvent,
        on_exit: OnExit,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.spec = spec
        self.uuid = spec.pair.uuid
        self.pid = process.pid
        self._process = process
        self._sock = sock
        self._on_event = on_event
        self._on_exit = on_exit
        self._silence_s = silence_s
        self._send_lock = threading.Lock()
        self._ended = threading.Event()
        self._outcome: Outcome | None = None
        self._final: dict[str, Any] | None = None
        self._error: exception.PmtError | None = None
        self._watched = False
        self._thread = threading.Thread(
            target=self._listen, name=f"worker-{spec.role}-{self.uuid}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it lives."""
        return self._outcome

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Wait until the process has ended; None when it still lives after that time."""
        self._ended.wait(timeout_s)
        return self._outcome

    def command(self, command: str) -> None:
        """Tell the worker something.

        :raises nova_pmt.exception.WorkerDied: it is gone.
        """
        try:
            self._send(control.to_line({"command": command}))
        except OSError as error:
            raise exception.WorkerDied(
                f"the worker of {self.uuid} is gone ({error.strerror}), '{command}' was not done"
            ) from error

    def stop(self, timeout_s: float) -> Outcome | None:
        """End it in an orderly way, by force when it does not within that time."""
        self.let_go()
        outcome = self.wait(timeout_s)
        if outcome is None:
            LOG.warning(
                "%s: worker %d did not end within %s s: killed", self.uuid, self.pid, timeout_s
            )
            self.kill()
            outcome = self.wait(2 * _KILL_WAIT_S)
        return outcome

    def let_go(self) -> None:
        """Say that this agent goes away. Its last words can still be heard."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End the process by force; the listening thread takes note."""
        self._process.kill()  # does nothing once the process was reaped: no other gets its pid

    def abandon(self) -> None:
        """End a process that nobody has begun to listen to; it has not heard of its guest yet."""
        self._process.kill()
        self._process.wait()
        self._sock.close()

    def _send(self, line: bytes) -> None:
        with self._send_lock:
            self._sock.sendall(line)

    def _listen(self) -> None:
        try:
            # Here and not by whoever starts it: a worker that does not read must not block them.
            self._send(control.spec_line(self.spec))
            self._read_all()
        except (OSError, ValueError) as error:
            LOG.error("%s: control channel of worker %d failed: %s", self.uuid, self.pid, error)
        finally:
            self._reap()

    def _read_all(self) -> None:
        lines = control.Lines()
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        heard = time.monotonic()
        while True:
            if not poll.poll(_POLL_MS):
                self._check_silence(time.monotonic() - heard)
                continue
            data = self._sock.recv(65536)
            if not data:
                return
            heard = time.monotonic()
            lines.feed(data)
            for message in lines.messages():
                self._take(message)

    def _check_silence(self, silent_s: float) -> None:
        limit_s = CLEANUP_S if self._final else self._silence_s
        if silent_s > limit_s and (self._watched or self._final):
            LOG.error("%s: worker %d was silent for %.0f s: killed", self.uuid, self.pid, silent_s)
            self.kill()

    def _take(self, message: dict[str, Any]) -> None:
        event = message.get("event")
        if event == "error" and isinstance(message.get("error"), dict):
            self._error = exception.from_dict(message["error"])
        elif event == "stats" or (event == "state" and message.get("state") == "syncing"):
            self._watched = True
        elif event == "state" and message.get("state") in control.FINAL_STATES:
            self._final = message
        try:
            self._on_event(message)
        except Exception:  # one message that we misread must not end the listening
            LOG.exception("%s: event %r of worker %d", self.uuid, event, self.pid)

    def _reap(self) -> None:
        if self._final is None:
            # Its socket has ended without a last word: whatever is left of it cannot be
            # told anything any more, and must not touch the guest when we decide about it.
            self.kill()
        returncode: int | None = None
        for limit_s in (CLEANUP_S, _KILL_WAIT_S):
            try:
                returncode = self._process.wait(limit_s)
                break
            except subprocess.TimeoutExpired:
                LOG.error("%s: worker %d does not end: killed", self.uuid, self.pid)
                self.kill()
        self._sock.close()
        self._outcome = self._make_outcome(returncode)
        self._ended.set()
        try:
            self._on_exit(self._outcome)
        except Exception:  # the thread ends here; the log must say why
            LOG.exception("%s: end of worker %d", self.uuid, self.pid)

    def _make_outcome(self, returncode: int | None) -> Outcome:
        if self._final is not None:
            details = self._final.get("details")
            return Outcome(
                state=str(self._final["state"]),
                reason=str(self._final.get("reason", "")),
                details=details if isinstance(details, dict) else {},
                error=self._error,
                returncode=returncode,
            )
        reason = f"the {self.spec.role} worker died ({_how(returncode)})"
        error = self._error or exception.WorkerDied(f"{reason} for {self.uuid}")
        if self._error is not None:
            reason = f"{reason}: {self._error.message}"
        return Outcome(state=None, reason=reason, error=error, returncode=returncode)


def _how(returncode: int | None) -> str:
    if returncode is None:
        return "it does not end"
    return f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"


class Supervisor:
    """Starts the workers of this agent.

    :param argv: the worker's command, without ``--control-fd``.
    :param log_directory: where ``worker-<uuid>.log`` goes; None: the agent's own output.
    """

    def __init__(
        self, argv: Sequence[str], log_directory: str | None = None, silence_s: float = SILENCE_S
    ) -> None:
        self._argv = list(argv)
        self._log_directory = log_directory
        self._silence_s = silence_s
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()

    def start(
        self, spec: control.PrimarySpec | control.StandbySpec, on_event: OnEvent, on_exit: OnExit
    ) -> Worker:
        """Start a worker and give it its specification.

        :raises nova_pmt.exception.WorkerDied: the process cannot be started.
        """
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as failed:
            failed.callback(ours.close)
            try:
                process = self._spawn(spec.pair.uuid, theirs.fileno())
            except OSError as error:
                raise exception.WorkerDied(
                    f"a worker for {spec.pair.uuid} cannot be started: {error}",
                    cure="Check the installation of nova_pmt, and that log_dir is writable.",
                ) from error
            failed.pop_all()

        def ended(outcome: Outcome) -> None:
            with self._lock:
                self._workers.discard(worker)
            on_exit(outcome)

        worker = Worker(spec, process, ours, on_event, ended, self._silence_s)
        with self._lock:
            self._workers.add(worker)
        try:
            worker.start()
        except RuntimeError as error:  # this process can have no more threads
            worker.abandon()
            with self._lock:
                self._workers.discard(worker)
            raise exception.WorkerDied(
                f"a worker for {spec.pair.uuid} cannot be listened to: {error}",
                cure="Raise TasksMax of nova-pmt-agent.service, or the limit of processes.",
            ) from error
        LOG.info(
            "%s: %s worker %d started, generation %d",
            worker.uuid, spec.role, worker.pid, spec.pair.generation,
        )  # fmt: skip
        return worker

    def stop_all(self, timeout_s: float) -> None:
        """End every worker, all at the same time."""
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            worker.let_go()
        deadline = time.monotonic() + timeout_s
        for worker in workers:
            worker.stop(max(0.0, deadline - time.monotonic()))

    def _spawn(self, uuid: str, descriptor: int) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as opened:
            output = None
            if self._log_directory is not None:
                path = os.path.join(self._log_directory, f"worker-{uuid}.log")
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                output = os.open(path, flags, 0o640)
                opened.callback(os.close, output)
            return subprocess.Popen(
                [*self._argv, "--control-fd", str(descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(descriptor,),
                # Ctrl-C in the agent's terminal is for the agent, which ends them in order.
                start_new_session=True,
            )
