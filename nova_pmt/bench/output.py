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

"""``nova-pmt-bench output``: what a client sees of a guest, protected and not.

One guest in one run; each load is measured unprotected, protected and unprotected again, one right
after the other. The mean of the two outer ones is what the protected one is compared with, and
their ratio tells how much the machine drifted meanwhile. Protected anew for each load, so that the
rounds' statistics are that load's.

A machine that plays both hosts writes everything twice to one disk and does all the work of both
on its few processors, so that without limits the ratio of throughputs tells of that machine. Limits
like those of a flavor (``quota:disk_write_bytes_sec``, ``quota:vif_outbound_average``) make it tell
of protection; the report shows which there were.

What a request waits for is the end of its epoch and the commit: at most one interval and a pause,
and what it takes to send a checkpoint. :data:`ALLOWANCE_MS` is for the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import libvirt

from nova_pmt.bench import loads
from nova_pmt.bench.cpu import Usage
from nova_pmt.bench.protection import Protection, protect
from nova_pmt.bench.report import Report
from nova_pmt.bench.rows import quantiles, ratio
from nova_pmt.lab import Disk, GuestSpec, Lab, LabGuest, LabHost, Workload, deployment

#: Latency under protection may be the interval, a pause, and this.
ALLOWANCE_MS = 5.0
#: Of the unprotected throughput, under protection, at least.
GOAL = 0.6
_IMAGES = "/var/lib/libvirt/images"
DISK_MIB = 256
#: Before the first measurement: images get their size then, and not while they are measured.
_FILL = ("seq", 1024, DISK_MIB - 48)

Run = Callable[[LabGuest, float], Any]


@dataclass(frozen=True)
class Load:
    """Something to measure.

    :param run: takes the guest and seconds; returns MB/s, or latencies in milliseconds.
    """

    name: str
    run: Run
    is_latency: bool = False


@dataclass(frozen=True)
class Limits:
    """What the guest may use at most; 0: no limit.

    :param disk_mb_s: of writes, for each disk.
    :param network_mbit: of the host's link to the guests' network, both ways.
    """

    disk_mb_s: int = 0
    network_mbit: int = 0

    def apply(self, guest: LabGuest) -> None:
        """To a running guest."""
        if self.disk_mb_s:
            with guest.host.libvirt() as connection:
                domain = connection.lookupByUUIDString(guest.uuid)
                for name in guest.spec.disk_names:
                    limit = {"write_bytes_sec": int(self.disk_mb_s * loads.MB)}
                    domain.setBlockIoTune(name, limit, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        if self.network_mbit:
            guest.host.link("data").limit(self.network_mbit)


@dataclass
class Measured:
    """One load's measurements, in order: unprotected, protected, unprotected."""

    off: list[Any] = field(default_factory=list)
    on: Any = None
    stats: dict[str, Any] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)


def _writes(order: str, block_kib: int) -> Run:
    def run(guest: LabGuest, seconds: float) -> float:
        return loads.DiskWriter(guest, order, block_kib, guest.spec.disk_names).write(seconds)

    return run


#: In the order in which they are measured.
LOADS = (
    Load("echo, 64 bytes", loads.echo, is_latency=True),
    Load("transaction, durable on two disks", loads.transactions, is_latency=True),
    Load("disk write, sequential, 1 MiB", _writes("seq", 1024)),
    Load("disk write, random, 4 KiB", _writes("rand", 4)),
    Load("TCP stream from the guest", loads.stream_from),
    Load("TCP stream to the guest", loads.stream_to),
)


