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

"""Datagrams and streams of the guest are recognised from their bytes alone."""

from __future__ import annotations

import struct

import pytest

from nova_pmt.lab.traffic import PERIOD, Datagram, datagram, source_bytes


def frame(payload: bytes, port: int = 5000, protocol: int = 17) -> bytes:
    ethernet = bytes(12) + b"\x08\x00"
    ip = b"\x45" + bytes(8) + bytes([protocol]) + bytes(10)
    return ethernet + ip + struct.pack(">HHHH", 1, port, 0, 0) + payload


STAMP = struct.pack("<2sQQ", b"PM", 12, 3456)


def test_datagram_of_the_shortest_frame():
    shortest = frame(STAMP)
    assert len(shortest) == 60
    assert datagram(shortest) == datagram(shortest, 5000) == Datagram(12, 3456)


@pytest.mark.parametrize(
    "other",
    [
        frame(STAMP)[:59],
        frame(b"XX" + STAMP[2:]),
        frame(STAMP, protocol=6),
        b"\0" * 100,
        b"",
    ],
    ids=["cut off", "no magic", "tcp", "zeros", "empty"],
)
def test_other_frames_are_none(other):
    assert datagram(other) is None


def test_other_ports_are_none():
    assert datagram(frame(STAMP), 5001) is None


def test_stream_repeats_itself():
    start = source_bytes(0, 64)
    assert source_bytes(PERIOD, 64) == start
    assert source_bytes(PERIOD - 8, 72) == source_bytes(PERIOD - 8, 8) + start
    assert source_bytes(3, 5) == start[3:8]
    assert len(source_bytes(PERIOD + 17, 3 * PERIOD)) == 3 * PERIOD
    # mix(0), as guest/memory.c has it
    assert start[:8] == (0xE220A8397B1DCDAF).to_bytes(8, "little")
