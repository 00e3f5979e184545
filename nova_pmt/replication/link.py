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

"""A framed connection that never blocks: frames queue up here and go out as the socket lets them.

Used by one thread (an I/O loop), except :meth:`Link.send`, :meth:`Link.hold` and
:meth:`Link.go_on`, which any thread may call. Reading and writing stay in one thread
because OpenSSL does not allow two in one connection at the same time.
"""

from __future__ import annotations

import os
import select
import selectors
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from nova_pmt import exception
from nova_pmt.replication import tls
from nova_pmt.replication.protocol import HEADER, LIMITS, Header, Type
from nova_pmt.replication.silence import MOST, SilenceLimit
from nova_pmt.replication.speed import Speed

#: One send: small enough that a pause finds the thread free soon.
SEND_BYTES = 256 << 10
#: Read or write at most so much, and begin nothing after so long, before the other things of the
#: I/O loop get their turn: a frame that is small on the wire may be much work on either end.
TURN_BYTES, TURN_S = 4 << 20, 0.02
#: Buffers of a frame, and what to call when they were sent.
Buffers = list[memoryview]


class FrameHandler(Protocol):
    """Whoever receives frames."""

    def buffers(self, header: Header) -> Buffers:
        """Where the payload shall go; sizes add up to ``header.length``.

        :raises nova_pmt.exception.PeerError: the frame is not acceptable.
        """

    def frame(self, header: Header, payload: Buffers) -> None:
        """A frame is complete."""


class FrameReader:
    """Puts frames together from whatever pieces come; free of sockets."""

    def __init__(self, handler: FrameHandler) -> None:
        self._handler = handler
        self._head = bytearray(HEADER.size)
        self._header: Header | None = None
        self._payload: Buffers = []
        self._todo: deque[memoryview] = deque((memoryview(self._head),))

    def space(self) -> memoryview:
        """Where the next bytes go."""
        return self._todo[0]

    def filled(self, count: int) -> None:
        """``count`` bytes were put into :meth:`space`.

        :raises nova_pmt.exception.PeerError: they are no frame that is acceptable here.
        """
        self._todo[0] = self._todo[0][count:]
        while self._todo and not len(self._todo[0]):
            self._todo.popleft()
        if self._todo:
            return
        if self._header is None:
            self._header = Header.unpack(self._head)
            self._payload = self._handler.buffers(self._header) if self._header.length else []
            self._todo.extend(view for view in self._payload if len(view))
            if self._todo:
                return
        header, payload = self._header, self._payload
        self._header, self._payload = None, []
        self._todo.append(memoryview(self._head))
        self._handler.frame(header, payload)


class Outgoing(Protocol):
    """A frame that waits to be sent; made into bytes when its turn comes."""

    def begin(self) -> Buffers:
        """The frame's bytes."""

    def sent(self) -> None:
        """All of it went out."""


