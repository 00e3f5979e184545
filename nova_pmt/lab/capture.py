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

"""Captures of packets: when the kernel saw each, how long it was, and its first bytes.

The kernel writes them into a ring that it shares with us (packet(7), TPACKET_V2): 20,000 packets
per second cost little even beside emulated guests, and what finds no room is counted.
"""

from __future__ import annotations

import mmap
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nova_pmt.exception import LabError

if TYPE_CHECKING:
    from nova_pmt.lab.host import LabHost

#: Bytes that are kept of each packet.
SNAP = 128

# linux/if_packet.h, linux/if_ether.h, asm-generic/socket.h: what the socket module does not name.
_SOL_PACKET = 263
_PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION = 5, 6, 10
_TPACKET_V2 = 1
_TP_STATUS_USER = 1
_SO_TIMESTAMPNS = 35
_ETH_P_ALL = 3

_FRAMES = 1 << 16  # three seconds of 20,000 packets per second
_FRAME = 256
_BLOCK = 1 << 18
#: A frame of the ring: struct tpacket2_hdr (32 bytes), struct sockaddr_ll (20), and the packet,
#: which the kernel puts so that its IP header is at a multiple of 16.
_RING = np.dtype(
    {
        "names": ["status", "length", "sec", "nsec", "kind", "data"],
        "formats": ["<u4", "<u4", "<u4", "<u4", "u1", f"V{SNAP}"],
        "offsets": [0, 4, 16, 20, 42, 66],
        "itemsize": _FRAME,
    }
)
#: As they are kept: ``at`` in seconds of CLOCK_MONOTONIC.
FIELDS = np.dtype([("at", "<f8"), ("length", "<u4"), ("outgoing", "?"), ("data", f"V{SNAP}")])


@dataclass(frozen=True)
class Packet:
    """A captured packet.

    :param at: CLOCK_MONOTONIC in seconds, as the kernel took it when the packet passed.
    :param length: of the frame in bytes, without its checksum. A segment that the sender leaves to
        others to cut in pieces is one packet, and long.
    :param data: its first :data:`SNAP` bytes.
    :param outgoing: it left this namespace through the interface, and did not come in.
    """

    at: float
    length: int
    data: bytes
    outgoing: bool


class Capture:
    """All packets of an interface, both ways, from ``with`` to its end; made by :func:`capture`."""

    def __init__(self, ring: socket.socket) -> None:
        self._socket = ring
        self._map = mmap.mmap(ring.fileno(), _FRAMES * _FRAME)
        self._ring: Any = np.frombuffer(self._map, dtype=_RING)
        self._head = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="capture", daemon=True)
        self._parts: list[npt.NDArray[Any]] = []
        self._lost = 0

    def take(self) -> npt.NDArray[Any]:
        """What was captured until now and not yet taken, in order, as an array of :data:`FIELDS`.

        ``data`` of a shorter packet ends in bytes of no meaning.
        """
        with self._lock:
            self._drain()
            parts, self._parts = self._parts, []
        return np.concatenate(parts) if parts else np.empty(0, FIELDS)

    def packets(self) -> list[Packet]:
        """As :meth:`take`, packet by packet."""
        return [
            Packet(at, length, bytes(data)[:length], outgoing)
            for at, length, outgoing, data in self.take().tolist()
        ]

    @property
    def lost(self) -> int:
        """Packets that passed while the ring was full."""
        with self._lock:
            if self._ring is not None:
                size = struct.calcsize("II")
                found = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, size)
                self._lost += struct.unpack("II", found)[1]  # the kernel starts anew at 0
        return self._lost

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLERR)
        while not self._end.is_set():
            if poll.poll(100):
                # Many at once: who looks at every packet is too slow for them.
                self._end.wait(0.005)
                with self._lock:
                    self._drain()

    def _drain(self) -> None:
        """Take over from the ring what the kernel has put there."""
        while self._ring is not None:
            frames = self._ring[self._head :]
            ready = frames["status"] & _TP_STATUS_USER
            count = len(ready) if ready.all() else int(ready.argmin())
            if not count:
                return
            frames = frames[:count]
            part = np.empty(count, FIELDS)
            part["at"] = (frames["sec"].astype(np.int64) * 10**9 + frames["nsec"] - _offset()) / 1e9
            part["length"] = frames["length"]
            part["outgoing"] = frames["kind"] == socket.PACKET_OUTGOING
            part["data"] = frames["data"]
            frames["status"] = 0  # the kernel's again
            self._parts.append(part)
            self._head = (self._head + count) % _FRAMES

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        with self._lock:
            self._drain()
        _ = self.lost
        with self._lock:
            self._ring = None
            self._map.close()
            self._socket.close()


def _offset() -> int:
    """CLOCK_REALTIME, in which the kernel stamps, minus CLOCK_MONOTONIC, in ns."""
    samples = []
    for _ in range(5):
        before, real, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        samples.append((after - before, real - (before + after) // 2))
    return min(samples)[1]


def capture(host: LabHost, interface: str) -> Capture:
    """Capture on an interface of ctl or of a compute host; use the result as ``with capture(...)``.

    ``capture(lab.ctl, "data1")`` sees what compute1's guests send when it is beyond that host;
    ``capture(host, "vnet0")`` what one guest does.

    :raises LabError: there is no such interface.
    """

    def open_ring() -> socket.socket:
        ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            ring.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)  # stamped as they come in
            ring.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
            size = _FRAMES * _FRAME
            request = struct.pack("IIII", _BLOCK, size // _BLOCK, _FRAME, _FRAMES)
            ring.setsockopt(_SOL_PACKET, _PACKET_RX_RING, request)
            ring.bind((interface, _ETH_P_ALL))
        except OSError as e:
            ring.close()
            raise LabError(f"{host.name}: no capture on {interface!r}: {e}") from e
        return ring

    return Capture(host.in_network(open_ring))
