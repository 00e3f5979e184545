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

"""QMP: a direct socket where the domain has one, libvirt's passthrough elsewhere.

Why not the ``qemu.qmp`` library on the pause path: used as a pause has to use it, with the save
under way while the thread scans, it makes stop + save + cont more than 20 % longer than what is
done here, which was the project's limit (``nova-pmt-bench qmp``; figures on the results page). One
command after the other it stays just below. The protocol is that of QEMU's
``docs/interop/qmp-spec.rst``.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from nova_pmt import exception

#: A reply larger than this is not QMP any more (the schema is about 200 KB).
MAX_MESSAGE_BYTES = 16 << 20
#: Events kept for a reader that does not come.
MAX_EVENTS = 256


class QmpCommandError(exception.GuestError):
    """QEMU answered a command with an error."""

    code = "QMP_COMMAND_FAILED"

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        self.error_class = str(error.get("class", ""))
        super().__init__(f"QEMU refused '{command}': {error.get('desc', error)}", command=command)


#: Ends a command that was begun so that QEMU refuses it.
SPOIL = b',"arguments":{"spoiled":0}}'


def encode(command: str, arguments: dict[str, Any], ident: str | None = None) -> bytes:
    """One QMP command as it goes over the wire.

    As short as JSON can be: QEMU reads its monitor byte by byte, some 6 us for each.
    """
    message: dict[str, Any] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    if ident is not None:
        message["id"] = ident
    return json.dumps(message, separators=(",", ":")).encode()


class Monitor(ABC):
    """Commands to, and events from, one running QEMU."""

    @abstractmethod
    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one QMP command.

        :returns: what QEMU put under ``return``.
        :raises QmpCommandError: QEMU answered with an error.
        :raises nova_pmt.exception.GuestGone: QEMU or its monitor went away.
        """

    @abstractmethod
    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        """Wait for an event whose data has the given members.

        :raises nova_pmt.exception.GuestError: it did not come in time.
        """

    @abstractmethod
    def saw_event(self, name: str) -> bool:
        """Whether an event of this name has come (without waiting)."""

    def forget_events(self, names: set[str]) -> None:  # noqa: B027 - where none are kept, none
        """Drop events of these names that came until now."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the monitor."""

    def human(self, line: str) -> str:
        """Run one command of the human monitor."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _matches(event: dict[str, Any], name: str, match: dict[str, Any]) -> bool:
    data = event.get("data") or {}
    return event.get("event") == name and all(data.get(k) == v for k, v in match.items())


class DirectMonitor(Monitor):
    """A QMP socket that belongs to us alone.

    One thread at a time: the lock is only ever contended before protection
    starts and after it ended, never in a pause.
    """

    def __init__(self, path: str, timeout_s: float = 10.0) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._lock = threading.RLock()
        self._buffer = bytearray()
        self._serial = 0
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._begun = b""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(path)
            self._read_message()  # the greeting
            self.execute("qmp_capabilities")
        except OSError as error:
            self._sock.close()
            raise exception.GuestGone(f"cannot use QMP socket {path}: {error}") from error
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def _read_message(self) -> dict[str, Any]:
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                try:
                    message = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise exception.GuestError(f"QMP socket {self.path} sent no JSON") from error
                if not isinstance(message, dict):
                    raise exception.GuestError(f"QMP sent {type(message).__name__}, not an object")
                return message
            if len(self._buffer) > MAX_MESSAGE_BYTES:
                raise exception.GuestError("QMP message is longer than any of QEMU's")
            try:
                data = self._sock.recv(65536)
            except TimeoutError as error:
                raise exception.GuestError(
                    f"QEMU did not answer on {self.path} for {self._timeout_s:.0f} s",
                    code="QMP_TIMEOUT",
                ) from error
            except OSError as error:
                raise exception.GuestGone(f"QMP socket {self.path}: {error}") from error
            if not data:
                raise exception.GuestGone(f"QEMU closed its QMP socket {self.path}")
            self._buffer += data

    def send(self, request: bytes = b"", begin: bytes = b"") -> None:
        """Send one or more encoded commands in one write; read each answer with :meth:`reply`.

        :param begin: a command without arguments, of which all is sent but its end. QEMU has read
            it when a later request starts with it, of which only the rest is sent then. Any other
            request spoils it: QEMU refuses it, and nobody waits for that.
        """
        begun = self._begun
        if begun and not request and begin.startswith(begun):
            return
        if begun:
            request = request[len(begun) :] if request.startswith(begun) else SPOIL + request
        self._begun = begin[:-1]
        try:
            self._sock.sendall(request + self._begun)
        except OSError as error:
            raise exception.GuestGone(f"QMP socket {self.path}: {error}") from error

    def reply(self, command: str, ident: str) -> Any:
        """Read the reply that bears this id; events that come before it are kept.

        Replies to earlier commands, whose reader gave up, are dropped.
        """
        while True:
            message = self._read_message()
            if "event" in message:
                self._events.append(message)
            elif message.get("id") != ident:
                continue
            elif "return" in message:
                return message["return"]
            elif "error" in message:
                raise QmpCommandError(command, message["error"])

    def execute(self, command: str, **arguments: Any) -> Any:
        with self._lock:
            self._serial += 1
            ident = f"x{self._serial}"
            self.send(encode(command, arguments, ident))
            return self.reply(command, ident)

    def _drain(self, wait_s: float) -> bool:
        """Read what is there (or comes within ``wait_s``); False when nothing came."""
        if b"\n" not in self._buffer:
            ready, _, _ = select.select([self._sock], [], [], max(0.0, wait_s))
            if not ready:
                return False
        message = self._read_message()
        if "event" in message:
            self._events.append(message)
        return True

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while True:
                for event in self._events:
                    if _matches(event, name, match):
                        self._events.remove(event)
                        return event
                if not self._drain(deadline - time.monotonic()) and time.monotonic() > deadline:
                    raise exception.GuestError(
                        f"QEMU sent no event {name} {match or ''} within {timeout_s:.1f} s"
                    )

    def saw_event(self, name: str) -> bool:
        with self._lock:
            with contextlib.suppress(exception.GuestError, OSError):
                while self._drain(0):
                    pass
            return any(event.get("event") == name for event in self._events)

    def has_event(self, name: str) -> bool:
        """Whether an event has come with what was read so far; reads nothing."""
        return any(event.get("event") == name for event in self._events)

    def forget_events(self, names: set[str]) -> None:
        if self._events:
            kept = [event for event in self._events if event.get("event") not in names]
            self._events.clear()
            self._events.extend(kept)

    def close(self) -> None:
        self._sock.close()


class LibvirtMonitor(Monitor):
    """QMP through libvirt, for domains that have no monitor of ours.

    Slower (3-10 ms a command on a busy machine), and it marks the domain as
    tainted (``custom-monitor``). Events come from libvirt's event loop, which
    the caller must run: see :func:`nova_pmt.guest.domain.start_event_loop`.
    """

    def __init__(self, domain: Any, connection: Any) -> None:
        import libvirt_qemu

        self._module = libvirt_qemu
        self._domain = domain
        self._connection = connection
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._condition = threading.Condition()
        self._callbacks = [
            libvirt_qemu.qemuMonitorEventRegister(connection, domain, name, self._on_event, None, 0)
            for name in ("MIGRATION", "SHUTDOWN", "BLOCK_IO_ERROR")
        ]

    def _on_event(
        self, _conn: Any, _domain: Any, name: str, _s: int, _us: int, details: str, _opaque: Any
    ) -> None:
        with self._condition:
            self._events.append({"event": name, "data": json.loads(details or "{}")})
            self._condition.notify_all()

    def execute(self, command: str, **arguments: Any) -> Any:
        import libvirt

        try:
            text = self._module.qemuMonitorCommand(
                self._domain, encode(command, arguments).decode(), 0
            )
        except libvirt.libvirtError as error:
            gone = error.get_error_code() in (
                libvirt.VIR_ERR_OPERATION_INVALID,
                libvirt.VIR_ERR_NO_DOMAIN,
                libvirt.VIR_ERR_OPERATION_FAILED,
            )
            kind = exception.GuestGone if gone else exception.GuestError
            raise kind(f"libvirt could not run '{command}': {error}") from error
        message = json.loads(text)
        if "error" in message:
            raise QmpCommandError(command, message["error"])
        return message["return"]

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while True:
                for event in self._events:
                    if _matches(event, name, match):
                        self._events.remove(event)
                        return event
                left = deadline - time.monotonic()
                if left <= 0:
                    raise exception.GuestError(
                        f"libvirt passed on no event {name} {match or ''} within {timeout_s:.1f} s"
                    )
                self._condition.wait(left)

    def saw_event(self, name: str) -> bool:
        with self._condition:
            return any(event.get("event") == name for event in self._events)

    def forget_events(self, names: set[str]) -> None:
        with self._condition:
            kept = [event for event in self._events if event.get("event") not in names]
            self._events.clear()
            self._events.extend(kept)

    def close(self) -> None:
        import libvirt

        for callback in self._callbacks:
            with contextlib.suppress(libvirt.libvirtError):
                self._module.qemuMonitorEventDeregister(self._connection, callback)
        self._callbacks = []