class RawFrame:
    """A frame whose bytes are there already."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def begin(self) -> Buffers:
        return [memoryview(self._data)]

    def sent(self) -> None:
        """Nothing to do."""


class Link:
    """See the module's text.

    :param sock: connected; the link owns it from here on.
    :param peer: the peer's name, for errors.
    :param heartbeat_s: something is sent at least this often.
    :param timeout_s: a peer that is silent for this long is lost; for longer where silences are
        usual (:mod:`nova_pmt.replication.silence`).
    :param strict: when this side itself stood still for as long, the peer is lost as well: it may
        have gone on meanwhile, and what it said before counts no more.

    Until :meth:`in_earnest`, no standby could go on, so that nothing is lost by waiting: a peer may
    be silent for as long as the limit can become, and whoever stood still himself does not mind.
    """

    def __init__(
        self,
        sock: socket.socket,
        handler: FrameHandler,
        *,
        peer: str,
        heartbeat_s: float,
        timeout_s: float,
        strict: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.peer = peer
        self._reader = FrameReader(handler)
        self._queue: deque[Outgoing] = deque()
        self._current: Outgoing | None = None
        self._parts: deque[memoryview] = deque()
        self._held = False
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self.last_received = self._last_sent = clock()
        self._silence = SilenceLimit(timeout_s)
        self._strict, self._stood_still = strict, False
        self._earnest = False
        self._turned = self._clock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Not closed with the link: another thread may be about to write to it, and the number
        # could be another file's by then.
        weakref.finalize(self, os.close, self._wake)
        self._selector: selectors.BaseSelector | None = None
        self._interest = 0
        self._held_at = 0.0
        self.sent_bytes = 0
        self.received_bytes = 0
        #: The I/O thread's.
        self.speed = Speed(clock)
        self._closed = False
        # So that nobody writes to a descriptor that was closed, or registers one.
        self._poking = threading.Lock()

    # -- any thread ---------------------------------------------------------------------

    def send(self, frame: Outgoing, *, urgent: bool = False) -> None:
        """Queue a frame; an urgent one overtakes all that have not begun."""
        if urgent:
            self._queue.appendleft(frame)
        else:
            self._queue.append(frame)
        self._poke()

    def hold(self) -> None:
        """Begin no further send: a pause begins. Only heartbeats go out if it takes that long."""
        self._held_at = self._clock()
        self._held = True

    def go_on(self) -> None:
        """The pause is over."""
        if self._held:
            self.speed.held_s += self._clock() - self._held_at
        self._held = False
        self._poke()

    @property
    def held(self) -> bool:
        """A pause is on. Any thread."""
        return self._held

    @property
    def overdue(self) -> bool:
        """Whether the peer is silent for longer than it may be where silences are not usual: by its
        own measure it may have given this side up. Only with ``strict``. Any thread.
        """
        return (
            self._strict
            and self._earnest
            and self._clock() - self.last_received > self._silence.timeout_s
        )

    def in_earnest(self) -> None:
        """From now on a standby may go on, if this side or the peer is silent. Any thread."""
        self._turned = self._clock()  # whoever says so is awake
        self._earnest = True

    def _poke(self) -> None:
        with self._poking:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    # -- the I/O thread -----------------------------------------------------------------

    def register(self, selector: selectors.BaseSelector) -> None:
        """Take part in an I/O loop; key data is a callable that takes the event mask.

        Also from another thread than that of the loop, which may have closed the link already.
        """
        with self._poking:
            if self._closed:
                return
            self._interest = selectors.EVENT_READ
            selector.register(self._sock, self._interest, self._on_socket)
            selector.register(self._wake, selectors.EVENT_READ, self._on_wake)
            self._selector = selector

    def _on_wake(self, _mask: int) -> None:
        os.eventfd_read(self._wake)
        self._write()

    def _on_socket(self, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            self._read()
        if not self._closed:
            self._write()

    @property
    def stood_still(self) -> bool:
        """Whether this process was stopped (SIGSTOP, a hypervisor that stood still) for so long
        that the peer may take it for dead; only with ``strict``. Any thread: also one that wakes
        up before the I/O thread does.
        """
        return (
            self._strict
            and self._earnest
            and (self._stood_still or self._clock() - self._turned > self._silence.timeout_s)
        )

    def _turn(self, now: float) -> None:
        """The I/O thread is awake.

        :raises nova_pmt.exception.PeerLost: and was not for too long.
        """
        gap = now - self._turned
        if self._strict and self._earnest and gap > self._silence.timeout_s:
            self._stood_still = True  # before the others can see that we are awake
        self._turned = now
        if self._stood_still:
            raise exception.PeerLost(
                f"this side stood still for {gap * 1e3:.0f} ms: {self.peer} may have gone on"
            )

    def _read(self) -> None:
        now = self._clock()
        self._turn(now)
        left, end = TURN_BYTES, now + TURN_S
        try:
            # A fast peer must not keep us from heartbeats; what TLS has decrypted must be read.
            while not self._closed and ((left > 0 and self.last_received < end) or self._pending()):
                count = self._sock.recv_into(self._reader.space())
                if not count:
                    raise exception.PeerLost(f"{self.peer} closed the connection")
                self.last_received = self._clock()
                self._silence.heard(self.last_received)
                self.received_bytes += count
                left -= count
                self._reader.filled(count)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            raise tls.broken(error, self.peer) from error

    def _pending(self) -> int:
        return self._sock.pending() if isinstance(self._sock, ssl.SSLSocket) else 0

    def _write(self, *, breath: bool = False) -> None:
        left, end = SEND_BYTES if breath else TURN_BYTES, self._clock() + TURN_S
        try:
            while (breath or not self._held) and self._next_part():
                if left <= 0 or self._clock() > end:
                    # The socket takes all we have: let others have their turn.
                    self._want(selectors.EVENT_READ | selectors.EVENT_WRITE)
                    return
                if self._held and not breath:
                    continue  # to make the frame took its time
                part = self._parts[0]
                count = self._sock.send(part[:SEND_BYTES])
                self.sent_bytes += count
                left -= count
                self._last_sent = self._clock()
                if count == len(part):
                    self._parts.popleft()
                else:
                    self._parts[0] = part[count:]
            self._want(selectors.EVENT_READ)
        except (BlockingIOError, ssl.SSLWantWriteError):
            self.speed.refused()
            self._want(selectors.EVENT_READ | selectors.EVENT_WRITE)
        except ssl.SSLWantReadError:
            self._want(selectors.EVENT_READ)
        except OSError as error:
            raise tls.broken(error, self.peer) from error

    def _next_part(self) -> bool:
        """Whether there is something to send, beginning the next frame where needed."""
        if self._parts:
            return True
        if self._current is not None:
            done, self._current = self._current, None
            done.sent()
        if not self._queue:
            self.speed.idle()
            return False
        self.speed.busy(self.sent_bytes)
        self._current = self._queue.popleft()
        start = self._clock()
        self._parts.extend(self._current.begin())
        self.speed.worked(self._clock() - start)
        return True

    def _want(self, interest: int) -> None:
        if interest != self._interest and self._selector is not None:
            self._interest = interest
            self._selector.modify(self._sock, interest, self._on_socket)

    def tick(self) -> float:
        """Heartbeat and silence; call often.

        :returns: seconds after which to call again at the latest.
        :raises nova_pmt.exception.PeerLost: the peer was silent for too long.
        """
        now = self._clock()
        self._turn(now)
        silent, limit = now - self.last_received, self.silence_limit_s
        if silent > limit and not select.select([self._sock], [], [], 0)[0]:
            # (What has come but was not read yet says that it is we who were slow.)
            raise exception.PeerLost(f"{self.peer} was silent for {silent * 1e3:.0f} ms")
        if now - self._last_sent >= self._heartbeat_s and not self._queue and not self._parts:
            self._last_sent = now
            self.send(RawFrame(Header(Type.HEARTBEAT, 0).pack()))
        if self._held and now - self._last_sent >= self._heartbeat_s / 2:
            self._write(breath=True)  # a long pause must not look like a dead host
        return max(0.001, min(self._heartbeat_s / 2, limit - silent))

    def flush(self, timeout_s: float = 1.0) -> None:
        """Send what is queued now, from the I/O thread; gives up after ``timeout_s``.

        :raises nova_pmt.exception.PeerError: the connection is broken.
        """
        deadline = self._clock() + timeout_s
        while not self._closed:
            self._write()
            left = deadline - self._clock()
            if self.idle or left <= 0:
                return
            select.select([], [self._sock], [], left)

    @property
    def silence_limit_s(self) -> float:
        """A peer that is silent for this long, from now on, is lost."""
        return self._silence.seconds if self._earnest else MOST * self._silence.timeout_s

    @property
    def idle(self) -> bool:
        """Whether all that was queued has gone to the kernel."""
        return not self._queue and not self._parts and self._current is None

    def close(self) -> None:
        """Close the connection; what is queued is dropped."""
        with self._poking:
            if self._closed:
                return
            self._closed = True
            if self._selector is not None:
                self._selector.unregister(self._sock)
                self._selector.unregister(self._wake)
                self._selector = None
            self._sock.close()


def read_frame(sock: socket.socket) -> tuple[Header, bytes]:
    """Read one frame from a blocking socket; for the handshake.

    :raises nova_pmt.exception.PeerError: it did not come, or is none of ours.
    """

    def exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = sock.recv(count - len(data))
            if not part:
                raise exception.PeerLost("the peer closed the connection in the handshake")
            data += part
        return bytes(data)

    try:
        header = Header.unpack(exactly(HEADER.size))
        if header.length > LIMITS[Type.HELLO]:  # before memory is found for it
            raise exception.ProtocolMismatch(f"{header.type.name} frame in the handshake")
        return header, exactly(header.length)
    except OSError as error:
        raise tls.refused(error, "the peer") from error
