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

"""The process that measures QMP clients: ``python -m nova_pmt.bench.measure_qmp`` inside a host.

Speaks with :mod:`nova_pmt.bench.child` as :mod:`nova_pmt.bench.measure` does.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from qemu.qmp import QMPClient

from nova_pmt.bench.inside import Guest, Tell, converse
from nova_pmt.guest.execution import SAVE, DirectExecution
from nova_pmt.guest.monitor import DirectMonitor
from nova_pmt.worker import pausing

#: Not counted: the first rounds of a connection.
SETTLE = 3


def direct(path: str, directory: str, rounds: int, pause_s: float) -> list[float]:
    """Milliseconds of stop, save and cont, one command after the other, by our monitor."""
    file, found = os.path.join(directory, "devices.state"), []
    with DirectMonitor(path) as monitor:
        for _ in range(rounds):
            time.sleep(pause_s)
            start = time.perf_counter()
            monitor.execute("stop")
            monitor.execute(SAVE, filename=file, live=False)
            monitor.execute("cont")
            found.append((time.perf_counter() - start) * 1e3)
    return found


def pipelined(path: str, directory: str, rounds: int, pause_s: float) -> list[float]:
    """The same as the product does it."""
    found = []
    with DirectMonitor(path) as monitor:
        execution = DirectExecution(monitor, directory)
        for _ in range(rounds):
            execution.prepare()
            time.sleep(pause_s)
            start = time.perf_counter()
            execution.pause()
            execution.saved()
            execution.resume()
            found.append((time.perf_counter() - start) * 1e3)
    return found


def library(path: str, directory: str, rounds: int, pause_s: float) -> list[float]:
    """The same by qemu.qmp; all three in one coroutine, which is the best case for it."""
    file, found = os.path.join(directory, "devices.state"), []

    async def measure() -> None:
        client = QMPClient("bench")
        await client.connect(path)
        try:
            for _ in range(rounds):
                await asyncio.sleep(pause_s)
                start = time.perf_counter()
                await client.execute("stop")
                await client.execute(SAVE, {"filename": file, "live": False})
                await client.execute("cont")
                found.append((time.perf_counter() - start) * 1e3)
        finally:
            await client.disconnect()

    asyncio.run(measure())
    return found


def stepwise(path: str, directory: str, rounds: int, pause_s: float) -> list[float]:
    """By qemu.qmp as the pause would have to: between the steps its thread scans and copies.

    The pause's thread is no coroutine: it hands each command to the loop, the save without
    waiting for its end, since QEMU saves while memory is scanned.
    """
    file, found = os.path.join(directory, "devices.state"), []
    client = QMPClient("bench")
    loop = asyncio.new_event_loop()
    wait = loop.run_until_complete
    try:
        wait(client.connect(path))
        for _ in range(rounds):
            wait(asyncio.sleep(pause_s))
            start = time.perf_counter()
            wait(client.execute("stop"))
            saving = loop.create_task(client.execute(SAVE, {"filename": file, "live": False}))
            wait(asyncio.sleep(0))  # the command goes out; here the product would scan
            wait(saving)
            wait(client.execute("cont"))
            found.append((time.perf_counter() - start) * 1e3)
        wait(client.disconnect())
    finally:
        loop.close()
    return found


CLIENTS: dict[str, Callable[[str, str, int, float], list[float]]] = {
    "direct": direct,
    "pipelined": pipelined,
    "library": library,
    "stepwise": stepwise,
}


def blocks(rounds: int, block: int) -> list[int]:
    """Sizes of the blocks that ``rounds`` are cut into."""
    return [min(block, rounds - at) for at in range(0, rounds, block)]


def serve(source: TextIO, sink: TextIO) -> int:
    """First line: ``domain``; second: ``rounds``, ``block``, ``interval_ms``."""

    def talk(first: dict[str, Any], requests: Iterator[dict[str, Any]], tell: Tell) -> None:
        guest = Guest.find(first["domain"])
        with DirectMonitor(guest.monitor) as monitor:
            version = monitor.execute("query-version")["qemu"]
        pausing.prepare()
        parts = ("major", "minor", "micro")
        tell(done="start", qemu=".".join(str(version[part]) for part in parts))
        for request in requests:
            samples: dict[str, list[float]] = {name: [] for name in CLIENTS}
            for size in blocks(request["rounds"], request["block"]):
                for name, client in CLIENTS.items():
                    pause_s = request["interval_ms"] / 1e3
                    times = client(guest.monitor, guest.directory, size + SETTLE, pause_s)
                    samples[name] += times[SETTLE:]
                tell(progress=len(samples["library"]), total=request["rounds"])
            tell(done="measure", samples=samples)

    return converse(source, sink, talk)


if __name__ == "__main__":
    sys.exit(serve(sys.stdin, sys.stdout))
