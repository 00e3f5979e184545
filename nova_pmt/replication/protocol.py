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

"""Frames of the replication protocol, version 3.

Each frame is a header of 24 bytes, big endian, and a payload::

    0   2s   magic "PM"
    2   u8   type
    3   u8   flags: 1 in COMMIT: the device state is a delta against the last one;
             2 in PAGES, DELTA, BLOCK and LOG: compressed (see below)
    4   u32  length of the payload, in bytes
    8   u64  epoch
    16  u64  value; its meaning depends on the type

===========  ====  ===========================================================================
type         from  payload; epoch; value
===========  ====  ===========================================================================
HELLO        P     JSON: protocol, pair, layout, disks, codecs. Its form never changes between
                   versions
WELCOME      S     JSON: protocol, images (generation and epoch of disks that were kept, or null),
                   codec (the one of the primary's that is used, or null)
COPY         P     JSON: full. The first copy of disks begins: of all, or of what has changed
BLOCK        P     data of a disk's first copy, before checkpoint 1; disk and offset
LOG          P     a part of a disk's write log, as QEMU wrote it; epoch; disk
PRELUDE      P     head of the activation stream (ROMs)
PAGES        P     value x int64 page numbers, little endian, then value x 4096 bytes; epoch
DELTA        P     changes of pages against the last commit (see delta.py); epoch; pages
ZEROS        P     value x int64 page numbers, of pages that are zero; epoch
COMMIT       P     xxh3_128 of the checkpoint (16 bytes), device state; epoch; pages sent in all
COMMITTED    S     none; epoch; first half of the checksum, as the standby found it
HEARTBEAT    both  none
BYE          both  JSON: reason. From P: protection ends, the primary goes on; S answers in kind
GUEST_DIED   P     JSON: reason. The primary's QEMU has ended: the standby may go on
SWITCHOVER   P     none; epoch of the final checkpoint: the standby shall go on
ACTIVATED    S     JSON: times. The standby runs
ERROR        S     JSON: code, message, cure; the connection ends
===========  ====  ===========================================================================

Compressed: of PAGES the contents, after the numbers; of the others the whole payload, after its
length (u32, big endian). The codec is the one of WELCOME. A standby that names none there does not
know compressed frames, nor ZEROS.

Where the value names a disk, its highest byte is the disk's number and the rest an offset in bytes.

The checksum covers page numbers, whole pages, blocks, logs and the whole device state in the order
in which they were sent. It is not a defence against people (TLS is) but against memory, firmware
and ourselves.
"""

from __future__ import annotations

import enum
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from nova_pmt import exception
from nova_pmt.checkpoint.interfaces import PAGE_SIZE

VERSION = 3
MAGIC = b"PM"
HEADER = struct.Struct("!2sBBIQQ")
DIGEST_BYTES = 16
#: Flag of a COMMIT frame.
STATE_IS_DELTA = 1
#: Flag of PAGES, DELTA, BLOCK and LOG frames.
PACKED = 2
MAX_PAGES = 256
NUMBER_BYTES = 8
#: Most that one BLOCK or LOG frame holds.
DISK_BYTES = 1 << 20
MAX_DISKS = 128
_DISK_SHIFT = 56
#: More than so many that a primary offers are not looked at.
_MAX_CODECS = 16
_CODEC = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Type(enum.IntEnum):
    """Frame types."""

    HELLO = 1
    WELCOME = 2
    PRELUDE = 3
    PAGES = 4
    COMMIT = 5
    COMMITTED = 6
    HEARTBEAT = 7
    BYE = 8
    GUEST_DIED = 9
    SWITCHOVER = 10
    ACTIVATED = 11
    ERROR = 12
    COPY = 13
    BLOCK = 14
    LOG = 15
    DELTA = 16
    ZEROS = 17


