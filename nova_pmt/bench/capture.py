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

"""``nova-pmt-bench capture``: no packet of an epoch leaves before its checkpoint is committed.

A guest under mixed load is protected, and captured on the far side of its tap, where the kernel
stamps what QEMU lets out. The worker writes down when it releases which epoch; the two records meet
in :mod:`nova_pmt.bench.violations`. A control with all releases one epoch later must find
violations, or the check could not find any.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from nova_pmt.bench import loads, violations
from nova_pmt.bench.loads import Background
from nova_pmt.bench.protection import protect
from nova_pmt.bench.report import Report
from nova_pmt.exception import LabError
from nova_pmt.lab import (
    Capture,
    Disk,
    GuestSpec,
    Lab,
    LabGuest,
    LabHost,
    Workload,
    capture,
    deployment,
    network,
)
from nova_pmt.lab.traffic import SOURCE_PORT
from nova_pmt.worker import trace

TRACE = "/run/nova_pmt/trace.json"
NIC = "net0"
UDP_PORT = 6000
#: Ethernet frames of the datagrams; the data network carries them.
SMALLEST, LARGEST = 60, 9000
DATAGRAM_EVERY_US = 1000
#: The stream gets no more than so much of the processor: the rest of the load needs some, too.
STREAM_BYTES, STREAM_EVERY_S = 1 << 20, 0.05
#: So long nothing may have been sent before it is known which byte comes next.
QUIET_S, QUIET_TIMEOUT_S = 0.3, 60.0
_TAKE_EVERY_S = 0.5
_DISKS = (
    Disk("/var/lib/libvirt/images/bench-capture.qcow2", 128),
    Disk("/var/lib/libvirt/images/bench-capture.raw", 128, format="raw"),
)


class _Taker:
    """Keeps times and lengths of what the guest sends; the rest of each packet is let go."""

    def __init__(self, seen: Capture) -> None:
        self._seen = seen
        self._times: list[npt.NDArray[np.float64]] = []
        self._lengths: list[npt.NDArray[np.int64]] = []
        self.count = 0

    def take(self) -> None:
        """What was captured until now."""
        packets = self._seen.take()
        packets = packets[~packets["outgoing"]]  # into the host, that is: from the guest
        self.count += len(packets)
        self._times.append(packets["at"].copy())
        self._lengths.append(packets["length"].astype(np.int64))

    def packets(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """All so far."""
        return np.concatenate(self._times), np.concatenate(self._lengths)


def tap(guest: LabGuest) -> str:
    """The host's interface of the guest's first NIC."""
    with guest.host.libvirt() as connection:
        xml = connection.lookupByUUIDString(guest.uuid).XMLDesc()
    target = ElementTree.fromstring(xml).find("./devices/interface/target")
    if target is None:
        raise LabError(f"{guest!r} has no interface")
    return target.get("dev", "")


def _releases(file: Path) -> list[violations.Release]:
    text = file.read_text(encoding="ascii")
    return violations.releases(text[: text.rfind("\n") + 1].splitlines(), NIC)


def _quiet(file: Path, since: float) -> int:
    """Wait until nothing has been sent for some time; returns where the stream is.

    :param since: CLOCK_MONOTONIC in seconds; time before it does not count.
    """
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(QUIET_S / 3)
        found = _releases(file)
        if not found:
            continue
        same = [one for one in found if one.end == found[-1].end and one.at >= since]
        if len(same) > 2 and same[-1].at - same[0].at >= QUIET_S:
            return found[-1].end
    raise LabError("the idle guest does not stop to send, so no packet's place is known")


@contextlib.contextmanager
def _capture(host: LabHost, interface: str, file: Path) -> Iterator[tuple[Capture, int]]:
    """A capture, and the byte of the stream at which its first packet begins."""
    while True:
        base = _quiet(file, 0.0)
        with capture(host, interface) as seen:
            # Nothing may have slipped through while it began.
            if _quiet(file, time.monotonic()) == base:
                yield seen, base
                return


def _load(guest: LabGuest, stack: contextlib.ExitStack) -> None:
    """Datagrams of all sizes, echoes, a stream and writes on the disks, until the stack's end."""

    def background(name: str, action: Any) -> None:
        stack.callback(Background(name, action).start().close)

    def echo(end: threading.Event) -> None:
        while not end.is_set():
            loads.echo(guest, 1.0)

    def stream(end: threading.Event) -> None:
        data = bytearray(STREAM_BYTES)
        with guest.connect(SOURCE_PORT) as connection:
            while not end.wait(STREAM_EVERY_S):
                connection.recv_into(data)

    def write(end: threading.Event) -> None:
        for name in guest.spec.disk_names:
            guest.control(f"disk write rand 4 50 {name}", 60)
            guest.control(f"disk write seq 256 8 {name}", 60)
            if end.wait(0.05):
                return

    # Datagrams find someone, or answers that nobody listens would be part of the load.
    ctl = guest.host.lab.ctl
    sink = ctl.in_network(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    stack.callback(sink.close)
    sink.bind(("0.0.0.0", UDP_PORT))
    guest.control(f"packets 0 {SMALLEST} {LARGEST} {DATAGRAM_EVERY_US} {UDP_PORT}")
    stack.callback(guest.control, "packets stop")
    background("echo", echo)
    background("stream", stream)
    if guest.spec.disks:
        background("disks", write)


def measure(
    guest: LabGuest, standby: LabHost, *, seconds: float, interval_ms: float, report: Report
) -> dict[str, Any]:
    """The row for a guest that runs; hosts are configured (lab.deployment).

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    file = guest.host.path(TRACE)
    file.unlink(missing_ok=True)
    host, interface = guest.host, tap(guest)
    env = {trace.VARIABLE: TRACE}
    with protect(guest, standby, interval_ms=interval_ms, primary_env=env) as protection:
        with _capture(host, interface, file) as (seen, base):
            taker = _Taker(seen)
            start = time.monotonic()
            with contextlib.ExitStack() as load:
                _load(guest, load)
                while (done := time.monotonic() - start) < seconds:
                    time.sleep(_TAKE_EVERY_S)
                    taker.take()
                    report.progress("seconds of load", int(done), int(seconds))
            stats = protection.stats()
            _quiet(file, time.monotonic())
            taker.take()
            lost = seen.lost
        found = [one for one in _releases(file) if one.at >= start and one.end >= base]
    at, lengths = taker.packets()
    verdict = violations.judge(at, lengths, found, base)
    control = violations.judge(at, lengths, violations.shifted(found), base)
    return {
        "seconds": round(seconds, 1),
        "interval_ms": interval_ms,
        **verdict.to_dict(),
        "lost_captures": lost,
        "control_violations": control.violations,
        "dropped_packets": sum(nic["dropped_packets"] for nic in stats["network"]),
        "pause_ms": stats["pause_ms"],
        "commit_ms": stats["commit_ms"],
        "output_delay_ms": stats["output_delay_ms"],
        "disk_bytes": stats["log_bytes_total"],
        "releases": len(found),
    }


def run(*, seconds: float, interval_ms: float, report: Report) -> list[dict[str, Any]]:
    """Measure. Returns one row.

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    with Lab(computes=2, rabbit=False) as lab:
        report.note("two hosts, a guest of 256 MiB with frames of up to 9,000 bytes")
        deployment.configure(lab)
        spec = GuestSpec(
            "bench-capture",
            memory_mib=256,
            mtu=network.JUMBO,
            disks=_DISKS,
            workload=Workload(console_every=0, dirty_pages=200, dirty_ms=20),
        )
        guest = lab.computes[0].boot(spec).wait_ready(120)
        return [
            measure(guest, lab.computes[1], seconds=seconds, interval_ms=interval_ms, report=report)
        ]