def row(load: Load, measured: Measured, *, interval_ms: float) -> dict[str, Any]:
    """One row of the report."""
    stats = measured.stats
    found: dict[str, Any] = {
        "load": load.name,
        "kind": "latency" if load.is_latency else "throughput",
        "interval_ms": interval_ms,
        "rounds": stats["rounds"],
        "throttled_rounds": stats["throttled_rounds"],
        "pages_per_round": stats["pages"]["p50"],
        "log_bytes": stats["log_bytes_total"],
        "sent_bytes": stats["sent_bytes"],
        "dropped_packets": sum(nic["dropped_packets"] for nic in stats["network"]),
        "pause_ms": stats["pause_ms"],
        "pause_steps_ms": stats["pause_steps_ms"],
        "commit_ms": stats["commit_ms"],
        "output_delay_ms": stats["output_delay_ms"],
        "cores": measured.cores,
    }
    if load.is_latency:
        before, after, on = (quantiles(some) for some in (*measured.off, measured.on))
        unprotected = (before["p50"] + after["p50"]) / 2
        bound = interval_ms + stats["pause_ms"]["p50"] + ALLOWANCE_MS
        found |= {
            "off_ms": [before, after],
            "on_ms": on,
            "requests": len(measured.on),
            "ratio": ratio(on["p50"], unprotected),
            "drift": ratio(after["p50"], before["p50"]),
            "bound_ms": round(bound, 3),
            "met": on["p50"] <= bound,
        }
    else:
        before, after = measured.off
        share = ratio(measured.on, (before + after) / 2)
        found |= {
            "off_mb_s": [round(before, 2), round(after, 2)],
            "on_mb_s": round(measured.on, 2),
            "ratio": share,
            "drift": ratio(after, before),
            "goal": GOAL,
            "met": share >= GOAL,
        }
    return found


def _processes(guest: LabGuest, protection: Protection) -> dict[str, int]:
    return {
        "guest": guest.pid,
        "primary worker": protection.primary_pid,
        "standby worker": protection.standby_pid,
    }


def measure(
    guest: LabGuest,
    standby: LabHost,
    load: Load,
    *,
    seconds: float,
    interval_ms: float,
) -> dict[str, Any]:
    """The row of one load on a guest that runs; hosts are configured (lab.deployment).

    :param seconds: that each of the three measurements takes.
    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    measured = Measured()
    measured.off.append(load.run(guest, seconds))
    with protect(guest, standby, interval_ms=interval_ms) as protection:
        usage = Usage(_processes(guest, protection))
        measured.on = load.run(guest, seconds)
        measured.cores = usage.cores()
        measured.stats = protection.stats()
    measured.off.append(load.run(guest, seconds))
    return row(load, measured, interval_ms=interval_ms)


def spec(memory_mib: int, *, disks: bool = True) -> GuestSpec:
    """The guest that is measured."""
    return GuestSpec(
        "bench-output",
        memory_mib=memory_mib,
        disks=(
            Disk(f"{_IMAGES}/bench-output.qcow2", DISK_MIB),
            Disk(f"{_IMAGES}/bench-output.raw", DISK_MIB, format="raw"),
        )
        if disks
        else (),
        workload=Workload(console_every=0),
    )


def fill(guest: LabGuest) -> None:
    """Write all blocks of its disks once that the loads write again and again."""
    order, block, count = _FILL
    for name in guest.spec.disk_names:
        guest.control(f"disk write {order} {block} {count} {name}", 120)


def run(
    *,
    seconds: float,
    interval_ms: float,
    memory_mib: int,
    report: Report,
    limits: Limits = Limits(),
) -> list[dict[str, Any]]:
    """Measure. Returns a row for each load.

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    with Lab(computes=2, rabbit=False) as lab:
        report.note(f"two hosts, a guest of {memory_mib} MiB with a qcow2 and a raw disk")
        deployment.configure(lab)
        guest = lab.computes[0].boot(spec(memory_mib)).wait_ready(120)
        fill(guest)
        limits.apply(guest)
        rows = []
        for number, load in enumerate(LOADS):
            report.progress("loads", number, len(LOADS))
            rows.append(
                measure(guest, lab.computes[1], load, seconds=seconds, interval_ms=interval_ms)
            )
        report.progress("loads", len(LOADS), len(LOADS))
    facts = {"memory_mib": memory_mib, "vcpus": guest.spec.vcpus, **asdict(limits)}
    return [{**one, **facts} for one in rows]
