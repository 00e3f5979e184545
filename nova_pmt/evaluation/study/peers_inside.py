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

"""The process that measures the peers: ``python -m nova_pmt.evaluation.study.peers_inside`` inside
a host. Speaks with :mod:`nova_pmt.bench.child`.

First line: ``domain``; then ``peer``, ``times``, and ``pages`` for what needs it. The answer has
``pauses_ms``; empty where the peer could not do it, and ``why``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from nova_pmt import exception
from nova_pmt.bench.inside import URI, Guest, Tell, converse
from nova_pmt.checkpoint.interfaces import PAGE_SIZE
from nova_pmt.guest.monitor import DirectMonitor, QmpCommandError

_SNAPSHOT = "/dev/shm/nova-pmt-eval.snapshot"
#: Migrations that do not come to an end are no peers.
_LIMIT_S = 30.0
#: QEMU's default of the longest pause that it plans for; and no limit of speed, as Nova sets it.
_PARAMETERS = {"downtime-limit": 300, "max-bandwidth": 1 << 40}
_ENDED = frozenset({"completed", "failed", "cancelled"})
_IO_BYTES = 1 << 20
_COPIES = 20


@dataclass(frozen=True)
class Host:
    """Migrates the guest to nowhere."""

    guest: Guest

    def let_run(self) -> None:
        """The guest may stand still, after something that went wrong."""
        deadline = time.monotonic() + _LIMIT_S
        with DirectMonitor(self.guest.monitor, _LIMIT_S) as monitor:
            while not monitor.execute("query-status")["running"] and time.monotonic() < deadline:
                with contextlib.suppress(QmpCommandError):  # not yet
                    monitor.execute("cont")
                time.sleep(0.05)

    @contextlib.contextmanager
    def migration(self, monitor: DirectMonitor) -> Iterator[None]:
        """Migrate to a socket whose other end throws away what comes; ends with all of it read,
        and the guest stopped."""
        path = os.path.join(self.guest.directory, "peer.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        before = monitor.execute("query-migrate-parameters")
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            stack.callback(os.unlink, path)
            os.chmod(path, 0o666)  # the directory is closed to everyone but QEMU's user and root
            listener.listen(1)
            kept = {name: before[name] for name in _PARAMETERS if name in before}
            monitor.execute("migrate-set-parameters", **_PARAMETERS)
            stack.callback(lambda: monitor.execute("migrate-set-parameters", **kept))
            monitor.execute("migrate", uri=f"unix:{path}")
            listener.settimeout(_LIMIT_S)
            stream = stack.enter_context(listener.accept()[0])
            sink = threading.Thread(target=_swallow, args=(stream,), daemon=True)
            sink.start()
            yield
            self._await_end(monitor)
            sink.join(_LIMIT_S)

    @staticmethod
    def _await_end(monitor: DirectMonitor) -> None:
        deadline, cancelled = time.monotonic() + _LIMIT_S, False
        while (status := monitor.execute("query-migrate")["status"]) not in _ENDED:
            if time.monotonic() > deadline and not cancelled:
                cancelled = True
                monitor.execute("migrate_cancel")
            if time.monotonic() > deadline + _LIMIT_S:
                break
            time.sleep(0.001)
        if status != "completed":
            raise exception.GuestError(f"the migration did not come to an end in {_LIMIT_S:.0f} s")


def _swallow(stream: socket.socket) -> None:
    buffer = bytearray(_IO_BYTES)
    with contextlib.suppress(OSError):
        while stream.recv_into(buffer):
            pass


def _at_ms(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3)


def live_migration(host: Host, monitor: DirectMonitor) -> float:
    """The switchover's pause as the source has it: from its stop until all of it is sent. What the
    destination then does, and the way there, come on top."""
    try:
        with host.migration(monitor):
            pass
        downtime = monitor.execute("query-migrate").get("downtime")
    finally:
        monitor.execute("cont")
    if downtime is None:
        raise exception.GuestError("QEMU does not tell of a downtime")
    return float(downtime)


def stop_and_copy(host: Host, monitor: DirectMonitor) -> float:
    """All memory, while the guest stands."""
    start = time.perf_counter()
    monitor.execute("stop")
    try:
        with host.migration(monitor):
            pass
    finally:
        monitor.execute("cont")
    return (time.perf_counter() - start) * 1e3


def snapshot(host: Host, monitor: DirectMonitor) -> float:
    """What libvirt's live snapshot of memory stops the guest for; of no disk."""
    monitor.forget_events({"STOP", "RESUME"})
    command = [
        *(
            "virsh",
            "-c",
            URI,
            "snapshot-create-as",
            host.guest.uuid,
            "eval",
            "--no-metadata",
            "--live",
        ),
        *("--memspec", f"file={_SNAPSHOT},snapshot=external"),
    ]
    for target in ET.fromstring(host.guest.xml).iterfind("devices/disk/target"):
        disk = target.get("dev", "")
        command += ["--diskspec", f"{disk},snapshot=no"]
    try:
        ran = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=4 * _LIMIT_S
        )
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_SNAPSHOT)
    if ran.returncode:
        raise exception.GuestError(f"virsh snapshot-create-as: {ran.stderr.strip()}")
    stop = monitor.wait_event("STOP", 5.0)
    resume = monitor.wait_event("RESUME", 5.0)
    return _at_ms(resume) - _at_ms(stop)


def memcpy(pages: int) -> float:
    """The limit: copying so many pages, here and there in memory, to memory that is there."""
    draw = np.random.default_rng(1)
    source = np.ones((4 * pages, PAGE_SIZE), np.uint8)
    places = np.sort(draw.choice(4 * pages, pages, replace=False))
    target = np.zeros((pages, PAGE_SIZE), np.uint8)
    times = []
    for _ in range(_COPIES):
        start = time.perf_counter()
        np.take(source, places, axis=0, out=target, mode="clip")
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


_OF_GUESTS: dict[str, Callable[[Host, DirectMonitor], float]] = {
    "live-migration": live_migration,
    "snapshot": snapshot,
    "stop-and-copy": stop_and_copy,
}


def _measure(host: Host, request: dict[str, Any]) -> dict[str, Any]:
    peer, found = request["peer"], []
    try:
        for _ in range(request["times"]):
            if peer == "memcpy":
                found.append(memcpy(request["pages"]))
                continue
            with DirectMonitor(host.guest.monitor, _LIMIT_S) as monitor:
                found.append(_OF_GUESTS[peer](host, monitor))
    except (exception.PmtError, OSError, subprocess.SubprocessError) as error:
        host.let_run()
        return {"pauses_ms": [], "why": getattr(error, "message", "") or str(error)}
    return {"pauses_ms": found}


def serve(source: TextIO, sink: TextIO) -> int:
    """See the module's text."""

    def talk(first: dict[str, Any], requests: Iterator[dict[str, Any]], tell: Tell) -> None:
        host = Host(Guest.find(first["domain"]))
        tell(done="start")
        for request in requests:
            tell(done="measure", **_measure(host, request))

    return converse(source, sink, talk)


if __name__ == "__main__":
    sys.exit(serve(sys.stdin, sys.stdout))
