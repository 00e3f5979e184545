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

"""What the guest really sends, as it comes out of each host: the traces' independent witness.

A capture on each host's port of the data network, in ctl. It also sees what nobody writes down: a
guest that goes on behind the back of agent and worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nova_pmt.evaluation.timeline import Timeline
from nova_pmt.lab import Lab, LabHost, capture
from nova_pmt.lab.capture import Capture

#: What was let out before another side went on may be under way for so long, in seconds.
GRACE_S = 0.05


@dataclass(frozen=True)
class Frame:
    """A frame of the guest.

    :param at: CLOCK_MONOTONIC in seconds.
    :param host: out of which it came.
    """

    at: float
    host: str


class Wire:
    """Captures from when it is made to :meth:`close`; see the module's text."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._captures: dict[str, tuple[Capture, contextlib.ExitStack]] = {}
        self._kept: list[tuple[str, npt.NDArray[Any]]] = []
        for host in lab.computes:
            self.watch(host)

    def watch(self, host: LabHost) -> None:
        """Begin; also anew, with the new port that a host has after a power cut."""
        self._leave(host.name)
        stack = contextlib.ExitStack()
        seen = stack.enter_context(capture(self._lab.ctl, f"data{host.index}"))
        self._captures[host.name] = (seen, stack)

    def _leave(self, name: str) -> None:
        if name in self._captures:
            seen, stack = self._captures.pop(name)
            stack.close()
            self._kept.append((name, seen.take()))

    def take(self, mac: str) -> list[Frame]:
        """Frames of this sender that came in since the last time, in order."""
        parts, self._kept = self._kept, []
        parts += [(name, seen.take()) for name, (seen, _) in self._captures.items()]
        sender = np.frombuffer(bytes.fromhex(mac.replace(":", "")), np.uint8)
        found = []
        for name, frames in parts:
            if not len(frames):
                continue
            data = np.frombuffer(frames["data"].tobytes(), np.uint8).reshape(len(frames), -1)
            ours = (data[:, 6:12] == sender).all(axis=1) & ~frames["outgoing"]
            found += [Frame(float(at), name) for at in frames["at"][ours]]
        return sorted(found, key=lambda frame: frame.at)

    def close(self) -> None:
        """End all captures."""
        for name in list(self._captures):
            self._leave(name)


def strays(frames: Iterable[Frame], timeline: Timeline) -> dict[str, list[float]]:
    """Frames that came out of a host after another one went on: for each host how many ms later."""
    found: dict[str, list[float]] = {}
    for frame in frames:
        owner, since = timeline.owner_at(frame.at)
        if frame.host != owner and frame.at - since > GRACE_S:
            found.setdefault(frame.host, []).append((frame.at - since) * 1e3)
    return found


def told(found: dict[str, list[float]]) -> Sequence[str]:
    """In words."""
    return [
        f"{len(late)} frames came out of {host} {min(late):.0f} to {max(late):.0f} ms after "
        "another host went on"
        for host, late in found.items()
    ]
