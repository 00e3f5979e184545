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

"""Whether captured packets left before their checkpoint was committed: pure functions.

The redirector's stream has, for each packet, 4 bytes of length, a virtio-net header and the frame
(QEMU's net/filter-mirror.c; 12 bytes of header for a modern device, virtio 1.1 section 5.1.6). The
worker's trace tells at which byte of the stream each epoch ended and when it was released. So a
captured packet's epoch follows from the lengths of all before it, and nothing has to be told
by the packet itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

#: In front of each packet's virtio-net header.
LENGTH_BYTES = 4
#: Sizes of that header: modern or with mergeable buffers; legacy; none.
HEADERS = (12, 10, 0)


@dataclass(frozen=True)
class Release:
    """The release of an epoch's packets.

    :param end: byte of the NIC's stream at which the epoch ended.
    :param at: CLOCK_MONOTONIC in seconds, just before.
    """

    epoch: int
    end: int
    at: float


@dataclass(frozen=True)
class Verdict:
    """What a capture says.

    :param bytes: of frames.
    :param epochs: releases that let out at least one packet.
    :param violations: packets that were seen before their epoch was released, or never were.
    :param unmatched_ends: ends of epochs that are not at the end of a captured packet.
    :param header_bytes: of virtio-net, with which they are.
    :param closest_ms: least time from a release to a packet of it.
    """

    packets: int
    bytes: int
    smallest: int
    largest: int
    epochs: int
    violations: int
    unmatched_ends: int
    header_bytes: int
    closest_ms: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def releases(lines: Sequence[str], nic: str) -> list[Release]:
    """The releases of one NIC in a worker's trace (:mod:`nova_pmt.worker.trace`), in order.

    :raises ValueError: a line is not of a trace.
    """
    found = []
    for line in lines:
        data = json.loads(line)
        if data["event"] == "release" and data["nic"] == nic:
            found.append(Release(int(data["epoch"]), int(data["end"]), float(data["at"])))
    return found


def shifted(found: Sequence[Release]) -> list[Release]:
    """As if each epoch's packets should have waited for the checkpoint after theirs."""
    return [replace(one, at=after.at) for one, after in pairwise(found)]


def _ends(lengths: npt.NDArray[np.int64], base: int, header: int) -> npt.NDArray[np.int64]:
    ends: npt.NDArray[np.int64] = base + np.cumsum(lengths + (LENGTH_BYTES + header))
    return ends


def judge(
    at: npt.NDArray[np.float64],
    lengths: npt.NDArray[np.int64],
    found: Sequence[Release],
    base: int,
) -> Verdict:
    """Give each packet its epoch, and compare times.

    :param at: when each packet was captured, in order; CLOCK_MONOTONIC in seconds.
    :param lengths: of frames.
    :param found: releases from the first captured packet on.
    :param base: byte of the stream at which the first captured packet begins.
    :raises ValueError: nothing was captured, or released.
    """
    if not len(at) or not found:
        raise ValueError("no packets or no releases")
    lengths = lengths.astype(np.int64)
    wanted = np.array([one.end for one in found], np.int64)
    times = np.array([one.at for one in found])
    unmatched, header, ends = min(
        (
            (int(np.count_nonzero(~np.isin(wanted, np.append(ends, base)))), header, ends)
            for header in HEADERS
            for ends in [_ends(lengths, base, header)]
        ),
        key=lambda found: (found[0], HEADERS.index(found[1])),
    )
    epoch = np.searchsorted(wanted, ends, side="left")  # the first that ends there or behind it
    released = np.append(times, np.inf)[epoch]
    early = at < released
    margins = (at - released)[~early]
    return Verdict(
        packets=len(at),
        bytes=int(lengths.sum()),
        smallest=int(lengths.min()),
        largest=int(lengths.max()),
        epochs=len(np.unique(epoch)),
        violations=int(np.count_nonzero(early)),
        unmatched_ends=unmatched,
        header_bytes=header,
        closest_ms=round(float(margins.min()) * 1e3, 3) if len(margins) else 0.0,
    )


def capture_passed(row: dict[str, Any]) -> bool:
    """Whether a row of ``nova-pmt-bench capture`` shows that no packet left early.

    That is only known when every packet has its place in the stream, and when the control, whose
    releases are one epoch later, shows that early ones would have been found.
    """
    wrong = row["violations"] + row["lost_captures"] + row["unmatched_ends"]
    return bool(wrong == 0 and row["control_violations"] > 0)
