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

"""Less to send: pages of zeros as their numbers only, and the rest compressed where that pays.

Both ends of it. Runs in the thread of the link, behind the resume; the codecs let go of the
interpreter's lock, so a pause that begins meanwhile does not wait for them.
"""

from __future__ import annotations

import importlib.metadata
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from oslo_log import log

from nova_pmt import exception
from nova_pmt.checkpoint.interfaces import PAGE_SIZE, Pages
from nova_pmt.codecs.base import Codec
from nova_pmt.codecs.choice import Choice
from nova_pmt.plugins import load_class
from nova_pmt.replication.protocol import LIMITS, MAX_PAGES, Header, Type
from nova_pmt.replication.speed import Speed

LOG = log.getLogger(__name__)

NAMESPACE = "nova_pmt.codecs"
#: Less than that is sent as it is.
LEAST_BYTES = 1024
#: What something that was packed must not be larger than, of what it was.
WORTH = 0.95
#: A frame that was packed as a whole begins with the length of what it was.
LENGTH = struct.Struct("!I")
#: A few words of each page tell nearly all of those that are not zero.
_SAMPLE_WORDS = 64

#: The contents of as many zero pages as a frame can have.
ZEROS = memoryview(bytes(MAX_PAGES * PAGE_SIZE))


def available(names: Iterable[str]) -> dict[str, Codec]:
    """Those of these codecs that there are here, in their order."""
    found = {}
    for name in names:
        try:
            found[name] = load_class(NAMESPACE, name, Codec)()  # type: ignore[type-abstract]
        except Exception as error:  # noqa: BLE001 - whatever a plug-in's constructor raises
            LOG.warning(
                "codec %s is not used: %s (install it, or take it out of [replication] codecs)",
                name,
                error,
            )
    return found


def first_of(offered: Iterable[str]) -> tuple[str, Codec] | None:
    """The first that a primary offers and that there is here; None: there is none."""
    installed = importlib.metadata.entry_points(group=NAMESPACE).names
    for name in offered:
        if name in installed and (found := available([name])):
            return name, found[name]
    return None


def agreed(offered: Mapping[str, Codec], answer: object) -> tuple[str, Codec] | None:
    """The codec that the standby answered with; None: it knows of none.

    :raises nova_pmt.exception.ProtocolMismatch: it was not offered.
    """
    if answer is None:
        return None
    if not isinstance(answer, str) or answer not in offered:
        raise exception.ProtocolMismatch("the standby chose a codec that it was not offered")
    return answer, offered[answer]


def zero_pages(data: Pages) -> npt.NDArray[np.bool_]:
    """Which of these pages are zero."""
    words = data.view(np.uint64)
    zero: npt.NDArray[np.bool_] = np.logical_not(words[:, ::_SAMPLE_WORDS].any(axis=1))
    candidates = np.flatnonzero(zero)
    if len(candidates):
        zero[candidates] = np.logical_not(words[candidates].any(axis=1))
    return zero


class Packer:
    """Compresses frames, each kind of data as hard as it pays.

    :param speed: of the link.
    """

    def __init__(
        self,
        name: str,
        codec: Codec,
        speed: Speed,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self._codec, self._speed, self._clock = codec, speed, clock
        self._choices = {
            kind: Choice(codec.levels, clock)
            for kind in (Type.PAGES, Type.DELTA, Type.LOG, Type.BLOCK)
        }
        for level in codec.levels:  # what it needs memory for is found here, and not in a pause
            codec.compress(ZEROS, level)

    def pack(self, kind: Type, data: memoryview) -> bytes | None:
        """Compressed; None: send it as it is."""
        if len(data) < LEAST_BYTES:
            return None
        choice = self._choices[kind]
        level = choice.level(self._speed.s_per_byte)
        if level is None:
            return None
        start = self._clock()
        packed = self._codec.compress(data, level)
        choice.count(level, len(data), self._clock() - start, len(packed))
        return packed if len(packed) <= WORTH * len(data) else None

    def summary(self) -> dict[str, Any]:
        """For the status: codec, and for pages the level and what it leaves. Any thread."""
        choice = self._choices[Type.PAGES]
        return {"name": self.name, "level": choice.best, "left": round(choice.left, 3)}


def unpack(codec: Codec | None, header: Header, packed: memoryview, out: memoryview) -> None:
    """Fill ``out`` with what was packed.

    :raises nova_pmt.exception.CheckpointCorrupt: it cannot be.
    """
    try:
        if codec is None:
            raise ValueError("no codec was agreed on")
        codec.decompress(packed, out)
    except ValueError as error:
        raise exception.CheckpointCorrupt(
            f"{header.type.name} of checkpoint {header.epoch}, packed: {error}"
        ) from error


def unpack_whole(codec: Codec | None, header: Header, payload: memoryview) -> memoryview:
    """The payload of a frame that was packed as a whole.

    :raises nova_pmt.exception.CheckpointCorrupt: it cannot be unpacked.
    """
    (length,) = LENGTH.unpack_from(payload)  # (the header was checked: it is there)
    if not 0 < length <= LIMITS[header.type]:
        raise exception.CheckpointCorrupt(f"{header.type.name} frame of {length} bytes, packed")
    out = memoryview(bytearray(length))
    unpack(codec, header, payload[LENGTH.size :], out)
    return out
