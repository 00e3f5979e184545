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

"""Egress buffer inside QEMU: two ``filter-redirector`` objects and two sockets for each NIC.

What the guest sends goes out of QEMU over one socket, waits here, and goes back in over the other,
in bulk and without a look at the packets: a stream of length-prefixed packets, of which an epoch's
end is an offset. Works on a running guest and needs nothing of the kernel, but sees nothing of
vhost.

A worker that dies takes its ends of the sockets along: QEMU then drops what the guest sends. The
next worker takes the same sockets over. (QEMU's injecting filter stops listening when its socket
closes, net/filter-mirror.c; so that one is made anew, in front of the capturing one, which is never
taken away while anything must be held.)

On the receiving queue QEMU asks filters from the last to the first: the injecting one lies before
the capturing one, so that what is injected is not captured again.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from nova_pmt import exception
from nova_pmt.exception import Refusal
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network.base import EgressBuffer, Nic

#: One read; QEMU waits, and the guest with it, while its socket is full.
READ_BYTES = 1 << 20
#: Socket buffers that are asked for.
SOCKET_BYTES = 4 << 20
#: Longest packet that QEMU passes on (net/net.h, NET_BUFSIZE), and a header.
MAX_PACKET_BYTES = 4096 + 65536 + 64
#: Room kept beyond the limit for the rest of a packet whose begin is stored already.
SLACK_BYTES = 2 * MAX_PACKET_BYTES
DETACH_TIMEOUT_S = 10.0
POLL_S = 0.0005
_LENGTH = struct.Struct("!I")


def _ids(nic: Nic) -> tuple[str, str, str, str]:
    """Names in QEMU: capturing filter, injecting filter, their character devices."""
    return (
        f"nova-pmt-capture-{nic.netdev}",
        f"nova-pmt-inject-{nic.netdev}",
        f"nova-pmt-out-{nic.netdev}",
        f"nova-pmt-in-{nic.netdev}",
    )


def _objects(monitor: Monitor) -> set[str]:
    return {entry["name"] for entry in monitor.execute("qom-list", path="/objects")}


def _chardevs(monitor: Monitor) -> set[str]:
    return {entry["label"] for entry in monitor.execute("query-chardev")}


class _Stream:
    """The bytes between the two sockets: a ring that one thread fills and empties.

    Offsets count from the attachment on. ``received``: stored; ``sent``: back in QEMU;
    ``_allowed``: may go back. Other threads only add to what our thread reads: a cut to
    ``_cuts``, an epoch to ``_releases``.
    """

    def __init__(self, out: socket.socket, back: socket.socket, limit_bytes: int) -> None:
        out.setblocking(False)
        back.setblocking(False)
        self._out, self._back = out, back
        self.limit = limit_bytes
        self._size = limit_bytes + SLACK_BYTES
        self._map = mmap.mmap(-1, self._size)
        self._ring = memoryview(self._map)
        self.received = self.sent = self._allowed = 0
        self.peak = self.dropped_packets = self.dropped_bytes = 0
        #: When the first byte since the last cut came in (perf_counter); 0: none came.
        self.first_at = 0.0
        self.on_output: Callable[[], None] | None = None
        self._turn = 0  # odd while the thread stores: see end()
        self._waiting = array.array("i", [0])
        self._boundary = 0  # offset, still in the ring, at which a packet begins
        self._cuts: dict[int, int] = {}
        self.last_cut = 0
        self._releases: deque[int] = deque()
        self._skipping = False
        self._junk = bytearray()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self.broken = ""
        self._thread = threading.Thread(target=self._run, name="egress", daemon=True)
        self._thread.start()

    # -- other threads --------------------------------------------------------------------

    def end(self, epoch: int) -> float:
        """Note the end of all that the paused guest has sent: stored, and waiting in the socket.

        The sum does not change while the guest is paused, so it is read without a lock: twice
        if our thread was just moving bytes from the one to the other.

        :returns: when the epoch's first byte came (perf_counter); 0: none did.
        """
        before = self.last_cut
        while True:
            turn = self._turn
            if not turn & 1:
                fcntl.ioctl(self._out, termios.FIONREAD, self._waiting, True)
                waiting = 0 if self._skipping else self._waiting[0]
                # Noted before the last look: whoever drops bytes from now on shortens it.
                self._cuts[epoch] = self.last_cut = self.received + waiting
                if turn == self._turn:
                    break
            time.sleep(0)
        # Our thread sets it again with the first byte behind the cut: not before the guest runs.
        first, self.first_at = self.first_at, 0.0
        if not first and self.last_cut > before:
            first = time.perf_counter()  # all of it still waits in the socket
        return first

    def allow(self, epoch: int) -> None:
        """Let out what was noted as the epoch's; does not wait."""
        self._releases.append(epoch)
        os.eventfd_write(self._wake, 1)

    def let_out_all(self, deadline: float) -> bool:
        """Let out everything; true when QEMU has it. The guest is paused."""
        waiting = array.array("i", [0])
        while time.monotonic() < deadline and not self.broken:
            fcntl.ioctl(self._out, termios.FIONREAD, waiting, True)
            if not waiting[0] and not self._turn & 1:
                self._allowed = self.received
                os.eventfd_write(self._wake, 1)
                fcntl.ioctl(self._back, termios.TIOCOUTQ, waiting, True)
                if self.sent == self.received and not waiting[0]:
                    return True
            time.sleep(POLL_S)
        return False

    def close(self) -> None:
        """Close both sockets: QEMU drops what the guest sends from now on."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(2.0)
        self._out.close()
        self._back.close()
        os.close(self._wake)
        self._ring.release()
        self._map.close()

    # -- our thread -----------------------------------------------------------------------

    def _run(self) -> None:
        poll = select.epoll()
        out, back, wake = self._out.fileno(), self._back.fileno(), self._wake
        poll.register(out, select.EPOLLIN)
        poll.register(wake, select.EPOLLIN)
        blocked = False
        try:
            while not self._closed:
                for descriptor, _ in poll.poll():
                    if descriptor == out:
                        self._store()
                    elif descriptor == wake:
                        os.eventfd_read(wake)
                while self._releases:
                    self._allowed = max(self._allowed, self._cuts.pop(self._releases.popleft(), 0))
                self._note_boundary()
                was, blocked = blocked, not self._send()
                if blocked != was:
                    if blocked:
                        poll.register(back, select.EPOLLOUT)
                    else:
                        poll.unregister(back)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing passes any more
            # QEMU ended, mostly; its end is watched elsewhere
            self.broken = str(error) or type(error).__name__
        finally:
            poll.close()
            # With nobody to read them QEMU would wait for room in its socket for ever.
            for sock in (self._out, self._back):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _note_boundary(self) -> None:
        """What is allowed ends with a packet, and what comes behind it is not overwritten yet."""
        if self._boundary < self._allowed <= self.received:
            self._boundary = self._allowed

    def _store(self) -> None:
        """Take one read's worth out of the socket."""
        self._turn += 1
        try:
            if self._skipping:
                self._skip()
                return
            room = self.limit - (self.received - self.sent)
            if self.received - self._boundary > self._size - READ_BYTES:
                self._rest_of_packet()  # walks on while what it walks over is still there
            room = min(room, self._size - (self.received - self._boundary))
            if room <= 0:
                room = self._rest_of_packet()
                if not room:
                    self._begin_skipping()
                    self._skip()
                    return
            at = self.received % self._size
            count = self._out.recv_into(
                self._ring[at : at + min(room, READ_BYTES, self._size - at)]
            )
            if not count:
                raise ConnectionResetError("QEMU closed the connection")
            self.received += count
            self._notice()
            self._note_boundary()
            self.peak = max(self.peak, self.received - self.sent)
        except BlockingIOError:
            return
        finally:
            self._turn += 1

    def _notice(self) -> None:
        """Something was stored. (What waited in the socket at a cut is of the epoch before.)"""
        if not self.first_at and self.received > self.last_cut:
            self.first_at = time.perf_counter()
            if self.on_output is not None:
                self.on_output()

    def _byte_range(self, start: int, length: int) -> bytes:
        at = start % self._size
        head = bytes(self._ring[at : min(at + length, self._size)])
        return head + bytes(self._ring[: length - len(head)])

    def _rest_of_packet(self) -> int:
        """Bytes that are missing of the last packet in the ring; walks over all after the last
        known beginning of one, so only done when the ring is full."""
        start = self._boundary
        while start + _LENGTH.size <= self.received:
            (length,) = _LENGTH.unpack(self._byte_range(start, _LENGTH.size))
            if length > MAX_PACKET_BYTES:
                raise ConnectionResetError(f"QEMU passed on a packet of {length} bytes")
            if start + _LENGTH.size + length > self.received:
                self._boundary = start
                return int(start + _LENGTH.size + length - self.received)
            start += _LENGTH.size + length
        self._boundary = start
        return start + _LENGTH.size - self.received if start < self.received else 0

    def _begin_skipping(self) -> None:
        """The ring is full, and ends with a whole packet: drop what comes until half is free.

        Bytes that an earlier cut counted and that are dropped now will not fill its range; what
        comes later must not either. So cuts end where the ring does.
        """
        self._skipping = True
        for epoch, cut in list(self._cuts.items()):
            self._cuts[epoch] = min(cut, self.received)
        self.last_cut = min(self.last_cut, self.received)
        self._allowed = min(self._allowed, self.received)

    def _skip(self) -> None:
        """Drop whole packets; store again from the beginning of one on when there is room."""
        data = self._out.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError("QEMU closed the connection")
        self._junk += data
        start = 0
        room = self.limit - (self.received - self.sent)
        has_room = room >= self.limit // 2
        while not (has_room and len(self._junk) - start <= room):
            if start + _LENGTH.size > len(self._junk):
                break
            (length,) = _LENGTH.unpack_from(self._junk, start)
            if length > MAX_PACKET_BYTES:
                raise ConnectionResetError(f"QEMU passed on a packet of {length} bytes")
            if start + _LENGTH.size + length > len(self._junk):
                break
            start += _LENGTH.size + length
            self.dropped_packets += 1
            self.dropped_bytes += length
        del self._junk[:start]
        if has_room and len(self._junk) <= room:
            self._keep_junk()

    def _keep_junk(self) -> None:
        """What is left begins with a packet: it is the next that is stored."""
        self._boundary = self.received
        rest = memoryview(self._junk)
        while rest:
            at = self.received % self._size
            count = min(len(rest), self._size - at)
            self._ring[at : at + count] = rest[:count]
            self.received += count
            rest = rest[count:]
        rest.release()
        self._junk.clear()
        self._notice()
        self._skipping = False

    def _send(self) -> bool:
        """Pass on what is allowed; false when QEMU does not take more just now."""
        while self.sent < self._allowed:
            end = min(self._allowed, self.received)
            if self.sent >= end:
                break  # the rest is still in the socket
            at = self.sent % self._size
            try:
                self.sent += self._back.send(self._ring[at : min(at + end - self.sent, self._size)])
            except BlockingIOError:
                return False
        return True


