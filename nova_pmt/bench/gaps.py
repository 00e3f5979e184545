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

"""What clients missed of a server whose primary failed: causes, goals, and the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nova_pmt.bench.rows import quantiles

#: What can happen to the primary.
CAUSES: Mapping[str, str] = MappingProxyType(
    {
        "qemu": "QEMU is killed",
        "silent": "its host's networks are cut",
        "stopped": "its host stands still",
    }
)
#: At most so long without an answer, in ms.
QEMU_P50_MS, QEMU_P99_MS = 300.0, 1000.0
SILENT_EXTRA_MS = 300.0
STOPPED_MS = 1500.0


@dataclass
class Samples:
    """Of one cause; times in ms, one for each run.

    :param gap: the longest time without an answer to any client.
    :param total: from the fault until the standby ran; ``detection`` until it took note.
    :param activation: from then on.
    :param destroyed: from when the failed host was well again until the old domain was gone.
    :param late_releases: what a side let out that it must not have.
    :param late_frames: of the guest, out of the failed host after the standby went on.
    """

    gap: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    detection: list[float] = field(default_factory=list)
    activation: list[float] = field(default_factory=list)
    destroyed: list[float] = field(default_factory=list)
    late_releases: int = 0
    late_frames: int = 0


def goals(cause: str, peer_timeout_ms: int) -> dict[str, float]:
    """The most that quantiles of the gap may be, in ms."""
    if cause == "qemu":
        return {"p50": QEMU_P50_MS, "p99": QEMU_P99_MS}
    if cause == "silent":
        return {"p50": peer_timeout_ms + SILENT_EXTRA_MS}
    return {"max": STOPPED_MS}


def row(cause: str, samples: Samples, peer_timeout_ms: int) -> dict[str, Any]:
    """The result for one cause."""
    gap, goal = quantiles(samples.gap), goals(cause, peer_timeout_ms)
    return {
        "cause": cause,
        "runs": len(samples.gap),
        "peer_timeout_ms": peer_timeout_ms,
        "gap_ms": gap,
        "goal_ms": goal,
        "met": all(gap[key] <= limit for key, limit in goal.items()),
        "failover_ms": quantiles(samples.total),
        "detection_ms": quantiles(samples.detection),
        "activation_ms": quantiles(samples.activation),
        "destroyed_ms": quantiles(samples.destroyed),
        "late_releases": samples.late_releases,
        "late_frames": samples.late_frames,
    }
