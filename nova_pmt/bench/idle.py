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

"""``nova-pmt-bench idle``: what passes between the hosts for a guest that does nothing."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from nova_pmt.bench.protection import protect
from nova_pmt.bench.report import Report
from nova_pmt.lab import GuestSpec, Lab, LabGuest, LabHost, Workload, capture, deployment

#: Packets that are so far apart belong to two bursts.
GAP_S = 0.005
#: A frame without payload (a heartbeat, an acknowledged checkpoint) in one TLS record: 24 bytes of
#: header, 22 of the record, TCP with time stamps, IP, Ethernet.
SMALL_BYTES = 24 + 22 + 32 + 20 + 14
#: Rounds after the first synchronisation, before it counts.
SETTLE_S = 2.0


def bursts(at: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Bursts of packets with a checkpoint's data in them, and bursts of small ones only.

    :param at: seconds, in order.
    :param lengths: of frames, in bytes.
    """
    if not len(at):
        return 0, 0
    starts = np.concatenate(([0], np.flatnonzero(np.diff(at) > GAP_S) + 1))
    largest = np.maximum.reduceat(lengths, starts)
    data = int(np.count_nonzero(largest > SMALL_BYTES))
    return data, len(starts) - data


def measure(
    guest: LabGuest, standby: LabHost, *, seconds: float, interval_ms: float
) -> dict[str, Any]:
    """The row for a guest that runs; hosts are configured (lab.deployment).

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    lab = guest.host.lab
    with protect(guest, standby, interval_ms=interval_ms) as protection:
        time.sleep(SETTLE_S)
        with capture(lab.ctl, f"repl{guest.host.index}") as seen:
            before, start = protection.stats(), time.monotonic()
            seen.take()
            time.sleep(seconds)
            packets = seen.take()
            elapsed = time.monotonic() - start
            after = protection.stats()
            lost = seen.lost
    lengths = packets["length"].astype(np.int64)
    data, small = bursts(packets["at"], lengths)
    sent = int(lengths[~packets["outgoing"]].sum())
    intervals = elapsed * 1e3 / interval_ms
    rounds = after["rounds"] - before["rounds"]
    return {
        "interval_ms": interval_ms,
        "memory_mib": guest.spec.memory_mib,
        "seconds": round(elapsed, 2),
        "mbit_per_s": round(int(lengths.sum()) * 8 / 1e6 / elapsed, 3),
        "sent_mbit_per_s": round(sent * 8 / 1e6 / elapsed, 3),
        "packets": len(packets),
        "lost_captures": lost,
        "checkpoint_bursts_per_interval": round(data / intervals, 3),
        "heartbeat_bursts_per_interval": round(small / intervals, 3),
        "rounds": rounds,
        "pages_per_round": round(
            (after["pages"]["total"] - before["pages"]["total"]) / max(rounds, 1), 1
        ),
        "bytes_per_round": round(sent / max(rounds, 1)),
        "pause_ms": after["pause_ms"],
        "commit_ms": after["commit_ms"],
    }


def run(*, seconds: float, interval_ms: float, report: Report) -> list[dict[str, Any]]:
    """Measure. Returns one row.

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    with Lab(computes=2, rabbit=False) as lab:
        report.note("two hosts, a guest of 128 MiB that is idle")
        deployment.configure(lab)
        guest = lab.computes[0].boot(
            GuestSpec("bench-idle", workload=Workload(tick_ms=1000, console_every=0))
        )
        guest.wait_ready(120)
        return [measure(guest, lab.computes[1], seconds=seconds, interval_ms=interval_ms)]
