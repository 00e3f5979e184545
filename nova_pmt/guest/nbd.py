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

"""A client of QEMU's NBD server, over a unix socket.

Why not libnbd: it has no distribution on PyPI, and its Python binding is built by the Linux
distribution for one interpreter, which is rarely that of our virtual environment. What is needed
here is small: the fixed newstyle handshake, NBD_OPT_GO, structured replies and meta contexts of
the protocol that https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md tells of.

One thread at a time. The server is on this host and of our making, but what it says is checked
nevertheless: every length is bounded before memory is found for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from types import TracebackType
from typing import NamedTuple

from nova_pmt import exception

#: Most that one read or write may carry (the protocol's default, and QEMU's limit).
MAX_PAYLOAD_BYTES = 32 << 20
#: Zeroing and trimming carry no data; larger ones are cut so that each is soon answered.
MAX_RANGE_BYTES = 256 << 20
#: What may be unanswered: QEMU takes 16 requests at a time, the rest waits in the socket.
WINDOW_REQUESTS = 128
WINDOW_BYTES = 8 << 20

ALLOCATION = "base:allocation"
#: Flags of an extent of :data:`ALLOCATION`.
HOLE, ZERO_READS = 1, 2
#: Flag of an extent of a dirty bitmap.
DIRTY = 1

_MAX_OPTION_BYTES = 64 << 10
_MAX_OPTION_REPLIES = 64
_MAX_MESSAGE_BYTES = 4096
_MAX_ERRNO = 4095
#: More than any server has in one reply (QEMU: 1 MiB).
_MAX_EXTENTS = 1 << 20
_MAX_CHUNKS = 1 << 16
_MAX_STATUS_BYTES = 1 << 31
_SEND_PARTS = 256
_SOCKET_BUFFER_BYTES = 4 << 20

_INIT_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = b"IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_MAGIC = 0x67446698
_STRUCTURED_MAGIC = 0x668E33EF

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED, _OPT_SET_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_CONTEXT, _REP_ERROR = 1, 3, 4, 1 << 31
_INFO_EXPORT = 0
_SENDS_FLUSH, _READ_ONLY = 4, 2

_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZERO, _STATUS = 0, 1, 2, 3, 4, 6, 7
_WORDS = {
    _READ: "read",
    _WRITE: "write",
    _FLUSH: "flush",
    _TRIM: "trim",
    _ZERO: "zero",
    _STATUS: "block status",
}
_NO_HOLE = 2
_CHUNK_DONE = 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS = 0, 1, 2, 5
_CHUNK_ERROR = 1 << 15

_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_EXPORT = struct.Struct(">HQH")
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_U64 = struct.Struct(">Q")
_HOLE_CHUNK = struct.Struct(">QI")
_EXTENT = struct.Struct(">II")
_ERROR = struct.Struct(">IH")

Data = bytes | bytearray | memoryview
#: Offset, length, flags.
Extent = tuple[int, int, int]


class NbdError(exception.GuestError):
    """A request failed, or the server or its connection did.

    :param error: errno; ``EPROTO`` when the server talks nonsense, ``ECONNRESET`` when it went
        away, ``ETIMEDOUT`` when it did not answer.
    """

    def __init__(self, message: str, error: int) -> None:
        super().__init__(message, errno=error)
        self.errno = error


class Operation(NamedTuple):
    """One change of an export, for :meth:`Export.write_many`; made by the functions below."""

    command: int
    flags: int
    offset: int
    length: int
    data: Data | None


def write(offset: int, data: Data) -> Operation:
    """Put data there; must stay unchanged until it was written."""
    return Operation(_WRITE, 0, offset, len(data), data)


def zero(offset: int, length: int, *, punch: bool = True) -> Operation:
    """Make it read as zeros; ``punch``: without space where that can be."""
    return Operation(_ZERO, 0 if punch else _NO_HOLE, offset, length, None)


def trim(offset: int, length: int) -> Operation:
    """Tell that the content does not matter any more; it may read as anything then."""
    return Operation(_TRIM, 0, offset, length, None)


class Export:
    """One export of a server, connected.

    :param path: of the server's unix socket.
    :param name: of the export.
    :param bitmaps: dirty bitmaps that :meth:`extents` will be asked for; the server must have
        exported them with the node (``block-export-add`` with ``bitmaps``).
    :param timeout_s: a server that takes longer for anything is broken.
    :raises NbdError: no server, no such export or bitmap, or it cannot do what we need.
    """

    def __init__(
        self, path: str, name: str, bitmaps: Sequence[str] = (), *, timeout_s: float = 30.0
    ) -> None:
        self.name = name
        self.size = 0
        self.readonly = False
        self._timeout_s = timeout_s
        self._flags = 0
        self._cookies = count(1)
        self._contexts: dict[int, str] = {}
        self._broken: NbdError | None = None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # the kernel takes what it allows
                self._sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
            self._sock.settimeout(timeout_s)
            with self._errors():
                self._sock.connect(path)
                self._negotiate([f"qemu:dirty-bitmap:{bitmap}" for bitmap in bitmaps])
        except BaseException:
            self._sock.close()
            raise

    # -- handshake ----------------------------------------------------------------------

    def _negotiate(self, bitmaps: list[str]) -> None:
        magic, style, flags = struct.unpack(">8s8sH", self._exactly(18))
        if magic != _INIT_MAGIC or style != _OPTION_MAGIC or not flags & _FIXED_NEWSTYLE:
            raise self._nonsense("is no NBD server of the fixed newstyle kind")
        self._sock.sendall(struct.pack(">I", _FIXED_NEWSTYLE | flags & _NO_ZEROES))
        self._option(_OPT_STRUCTURED, b"", "structured replies")
        name = self.name.encode()
        wanted = [ALLOCATION, *bitmaps]
        query = struct.pack(">I", len(name)) + name + struct.pack(">I", len(wanted))
        for context in wanted:
            query += struct.pack(">I", len(context.encode())) + context.encode()
        for kind, data in self._option(_OPT_SET_CONTEXT, query, f"export '{self.name}'"):
            if kind == _REP_CONTEXT and len(data) > 4:
                (ident,) = struct.unpack_from(">I", data)
                self._contexts[ident] = data[4:].decode(errors="replace")
        for context in bitmaps:
            if context not in self._contexts.values():
                raise NbdError(f"export '{self.name}' has no {context}", errno.ENOENT)
        request = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        for kind, data in self._option(_OPT_GO, request, f"export '{self.name}'"):
            if kind == _REP_INFO and data[:2] == b"\0\0":
                if len(data) != _EXPORT.size:
                    raise self._nonsense("describes its export wrongly")
                _, self.size, self._flags = _EXPORT.unpack(data)
        if not 0 < self.size < 1 << 63:
            raise self._nonsense(f"has an export of {self.size} bytes")
        self.readonly = bool(self._flags & _READ_ONLY)

    def _option(self, option: int, data: bytes, what: str) -> list[tuple[int, bytes]]:
        self._sock.sendall(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        for _ in range(_MAX_OPTION_REPLIES):
            magic, about, kind, length = _OPTION_REPLY.unpack(self._exactly(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or about != option or length > _MAX_OPTION_BYTES:
                raise self._nonsense("answered an option with something else")
            answer = self._exactly(length)
            if kind & _REP_ERROR:
                reason = answer[:_MAX_MESSAGE_BYTES].decode(errors="replace") or f"{kind:#x}"
                raise NbdError(f"NBD server refused {what}: {reason}", errno.EINVAL)
            if kind == _REP_ACK:
                return replies
            replies.append((kind, answer))
        raise self._nonsense("has no end of answers to an option")

    # -- single requests ----------------------------------------------------------------

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read as many bytes as ``target`` has (at most 32 MiB) from ``offset``.

        :raises NbdError: they could not be read; ``target`` is undefined then.
        """
        target = target.cast("B")
        length = len(target)
        if not 0 < length <= MAX_PAYLOAD_BYTES:
            raise ValueError(f"cannot read {length} bytes at once")
        self._within(offset, length)
        with self._errors():
            cookie = self._request(_READ, offset, length)
            pieces: list[tuple[int, int]] = []
            failure: NbdError | None = None
            done = False
            while not done:
                kind, size, done = self._chunk(cookie)
                if kind & _CHUNK_ERROR:
                    failure = failure or _failed(
                        self.name, _READ, offset, length, self._reason(size)
                    )
                elif kind == _CHUNK_DATA and _U64.size < size <= _U64.size + length:
                    (at,) = _U64.unpack(self._exactly(_U64.size))
                    part = self._part(pieces, target, at - offset, size - _U64.size)
                    self._fill(part)
                elif kind == _CHUNK_HOLE and size == _HOLE_CHUNK.size:
                    at, count = _HOLE_CHUNK.unpack(self._exactly(size))
                    part = self._part(pieces, target, at - offset, count)
                    part[:] = bytes(count)
                elif kind != _CHUNK_NONE or size:
                    raise self._nonsense(f"answered a read with a chunk of type {kind}")
            if failure is not None:
                raise failure
            pieces.sort()
            at = 0
            for start, end in pieces:
                if start != at:
                    break
                at = end
            if at != length:
                raise self._nonsense("left out a part of a read")

    def _part(
        self, pieces: list[tuple[int, int]], target: memoryview, at: int, length: int
    ) -> memoryview:
        if not length or at < 0 or at + length > len(target) or len(pieces) >= _MAX_CHUNKS:
            raise self._nonsense("answered a read with bytes from elsewhere")
        pieces.append((at, at + length))
        return target[at : at + length]

    def write(self, offset: int, data: Data) -> None:
        """Write any number of bytes.

        :raises NbdError: they could not be written; some of them may have been.
        """
        self.write_many((write(offset, data),))

    def zero(self, offset: int, length: int, punch: bool = True) -> None:
        """Make a range read as zeros; see :func:`zero`.

        :raises NbdError: it could not be done; a part of it may have been.
        """
        self.write_many((zero(offset, length, punch=punch),))

    def trim(self, offset: int, length: int) -> None:
        """Drop a range's content; see :func:`trim`.

        :raises NbdError: it could not be done.
        """
        self.write_many((trim(offset, length),))

    def flush(self) -> None:
        """Have the server write its caches out (to the disk, unless its node has ``no-flush``).

        :raises NbdError: it could not.
        """
        if self._flags & _SENDS_FLUSH:
            self.write_many((Operation(_FLUSH, 0, 0, 0, None),))

    def extents(self, offset: int, length: int, context: str = ALLOCATION) -> list[Extent]:
        """What a meta context says of a range: (offset, length, flags), ascending, without gaps.

        Flags are :data:`HOLE` and :data:`ZERO_READS` of :data:`ALLOCATION`, or :data:`DIRTY` of
        ``qemu:dirty-bitmap:NAME``. Neighbours with the same flags are one.

        :raises NbdError: the server cannot tell, or was not asked for this context when connecting.
        """
        ident = next((i for i, name in self._contexts.items() if name == context), None)
        if ident is None:
            raise NbdError(f"export '{self.name}' has no {context}", errno.ENOENT)
        self._within(offset, length)
        found: list[Extent] = []
        at, end = offset, offset + length
        while at < end:
            asked = min(end - at, _MAX_STATUS_BYTES)
            with self._errors():
                answer = self._status(at, asked, ident)
            for told, flags in _EXTENT.iter_unpack(answer):
                part = min(told, end - at)  # the last one may reach beyond what was asked for
                if not part:
                    break
                if found and found[-1][2] == flags:
                    first, before, _ = found[-1]
                    found[-1] = (first, before + part, flags)
                else:
                    found.append((at, part, flags))
                at += part
                if len(found) > _MAX_EXTENTS:
                    raise NbdError(f"export '{self.name}' is in too many pieces", errno.E2BIG)
        return found

    def _status(self, offset: int, length: int, ident: int) -> bytes:
        cookie = self._request(_STATUS, offset, length)
        failure: NbdError | None = None
        answer = b""
        done = False
        while not done:
            kind, size, done = self._chunk(cookie)
            if kind & _CHUNK_ERROR:
                failure = failure or _failed(self.name, _STATUS, offset, length, self._reason(size))
            elif (
                kind == _CHUNK_STATUS
                and size % _EXTENT.size == 4
                and 4 < size <= 4 + _MAX_EXTENTS * _EXTENT.size
            ):
                data = self._exactly(size)
                if struct.unpack_from(">I", data)[0] == ident and not answer:
                    answer = data[4:]
            elif kind != _CHUNK_NONE or size:
                raise self._nonsense(f"answered a block status with a chunk of type {kind}")
        if failure is not None:
            raise failure
        if not answer or not _EXTENT.unpack_from(answer)[0]:
            raise self._nonsense("answered a block status with none")
        return answer

    def _request(self, command: int, offset: int, length: int) -> int:
        cookie = next(self._cookies)
        self._sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, command, cookie, offset, length))
        return cookie

    def _chunk(self, expected: int) -> tuple[int, int, bool]:
        """Type and length of the next chunk, and whether it is the last."""
        magic, flags, kind, cookie, length = _CHUNK.unpack(self._exactly(_CHUNK.size))
        if magic != _STRUCTURED_MAGIC or cookie != expected:
            raise self._nonsense("sent a reply that was not asked for")
        return kind, length, bool(flags & _CHUNK_DONE)

    def _reason(self, length: int) -> tuple[int, str]:
        if not _ERROR.size <= length <= _MAX_MESSAGE_BYTES:
            raise self._nonsense("sent an error that is none")
        return _reason(self._exactly(length))

    # -- many changes -------------------------------------------------------------------

    def write_many(self, operations: Iterable[Operation]) -> None:
        """Do many changes, with many of them under way at a time.

        **In no order**: a server may take requests that it has at the same time as it likes, so
        they must not overlap each other. All are done when this returns. Memory: what is under way
        is bounded, by :data:`WINDOW_REQUESTS` and :data:`WINDOW_BYTES`.

        :raises NbdError: the first that failed; others may have been done, none is under way.
        """
        with self._errors():
            failure = _Pump(self.name, self._sock, self._cookies, self._timeout_s).run(
                self._pieces(operations)
            )
            if failure is not None:
                raise failure

    def _pieces(self, operations: Iterable[Operation]) -> Iterator[Operation]:
        size = self.size
        for operation in operations:
            command, flags, offset, length, data = operation
            if offset < 0 or offset + length > size:
                self._within(offset, length)
            limit = MAX_RANGE_BYTES if data is None else MAX_PAYLOAD_BYTES
            if length <= limit:
                if length or command == _FLUSH:
                    yield operation
                continue
            view = None if data is None else memoryview(data).cast("B")
            for at in range(0, length, limit):
                count = min(limit, length - at)
                part = None if view is None else view[at : at + count]
                yield Operation(command, flags, offset + at, count, part)

    # -- the connection -----------------------------------------------------------------

    def _within(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise NbdError(
                f"export '{self.name}' has {self.size} bytes: none at {offset}+{length}",
                errno.EINVAL,
            )

    def _nonsense(self, what: str) -> NbdError:
        return NbdError(f"NBD server of '{self.name}' {what}", errno.EPROTO)

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, target: memoryview) -> None:
        while target:
            count = self._sock.recv_into(target)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "closed")
            target = target[count:]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Typed errors; a connection that is out of step is used no more."""
        if self._broken is not None:
            raise NbdError(self._broken.message, self._broken.errno) from self._broken
        try:
            yield
        except NbdError as error:
            if error.errno == errno.EPROTO:
                self._break(error)
            raise
        except TimeoutError as error:
            raise self._break(
                NbdError(
                    f"NBD server of '{self.name}' did not answer for {self._timeout_s:.0f} s",
                    errno.ETIMEDOUT,
                )
            ) from error
        except OSError as error:
            number = error.errno or errno.ECONNRESET
            if number == errno.EPIPE:
                number = errno.ECONNRESET
            raise self._break(
                NbdError(f"NBD server of '{self.name}': {os.strerror(number)}", number)
            ) from error
        except BaseException as error:  # half a request may have gone out
            self._break(NbdError(f"a request to '{self.name}' was cut short: {error}", errno.EIO))
            raise

    def _break(self, error: NbdError) -> NbdError:
        self._broken = error
        self._sock.close()
        return error

    def close(self) -> None:
        """Say goodbye, where that still goes."""
        if self._broken is None:
            self._broken = NbdError(f"export '{self.name}' was closed", errno.EBADF)
            with contextlib.suppress(OSError):
                self._sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
        self._sock.close()

    def __enter__(self) -> Export:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _reason(data: bytes) -> tuple[int, str]:
    """Errno and text of an error chunk; the text is for people."""
    number, length = _ERROR.unpack_from(data)
    return number or errno.EIO, data[_ERROR.size : _ERROR.size + length].decode(errors="replace")


def _failed(name: str, command: int, offset: int, length: int, reason: tuple[int, str]) -> NbdError:
    number, text = reason
    if number > _MAX_ERRNO:
        number = errno.EIO
    told = os.strerror(number) + (f" ({text})" if text else "")
    where = f" of {length} bytes at {offset}" if length else ""
    return NbdError(f"export '{name}': {_WORDS[command]}{where} failed: {told}", number)


class _Pump:
    """Sends changes and collects their replies, both as the socket lets it.

    Neither side can wait for the other for ever: requests are sent without blocking, replies are
    read whenever there are some, and what is unanswered is bounded.
    """

    def __init__(
        self, name: str, sock: socket.socket, cookies: Iterator[int], timeout_s: float
    ) -> None:
        self._name, self._sock, self._cookies, self._timeout_s = name, sock, cookies, timeout_s
        self._waiting: dict[int, Operation] = {}
        self._bytes = 0
        self._unsent: deque[memoryview | Data] = deque()
        self._received = bytearray()
        self._buffer = memoryview(bytearray(64 << 10))
        self._failure: NbdError | None = None

    def run(self, operations: Iterator[Operation]) -> NbdError | None:
        """Do them; returns the first failure."""
        self._sock.settimeout(0)  # with a timeout Python would wait in send and recv
        try:
            self._run(operations)
        finally:
            self._sock.settimeout(self._timeout_s)
        return self._failure

    def _run(self, operations: Iterator[Operation]) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        interest = select.POLLIN
        more = True
        while True:
            # Filling up in large steps makes few, large sends.
            if more and len(self._waiting) <= WINDOW_REQUESTS // 2 and self._bytes < WINDOW_BYTES:
                more = self._take(operations)
            if self._unsent:
                self._send()
            elif not self._waiting and not more:
                break
            wanted = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            if wanted != interest:
                interest = wanted
                poll.modify(self._sock, wanted)
            if not poll.poll(self._timeout_s * 1e3):
                raise TimeoutError
            self._receive()
        if self._received:
            raise self._nonsense()

    def _take(self, operations: Iterator[Operation]) -> bool:
        """Queue what the window has room for; False when no more shall be."""
        if self._failure is not None:
            return False
        try:
            return self._fill(operations)
        except NbdError as error:  # the next one is none that can be done; others are under way
            self._failure = error
            return False

    def _fill(self, operations: Iterator[Operation]) -> bool:
        waiting, unsent, cookies = self._waiting, self._unsent, self._cookies
        for operation in islice(operations, WINDOW_REQUESTS - len(waiting)):
            command, flags, offset, length, data = operation
            cookie = next(cookies)
            waiting[cookie] = operation
            unsent.append(_REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length))
            if data is not None:
                unsent.append(data)
                self._bytes += length
                if self._bytes >= WINDOW_BYTES:
                    return True
        return len(waiting) == WINDOW_REQUESTS

    def _send(self) -> None:
        unsent = self._unsent
        while unsent:
            parts = list(islice(unsent, _SEND_PARTS))
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                return
            for part in parts:
                if sent < len(part):
                    unsent[0] = memoryview(part)[sent:]
                    return
                sent -= len(part)
                unsent.popleft()

    def _receive(self) -> None:
        try:
            count = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        data: bytearray | memoryview = self._buffer[:count]
        if self._received:
            self._received += data
            data = self._received
        used = self._replies(data)
        self._received = bytearray(data[used:])

    def _replies(self, data: bytearray | memoryview) -> int:
        """Take whole replies from the front; returns how many bytes they were."""
        waiting, at, end = self._waiting, 0, len(data)
        while end - at >= _SIMPLE.size:
            magic, number, cookie = _SIMPLE.unpack_from(data, at)
            if magic == _SIMPLE_MAGIC:
                at += _SIMPLE.size
                reason = (number, "")
            elif magic == _STRUCTURED_MAGIC:
                if end - at < _CHUNK.size:
                    break
                _, flags, kind, cookie, length = _CHUNK.unpack_from(data, at)
                last = at + _CHUNK.size + length
                if length > _MAX_MESSAGE_BYTES or not flags & _CHUNK_DONE:
                    raise self._nonsense()
                if last > end:
                    break
                if kind & _CHUNK_ERROR and length >= _ERROR.size:
                    reason = _reason(bytes(data[at + _CHUNK.size : last]))
                elif kind == _CHUNK_NONE and not length:
                    reason = (0, "")
                else:
                    raise self._nonsense()
                at = last
            else:
                raise self._nonsense()
            operation = waiting.pop(cookie, None)
            if operation is None:
                raise self._nonsense()
            if operation.data is not None:
                self._bytes -= operation.length
            if reason[0] and self._failure is None:
                self._failure = _failed(
                    self._name, operation.command, operation.offset, operation.length, reason
                )
        return at

    def _nonsense(self) -> NbdError:
        return NbdError(
            f"NBD server of '{self._name}' sent a reply that was not asked for", errno.EPROTO
        )
