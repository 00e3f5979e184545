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

"""A cable that is late, or that changes bytes, in user space: for kernels without netem.

The host's end in ctl leaves its bridge; a relay passes its packets to a port that takes its place,
and back. Segments that the sender leaves to its card (TSO) pass whole, with the kernel's notes on
them (packet(7), PACKET_VNET_HDR): their checksums are made, if at all, when they leave the machine,
so a byte that is changed here is one that TCP does not find. That is the worst that a network does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

# linux/if_packet.h, linux/if_ether.h: what the socket module does not name.
_SOL_PACKET = 263
_PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 15, 23
_ETH_P_ALL = 3
_SIOCGIFMTU = 0x8921

_VNET_HDR_BYTES = 10
#: Ethernet, IPv4 and TCP with time stamps: a byte behind them is one of the stream.
_HEADERS_BYTES = 14 + 20 + 32
_PACKET_BYTES = _VNET_HDR_BYTES + 14 + (1 << 16)
#: What waits in one direction; more is lost, as in any queue of a card.
_QUEUE_PACKETS = 4096


def open_port(interface: str) -> socket.socket:
    """All packets that come in through ``interface`` of the caller's network namespace.

    :raises OSError: there is no such interface, or the caller is not root.
    """
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    try:
        port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        port.bind((interface, _ETH_P_ALL))
        port.setblocking(False)
    except BaseException:
        port.close()
        raise
    return port


def mtu(interface: str) -> int:
    """In bytes, of an interface of the caller's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16si20x", interface.encode(), 0)
        return int(struct.unpack("16si20x", fcntl.ioctl(any_socket, _SIOCGIFMTU, request))[1])


@dataclass
class _Way:
    """One direction."""

    source: socket.socket
    target: socket.socket
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)


class Relay:
    """Passes packets between two ports until :meth:`close`, in a thread of its own.

    :param ports: of :func:`open_port`; the relay closes them.
    :param delay_s: of each packet, in each direction.
    :param corrupt: part of the packets in which a bit is changed, 0 to 1.
    :ivar passed: packets; and ``corrupted``, of them.
    """

    def __init__(
        self,
        ports: tuple[socket.socket, socket.socket],
        *,
        delay_s: float = 0.0,
        corrupt: float = 0.0,
    ) -> None:
        self.passed = self.corrupted = 0
        self._delay_s, self._corrupt = delay_s, corrupt
        self._random = random.Random(os.urandom(8))
        self._ways = (_Way(*ports), _Way(*reversed(ports)))
        self._end = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; what waits is lost."""
        if not self._end.is_set():
            self._end.set()
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            for way in self._ways:
                way.source.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            for way in self._ways:
                selector.register(way.source, selectors.EVENT_READ, way)
            while not self._end.is_set():
                for key, _ in selector.select(self._send_due()):
                    if isinstance(key.data, _Way):
                        self._receive(key.data)

    def _receive(self, way: _Way) -> None:
        # An interface that goes with its host's power says so once: nothing comes any more.
        with contextlib.suppress(OSError):
            while len(way.waiting) < _QUEUE_PACKETS:
                packet = way.source.recv(_PACKET_BYTES)
                way.waiting.append((time.monotonic() + self._delay_s, self._spoil(packet)))

    def _spoil(self, packet: bytes) -> bytes:
        payload = len(packet) - _VNET_HDR_BYTES - _HEADERS_BYTES
        if payload <= 0 or self._random.random() >= self._corrupt:
            return packet
        changed = bytearray(packet)
        at = _VNET_HDR_BYTES + _HEADERS_BYTES + self._random.randrange(payload)
        changed[at] ^= 1 << self._random.randrange(8)
        self.corrupted += 1
        return bytes(changed)

    def _send_due(self) -> float | None:
        """Send what is due; seconds until the next packet is, None while none waits."""
        now, left = time.monotonic(), None
        for way in self._ways:
            while way.waiting and way.waiting[0][0] <= now:
                _, packet = way.waiting.popleft()
                self.passed += 1
                with contextlib.suppress(OSError):  # full, or gone: a cable says nothing
                    way.target.send(packet)
            if way.waiting:
                due = max(0.0, way.waiting[0][0] - now)
                left = due if left is None else min(left, due)
        return left