_JSON_LIMIT = 1 << 16
#: Longest payload of each type.
LIMITS: dict[Type, int] = {
    Type.HELLO: _JSON_LIMIT,
    Type.WELCOME: _JSON_LIMIT,
    Type.PRELUDE: 256 << 20,
    Type.PAGES: MAX_PAGES * (NUMBER_BYTES + PAGE_SIZE),
    Type.COMMIT: (64 << 20) + DIGEST_BYTES,
    Type.COMMITTED: 0,
    Type.HEARTBEAT: 0,
    Type.BYE: _JSON_LIMIT,
    Type.GUEST_DIED: _JSON_LIMIT,
    Type.SWITCHOVER: 0,
    Type.ACTIVATED: _JSON_LIMIT,
    Type.ERROR: _JSON_LIMIT,
    Type.COPY: _JSON_LIMIT,
    Type.BLOCK: DISK_BYTES,
    Type.LOG: DISK_BYTES,
    Type.DELTA: MAX_PAGES * (NUMBER_BYTES + PAGE_SIZE),
    Type.ZEROS: MAX_PAGES * NUMBER_BYTES,
}
#: Flags that frames may have, and how long those with PACKED are at least.
_FLAGS = {Type.COMMIT: STATE_IS_DELTA} | dict.fromkeys(
    (Type.PAGES, Type.DELTA, Type.BLOCK, Type.LOG), PACKED
)
_LEAST_PACKED = 5


def disk_value(disk: int, offset: int = 0) -> int:
    """The value of a frame that names a disk."""
    return disk << _DISK_SHIFT | offset


def disk_of(value: int) -> tuple[int, int]:
    """Number of the disk, and offset, in a frame's value."""
    return value >> _DISK_SHIFT, value & ((1 << _DISK_SHIFT) - 1)


@dataclass(frozen=True)
class Header:
    """A frame's header; see the module's text."""

    type: Type
    length: int
    epoch: int = 0
    value: int = 0
    flags: int = 0

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, self.type, self.flags, self.length, self.epoch, self.value)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Header:
        """Parse and check a header.

        :raises nova_pmt.exception.ProtocolMismatch: it is not one of ours.
        """
        magic, kind, flags, length, epoch, value = HEADER.unpack(data)
        if magic != MAGIC:
            raise exception.ProtocolMismatch("the peer does not speak the replication protocol")
        try:
            known = Type(kind)
        except ValueError:
            raise exception.ProtocolMismatch(f"unknown frame type {kind}") from None
        if length > LIMITS[known]:
            raise exception.ProtocolMismatch(f"{known.name} frame of {length} bytes")
        if flags & ~_FLAGS.get(known, 0):
            raise exception.ProtocolMismatch(f"frame with unknown flags {flags:#x}")
        packed = bool(flags & PACKED and known is not Type.COMMIT)
        if known in (Type.PAGES, Type.DELTA, Type.ZEROS):
            cls._check_pages(known, length, value, packed)
        elif packed and length < _LEAST_PACKED:
            raise exception.ProtocolMismatch(f"packed {known.name} frame of {length} bytes")
        if known in (Type.BLOCK, Type.LOG) and not length:
            raise exception.ProtocolMismatch(f"{known.name} frame without data")
        if known is Type.COMMIT and length < DIGEST_BYTES:
            raise exception.ProtocolMismatch(f"COMMIT frame of {length} bytes")
        return cls(known, length, epoch, value, flags)

    @staticmethod
    def _check_pages(kind: Type, length: int, count: int, packed: bool) -> None:
        numbers, whole = count * NUMBER_BYTES, count * (NUMBER_BYTES + PAGE_SIZE)
        right = {
            Type.PAGES: numbers < length < whole if packed else length == whole,
            Type.DELTA: length >= (_LEAST_PACKED if packed else numbers),
            Type.ZEROS: length == numbers,
        }[kind]
        if not (0 < count <= MAX_PAGES and right):
            raise exception.ProtocolMismatch(
                f"{kind.name} frame of {length} bytes for {count} pages"
            )


