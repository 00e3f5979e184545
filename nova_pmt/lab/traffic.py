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

"""What the guest's streams and datagrams carry (``guest/traffic.c``)."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np

from nova_pmt.lab.transactions import mix

SINK_PORT = 9
SOURCE_PORT = 19

#: Bytes after which the source's stream begins anew.
PERIOD = 256 * 1024
_STAMP = struct.Struct("<2sQQ")
_HEADERS = 14 + 20 + 8  # Ethernet, IP without options, UDP


@dataclass(frozen=True)
class Datagram:
    """One of the guest's datagrams.

    :param sequence: from 0, per ``packets`` command.
    :param counter: the workload's counter when it was sent.
    """

    sequence: int
    counter: int


def datagram(frame: bytes, port: int | None = None) -> Datagram | None:
    """What an Ethernet frame (its first 60 bytes will do) says, or None if it is none of these.

    :param port: where it goes; any if None.
    """
    if len(frame) < _HEADERS + _STAMP.size or frame[12:15] != b"\x08\x00\x45" or frame[23] != 17:
        return None
    if port is not None and int.from_bytes(frame[36:38], "big") != port:
        return None
    magic, sequence, counter = _STAMP.unpack_from(frame, _HEADERS)
    return Datagram(sequence, counter) if magic == b"PM" else None


@functools.cache
def _period() -> bytes:
    return mix(np.arange(PERIOD // 8, dtype=np.uint64)).astype("<u8").tobytes()


def source_bytes(offset: int, length: int) -> bytes:
    """What the source on port 19 sends from byte ``offset`` of a connection on."""
    start = offset % PERIOD
    return (_period() * ((start + length) // PERIOD + 1))[start : start + length]
