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

"""As much of rtnetlink as the buffer ``plug`` speaks; messages are made by pyroute2.

Why not pyroute2's sockets: on the path of a checkpoint a request is made before it is needed, is
sent without a wait for its answer, and its answer is read with a few lines instead of some hundred
objects. pyroute2 comes in when a message has to be made or understood, so that a worker whose
guests need no ``plug`` never loads it (0.2 s).

Formats: rtnetlink(7), ``linux/netlink.h``, ``linux/rtnetlink.h``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_GETTCLASS = 42
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

NLM_F_REQUEST, NLM_F_ACK, NLM_F_ECHO = 0x1, 0x4, 0x8
NLM_F_DUMP = 0x300
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11

#: nlmsghdr: length, type, flags, sequence number, port.
_HEADER = struct.Struct("=IHHII")
_SEQUENCE = struct.Struct("=I")
_SEQUENCE_AT = 8
_ERROR = struct.Struct("=i")
_ATTRIBUTE = struct.Struct("=HH")
_NESTED_MASK = 0x3FFF
_BUFFER_BYTES = 256 << 10
#: An answer is there when the request was sent; this is for a kernel that is not well.
_TIMEOUT_S = 5.0

Request = bytearray


def request(message: Any, kind: int, flags: int = 0) -> Request:
    """A pyroute2 message (``tcmsg``, ``ifinfmsg``) as it goes over the socket."""
    message["header"] = {
        "type": kind,
        "flags": NLM_F_REQUEST | flags,
        "sequence_number": 0,
        "pid": 0,
    }
    message.encode()
    return bytearray(message.data)


def plain(kind: int, flags: int, index: int, *rest: int) -> Request:
    """A request about an interface, without attributes; needs no pyroute2.

    :param rest: what follows the interface's index: handle, parent, info of a ``tcmsg``; flags,
        change of an ``ifinfomsg``.
    """
    body = struct.pack(f"=B3xi{len(rest)}I", 0, index, *rest)
    return bytearray(
        _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body
    )


def attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each attribute in ``data``, without the flags of the type."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NESTED_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


class Rtnl:
    """A socket to rtnetlink, for one thread at a time.

    The kernel does what a request says before ``send`` returns (after it got the RTNL lock, which
    it may have to wait for), and has its answer in the socket by then.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(
                socket.socket(
                    socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
                )
            )
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            self._socket.bind((0, 0))
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", int(_TIMEOUT_S), 0)
            )
            undo.pop_all()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Rtnl:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def send(self, one: Request) -> int:
        """Send a request with NLM_F_ACK and leave its answer to :meth:`answers`.

        :returns: its sequence number.
        :raises OSError: it was not sent.
        """
        sequence = self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        _SEQUENCE.pack_into(one, _SEQUENCE_AT, sequence)
        self._socket.send(one)
        return sequence

    def answers(self) -> list[tuple[int, OSError | None]]:
        """Sequence number and fault of each request that was answered; does not wait."""
        found: list[tuple[int, OSError | None]] = []
        while True:
            try:
                count = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            for kind, sequence, payload in self._messages(count):
                if kind == _NLMSG_ERROR:
                    found.append((sequence, _fault(payload)))

    def call(self, *requests: Request) -> None:
        """Let requests (with NLM_F_ACK) be done, in order.

        :raises OSError: of the first that failed, with the kernel's words; those after it were
            done all the same.
        """
        if not requests:
            return
        first = self._sequence + 1
        for number, one in enumerate(requests, first):
            _SEQUENCE.pack_into(one, _SEQUENCE_AT, number & 0xFFFFFFFF)
        self._sequence = (first + len(requests) - 1) & 0xFFFFFFFF
        self._socket.send(b"".join(requests))
        worst: OSError | None = None
        missing = {number & 0xFFFFFFFF for number in range(first, first + len(requests))}
        while missing:
            for kind, sequence, payload in self._messages(self._socket.recv_into(self._buffer)):
                if kind == _NLMSG_ERROR and sequence in missing:
                    missing.discard(sequence)
                    worst = worst or _fault(payload)
        if worst is not None:
            raise worst

    def ask(self, one: Request) -> list[bytes]:
        """What the kernel answers to a dump, or to a request with NLM_F_ACK.

        :returns: each message without its header.
        :raises OSError: it refused.
        """
        sequence = self.send(one)
        found: list[bytes] = []
        while True:
            for kind, number, payload in self._messages(self._socket.recv_into(self._buffer)):
                if number != sequence:
                    continue
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    fault = _fault(payload) if len(payload) >= _ERROR.size else None
                    if fault is not None:
                        raise fault
                    return found
                found.append(bytes(payload))

    def _messages(self, count: int) -> Iterator[tuple[int, int, memoryview]]:
        at = 0
        while at + _HEADER.size <= count:
            length, kind, _, sequence, _ = _HEADER.unpack_from(self._buffer, at)
            if length < _HEADER.size:
                return
            yield kind, sequence, self._buffer[at + _HEADER.size : at + length]
            at += (length + 3) & ~3


def _fault(payload: memoryview) -> OSError | None:
    """What an NLMSG_ERROR (or the end of a dump) says; None: all is well."""
    (number,) = _ERROR.unpack_from(payload)
    if not number:
        return None
    # error, then the header of our request (NETLINK_CAP_ACK: no more of it), then attributes
    words = os.strerror(-number)
    for kind, value in attributes(payload[_ERROR.size + _HEADER.size :]):
        if kind == _NLMSGERR_ATTR_MSG:
            words += ": " + bytes(value).rstrip(b"\0").decode(errors="replace")
    return OSError(-number, words)


def absent(error: OSError) -> bool:
    """Whether a request failed because what it names is not there."""
    return error.errno in (errno.ENODEV, errno.ENOENT)