def pack_json(kind: Type, data: dict[str, Any], epoch: int = 0) -> bytes:
    """A whole frame with a JSON payload."""
    payload = json.dumps(data, separators=(",", ":")).encode()
    if len(payload) > LIMITS[kind]:
        raise ValueError(f"{kind.name} payload of {len(payload)} bytes")
    return Header(kind, len(payload), epoch).pack() + payload


def unpack_json(payload: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The object in a JSON payload.

    :raises nova_pmt.exception.ProtocolMismatch: it is not one.
    """
    try:
        data = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise exception.ProtocolMismatch("payload is not JSON") from error
    if not isinstance(data, dict):
        raise exception.ProtocolMismatch("payload is not a JSON object")
    return data


class Digest:
    """Checksum over one checkpoint."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self.pages = 0

    def add_pages(self, numbers: Any, data: Any, count: int) -> None:
        """Page numbers (as bytes) and contents of one PAGES frame."""
        self._state.update(numbers)
        self._state.update(data)
        self.pages += count

    def add_disk(self, value: int, data: Any) -> None:
        """Value and payload of one BLOCK or LOG frame."""
        self._state.update(value.to_bytes(8, "big"))
        self._state.update(data)

    def finish(self, device_state: bytes | memoryview) -> bytes:
        """The checksum; the object is ready for the next checkpoint after it."""
        self._state.update(device_state)
        value = self._state.digest()
        self._state.reset()
        self.pages = 0
        return value


def hello(
    pair: dict[str, Any],
    layout: list[dict[str, Any]],
    disks: list[dict[str, Any]],
    codecs: Sequence[str] = (),
) -> bytes:
    """The first frame of a primary.

    :param codecs: names of those that it can compress with, best first.
    """
    return pack_json(
        Type.HELLO,
        {
            "protocol": VERSION,
            "page_size": PAGE_SIZE,
            "pair": pair,
            "layout": layout,
            "disks": disks,
            "codecs": list(codecs),
        },
    )


def offered_codecs(hello: dict[str, Any]) -> list[str]:
    """Names of the codecs that a primary offers; what is none is left out."""
    offered = hello.get("codecs")
    if not isinstance(offered, list):
        return []
    return [one for one in offered[:_MAX_CODECS] if isinstance(one, str) and _CODEC.fullmatch(one)]


def receipt_of(digest: bytes) -> int:
    """What a COMMITTED frame has of a checkpoint's checksum.

    A standby that answers without having looked, or by mistake for another checkpoint, is found
    out: see :meth:`nova_pmt.replication.sender.Sender.received`.
    """
    return int.from_bytes(digest[:8], "big")


def check_hello(
    data: dict[str, Any],
    pair: dict[str, Any],
    layout: list[dict[str, Any]],
    disks: list[dict[str, Any]],
) -> None:
    """See that the primary means the pair that this standby waits for.

    :raises nova_pmt.exception.ProtocolMismatch: other version.
    :raises nova_pmt.exception.PairMismatch: other pair, generation, memory layout or disks.
    """
    if data.get("protocol") != VERSION or data.get("page_size") != PAGE_SIZE:
        raise exception.ProtocolMismatch(
            f"primary speaks protocol {data.get('protocol')!r}, this standby {VERSION}"
        )
    theirs = data.get("pair")
    if not isinstance(theirs, dict):
        raise exception.ProtocolMismatch("HELLO names no pair")
    for key in ("uuid", "generation", "primary_host", "standby_host"):
        if theirs.get(key) != pair[key]:
            raise exception.PairMismatch(
                f"primary says {key} {theirs.get(key)!r}, this standby waits for {pair[key]!r}"
            )
    if data.get("layout") != layout:
        raise exception.PairMismatch("primary and standby differ in memory layout")
    if data.get("disks") != disks:
        raise exception.PairMismatch("primary and standby differ in disks")
