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

"""What a guest does while it is measured, and how much of it gets done.

Each scenario is a load that this machine's clients drive for some seconds, over a background that
the guest does by itself. The amount of work is counted the same way protected and unprotected, so
that their ratio is what protection leaves.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from nova_pmt.bench import loads
from nova_pmt.lab import LabGuest

#: Requests at a time of the scenarios with clients.
CLIENTS = 4
#: Of a database, and of one that many ask.
SESSIONS, MANY_SESSIONS = 16, 64
#: A guest that writes memory is asked something so often.
ASK_S = 0.02


@dataclass(frozen=True)
class Work:
    """What was done in a measurement.

    :param per_s: amount each second, in the scenario's unit.
    :param latencies_ms: of requests; empty where there are none.
    """

    per_s: float
    latencies_ms: list[float] = field(default_factory=list)


Drive = Callable[[LabGuest, float], Work]


@dataclass(frozen=True)
class Scenario:
    """One kind of guest.

    :param text: for people: what it does.
    :param unit: of :attr:`Work.per_s`; empty where nothing is counted.
    :param background: commands to the guest before; the same words with zeros end them.
    :param drive: takes the guest and seconds.
    """

    name: str
    text: str
    unit: str
    drive: Drive
    background: Sequence[str] = ()

    def begin(self, guest: LabGuest) -> None:
        """The background goes on from now."""
        for command in self.background:
            guest.control(command)

    @contextlib.contextmanager
    def driven(self, guest: LabGuest, seconds: float) -> Iterator[None]:
        """The load goes on until the end of the block, and for at most so long after it."""
        over = threading.Event()

        def drive() -> None:
            while not over.is_set():
                self.drive(guest, seconds)

        with ThreadPoolExecutor(1) as pool:
            driven = pool.submit(drive)
            try:
                yield
            finally:
                over.set()
            driven.result()

    def end(self, guest: LabGuest) -> None:
        """The guest rests again."""
        for word in {command.split()[0] for command in self.background}:
            guest.control({"dirty": "dirty 0 0", "skew": "skew 0", "full": "full 0"}[word])


def _idle(_guest: LabGuest, seconds: float) -> Work:
    time.sleep(seconds)
    return Work(0.0)


def _memory(guest: LabGuest, seconds: float) -> Work:
    """Rounds of the guest's dirtying, while a client asks it something each :data:`ASK_S`: without
    output Kemari would have nothing to do, and nobody would wait for anything."""
    before, start = _rounds(guest), time.perf_counter()
    latencies = loads.echo(guest, seconds, every_s=ASK_S)
    return Work((_rounds(guest) - before) / (time.perf_counter() - start), latencies)


def _rounds(guest: LabGuest) -> int:
    return int(guest.control("rounds").split()[-1])


def _requests(*kinds: Callable[[LabGuest, float], list[float]]) -> Drive:
    """Clients, each of its own kind, that ask one after the other."""

    def drive(guest: LabGuest, seconds: float) -> Work:
        start = time.perf_counter()
        with ThreadPoolExecutor(len(kinds)) as pool:
            found = list(pool.map(lambda kind: kind(guest, seconds), kinds))
        elapsed = time.perf_counter() - start
        latencies = [latency for some in found for latency in some]
        return Work(len(latencies) / elapsed, latencies)

    return drive


def _sessions(count: int) -> Drive:
    """So many clients of a database."""
    return _requests(*[partial(loads.transactions, number=n) for n in range(1, count + 1)])


def _writes(order: str, block_kib: int) -> Drive:
    def drive(guest: LabGuest, seconds: float) -> Work:
        writer = loads.DiskWriter(guest, order, block_kib, guest.spec.disk_names)
        return Work(writer.write(seconds))

    return drive


def _beside(drive: Drive, other: Drive) -> Drive:
    """The first counts; the other is done as long."""

    def both(guest: LabGuest, seconds: float) -> Work:
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(other, guest, seconds)
            work = drive(guest, seconds)
            beside.result()  # what was measured without it is no measurement
        return work

    return both


SCENARIOS = (
    Scenario("idle", "nothing but its own timers", "", _idle),
    Scenario(
        "uniform",
        "writes a word to 600 pages of 32 MiB every 20 ms, each as often as any other",
        "rounds/s",
        _memory,
        ("dirty 600 20",),
    ),
    Scenario(
        "heavy",
        "writes a word to 5,000 pages of 32 MiB every 20 ms",
        "rounds/s",
        _memory,
        ("dirty 5000 20",),
    ),
    Scenario(
        "skewed",
        "as uniform, but eight of ten writes go to a sixteenth of the pages",
        "rounds/s",
        _memory,
        ("skew 1", "dirty 600 20"),
    ),
    Scenario(
        "web",
        f"{CLIENTS} clients ask and are answered 64 bytes; a word of 100 pages is written every "
        "20 ms",
        "requests/s",
        _requests(*[loads.echo] * CLIENTS),
        ("dirty 100 20",),
    ),
    Scenario(
        "database",
        f"{SESSIONS} clients' requests, each durable on both disks before it is answered",
        "requests/s",
        _sessions(SESSIONS),
    ),
    Scenario(
        "sessions",
        f"as database, with {MANY_SESSIONS} clients",
        "requests/s",
        _sessions(MANY_SESSIONS),
    ),
    Scenario(
        "disk",
        "writes 1 MiB after the other to both disks, of what cannot be compressed",
        "MB/s",
        _writes("seq", 1024),
    ),
    Scenario(
        "build",
        "writes 4 KiB here and there to both disks, and 400 whole pages every 20 ms, of noise",
        "MB/s",
        _writes("rand", 4),
        ("full 1", "dirty 400 20"),
    ),
    Scenario(
        "mixed",
        "a web client and a database client, 1 MiB of log lines written after the other, and a "
        "word of 200 pages every 20 ms",
        "requests/s",
        _beside(_requests(loads.echo, loads.transactions), _writes("text", 1024)),
        ("dirty 200 20",),
    ),
)


def named(names: Sequence[str]) -> list[Scenario]:
    """Scenarios by name, in the order of :data:`SCENARIOS`.

    :raises ValueError: there is none of that name.
    """
    known = {scenario.name for scenario in SCENARIOS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no scenario {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return [scenario for scenario in SCENARIOS if scenario.name in names]