class RedirectorBuffer(EgressBuffer):
    """See the module's text."""

    name: ClassVar[str] = "redirector"

    def __init__(self, nic: Nic, monitor: Monitor, directory: str, limit_bytes: int) -> None:
        self.nic = nic
        self._monitor = monitor
        self._directory = directory
        self._limit = limit_bytes
        self._stream: _Stream | None = None
        self._first_at: dict[int, float] = {}

    @classmethod
    def problems(cls, nic: Nic, monitor: Monitor) -> list[Refusal]:
        found: list[Refusal] = []
        if nic.vhost:
            found.append(
                exception.NoEgressBuffer(
                    f"packets of interface {nic.mac} bypass QEMU (vhost), where the buffer "
                    "'redirector' would hold them"
                )
            )
        if nic.queues > 1:
            found.append(
                exception.NoEgressBuffer(
                    f"interface {nic.mac} has {nic.queues} queues, and QEMU's filters take one",
                    cure="Set queues='1' in the interface's <driver>, or the image property "
                    "hw_vif_multiqueue_enabled=false, and restart the server.",
                )
            )
        types = monitor.execute("qom-list-types", implements="netfilter")
        if "filter-redirector" not in {kind["name"] for kind in types}:
            found.append(exception.UnsupportedQemu("QEMU has no object 'filter-redirector'"))
        return found

    def _path(self, which: str) -> str:
        return os.path.join(self._directory, f"egress-{self.nic.netdev}-{which}.sock")

    def _make_chardev(self, ident: str, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        address = {"type": "unix", "data": {"path": path}}
        self._monitor.execute(
            "chardev-add",
            id=ident,
            backend={"type": "socket", "data": {"addr": address, "server": True, "wait": False}},
        )

    @staticmethod
    def _connect(path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
            sock.settimeout(5.0)
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise exception.GuestError(f"QEMU's socket {path} cannot be used: {error}") from error
        return sock

    def attach(self) -> None:
        monitor, nic = self._monitor, self.nic
        capture, inject, out, back = _ids(nic)
        objects, chardevs = _objects(monitor), _chardevs(monitor)
        with contextlib.ExitStack() as undo:
            # A capturing filter that is there holds packets back already: it stays.
            if capture not in objects and out in chardevs:
                monitor.execute("chardev-remove", id=out)
                chardevs.discard(out)
            if inject in objects:
                monitor.execute("object-del", id=inject)
            if back in chardevs:
                monitor.execute("chardev-remove", id=back)
            for ident, which in ((out, "out"), (back, "in")):
                if ident != out or out not in chardevs:
                    self._make_chardev(ident, self._path(which))
                    undo.callback(self._try, "chardev-remove", ident)
            leaving = self._connect(self._path("out"))
            undo.callback(leaving.close)
            returning = self._connect(self._path("in"))
            undo.callback(returning.close)
            place = {"position": f"id={capture}", "insert": "before"} if capture in objects else {}
            monitor.execute(
                "object-add",
                **{"qom-type": "filter-redirector", "id": inject, "netdev": nic.netdev},
                **{"queue": "rx", "indev": back, **place},
            )
            undo.callback(self._try, "object-del", inject)
            self._stream = _Stream(leaving, returning, self._limit)
            undo.callback(self._stream.close)
            if capture not in objects:
                monitor.execute(
                    "object-add",
                    **{"qom-type": "filter-redirector", "id": capture, "netdev": nic.netdev},
                    **{"queue": "rx", "outdev": out},
                )
            undo.pop_all()

    def _try(self, command: str, ident: str) -> None:
        with contextlib.suppress(exception.GuestError):
            self._monitor.execute(command, id=ident)

    def cut(self, epoch: int) -> None:
        stream = self._stream
        if stream is not None:
            self._first_at[epoch] = stream.end(epoch)

    def release(self, epoch: int) -> float | None:
        stream = self._stream
        if stream is None:
            return None
        stream.allow(epoch)
        first = self._first_at.pop(epoch, 0.0)
        return time.perf_counter() - first if first else None

    def watch(self, on_output: Callable[[], None]) -> None:
        if self._stream is not None:
            self._stream.on_output = on_output

    @property
    def waiting_since(self) -> float:
        return self._stream.first_at if self._stream is not None else 0.0

    def detach(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        try:
            if not stream.let_out_all(time.monotonic() + DETACH_TIMEOUT_S):
                raise exception.GuestError(
                    f"QEMU does not take the packets back that interface {self.nic.mac} has sent: "
                    f"{stream.broken or 'it does not read them'}"
                )
            _take_off(self.nic, self._monitor)
        finally:
            stream.close()
            self._unlink()

    def _unlink(self) -> None:
        for which in ("out", "in"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(which))

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    @classmethod
    def recover(cls, nic: Nic, monitor: Monitor) -> bool:
        return _take_off(nic, monitor)

    @property
    def last_cut(self) -> int:
        """Offset in the NIC's stream at which the last epoch ended; for tests."""
        return self._stream.last_cut if self._stream is not None else 0

    @property
    def pressure(self) -> float:
        stream = self._stream
        return (stream.received - stream.sent) / stream.limit if stream is not None else 0.0

    @property
    def broken(self) -> str:
        """Why nothing passes any more; empty while it works."""
        return self._stream.broken if self._stream is not None else ""

    def summary(self) -> dict[str, Any]:
        stream = self._stream
        held = stream.received - stream.sent if stream is not None else 0
        return {
            "nic": self.nic.alias,
            "mac": self.nic.mac,
            "buffer": self.name,
            "held_bytes": held,
            "peak_bytes": stream.peak if stream is not None else 0,
            "limit_bytes": self._limit,
            "dropped_packets": stream.dropped_packets if stream is not None else 0,
            "released_bytes": stream.sent if stream is not None else 0,
        }


def _take_off(nic: Nic, monitor: Monitor) -> bool:
    """Remove whatever there is of ours; the capturing filter first: nothing is held from then."""
    capture, inject, out, back = _ids(nic)
    objects, chardevs = _objects(monitor), _chardevs(monitor)
    found = False
    for ident in (capture, inject):
        if ident in objects:
            monitor.execute("object-del", id=ident)
            found = True
    for ident in (out, back):
        if ident in chardevs:
            monitor.execute("chardev-remove", id=ident)
            found = True
    return found
