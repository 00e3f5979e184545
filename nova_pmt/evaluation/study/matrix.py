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

"""All combinations, one after the other, and the files that they leave.

``rows.csv`` has the raw rows, a line each as soon as it is measured; ``cache.csv`` the size of the
cache over time; ``summary.json`` means with intervals of each figure.
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from nova_pmt import exception
from nova_pmt.bench.output import fill
from nova_pmt.bench.report import Report
from nova_pmt.evaluation.study import failover, figures, peers
from nova_pmt.evaluation.study.cell import PLAIN, UNPROTECTED, Place, measure
from nova_pmt.evaluation.study.findings import GIGABIT
from nova_pmt.evaluation.study.peers import PEERS
from nova_pmt.evaluation.study.scenarios import SCENARIOS, Scenario, named
from nova_pmt.lab import Disk, GuestSpec, Lab, LabGuest, Workload, deployment

STRATEGIES = ("pmt", "kemari", "auto")
LINKS_MBIT = (100, GIGABIT, 0)
_QCOW2, _RAW = _IMAGES = ("/var/lib/libvirt/images/eval.qcow2", "/var/lib/libvirt/images/eval.raw")
DISK_MIB = 256
#: Columns of rows.csv; others of a row are lists.
COLUMNS = (
    "scenario", "strategy", "link_mbit", "repeat", "per_s", "latency_p50_ms", "latency_p99_ms",
    "rounds_per_s", "pause_mean_ms", "pause_p50_ms", "pause_p99_ms", "pause_max_ms",
    "paused_share", "output_delay_p50_ms", "output_delay_p99_ms", "commit_p50_ms",
    "rounds", "pages_per_round", "mbit_per_s", "kib_per_work", "sent_per_dirty_byte",
    "throttled_rounds", "dropped_packets", "cpu_s_per_gib", "cores", "cache_peak_mib",
    "standby_mib", "failover_ms", "activation_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is measured.

    :param seconds: of each measurement.
    :param repeats: of each combination; each on a guest that was booted anew.
    :param links_mbit: limits of the link between the hosts; 0: none.
    :param epoch_limit_ms: short enough that a measurement has some such epochs.
    :param seed: of the order of strategies.
    :param peers: measure what others stop the same guest for; on the first link, since they use
        none.
    :param failovers: let the guest's QEMU die as well, under each strategy; on the first link.
    :param plain: measure PMT without codecs and deltas as well; at 1 Gbit/s.
    """

    scenarios: Sequence[str] = tuple(scenario.name for scenario in SCENARIOS)
    strategies: Sequence[str] = STRATEGIES
    links_mbit: Sequence[int] = LINKS_MBIT
    seconds: float = 8.0
    repeats: int = 3
    interval_ms: float = 20.0
    epoch_limit_ms: float = 1000.0
    seed: int = 1
    memory_mib: int = 256
    peers: bool = True
    failovers: bool = True
    plain: bool = True

    def places(self) -> list[Place]:
        """All combinations in the order in which they are measured: what is compared with each
        other one right after the other, so that the machine drifts little between, and in an order
        drawn each time, so that no strategy is always the first."""
        draw, found = random.Random(self.seed), []
        for repeat in range(1, self.repeats + 1):
            for link in self.links_mbit:
                for scenario in named(self.scenarios):
                    strategies = [UNPROTECTED, *self.strategies]
                    if self.plain and link == GIGABIT:
                        strategies.append(PLAIN)
                    draw.shuffle(strategies)
                    if self.peers and link == self.links_mbit[0]:
                        strategies.append(PEERS)  # when it is known what checkpoints have
                    found += [Place(scenario, name, link, repeat) for name in strategies]
                    if self.failovers and link == self.links_mbit[0]:
                        found += [
                            Place(scenario, name, link, repeat, failover=True)
                            for name in self.strategies
                        ]
        return found


#: In under five minutes: what tells the strategies apart.
QUICK = Options(
    scenarios=("idle", "web", "database"),
    links_mbit=(1000,),
    seconds=3.0,
    repeats=1,
)


class Study:
    """Measures and writes.

    :param directory: for the files; made if it is not there.
    """

    def __init__(self, options: Options, directory: Path, report: Report) -> None:
        self._options = options
        self._directory = directory
        self._report = report
        self.rows: list[dict[str, Any]] = []
        #: Combinations that could not be measured, and why.
        self.failures: list[dict[str, Any]] = []
        self._measured = 0
        self._guest: LabGuest | None = None
        #: It has failed over.
        self._moved = False
        self._group: tuple[int, int] | None = None
        self._scenario: Scenario | None = None

    def run(self) -> None:
        """Measure all.

        :raises nova_pmt.exception.PmtError: the lab failed.
        """
        options = self._options
        places = options.places()
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "summary.json").unlink(missing_ok=True)  # of what was measured before
        with contextlib.ExitStack() as stack:
            lab = stack.enter_context(Lab(computes=2, rabbit=False))
            write = stack.enter_context(self._files())
            deployment.configure(lab)
            stack.callback(self._end)
            for number, place in enumerate(places):
                self._report.progress("measurements", number, len(places))
                try:
                    guest = self._ready(lab, place)
                    rows = self._measure(place, guest, lab)
                except (exception.PmtError, OSError, libvirt.libvirtError) as error:
                    why = getattr(error, "message", "") or str(error)
                    self._fail({**place.facts(), "why": why})
                    continue
                self._measured += 1
                self.rows += rows
                for row in rows:
                    write(row)
            self._report.progress("measurements", len(places), len(places))

    def _measure(self, place: Place, guest: LabGuest, lab: Lab) -> list[dict[str, Any]]:
        options = self._options
        if place.strategy == PEERS:
            rows, failures = peers.measure(place, guest, options.seconds, self._pages(place))
            for failure in failures:
                self._fail(failure)
            return rows
        (standby,) = (host for host in lab.computes if host is not guest.host)
        rounds = {"interval_ms": options.interval_ms, "epoch_limit_ms": options.epoch_limit_ms}
        if place.failover:
            row, self._guest = failover.measure(place, guest, standby, **rounds)
            self._moved = True
            return [row]
        return [measure(place, guest, standby, seconds=options.seconds, **rounds)]

    def _pages(self, place: Place) -> int | None:
        """Pages of a checkpoint of ``pmt`` in the same repeat."""
        wanted = {**place.facts(), "strategy": "pmt"}
        for row in self.rows:
            if all(row[name] == value for name, value in wanted.items()):
                return round(row.get("pages_per_round") or 0)
        return None

    def _fail(self, failure: dict[str, Any]) -> None:
        self._report.note(f"not measured: {failure}")
        self.failures.append(failure)
        self._end()  # it may be in any state

    def _ready(self, lab: Lab, place: Place) -> LabGuest:
        """A guest that does what its scenario says, over its link."""
        group = (place.repeat, place.link_mbit)
        if self._moved and not place.failover:
            self._end()  # what is compared is measured on guests that were booted where they run
        if self._guest is None or self._group != group:
            self._end()
            self._guest, self._group = self._boot(lab), group
            link = lab.computes[0].link("repl")
            link.limit(place.link_mbit) if place.link_mbit else link.unlimit()
        if self._scenario is not place.scenario:
            if self._scenario is not None:
                self._scenario.end(self._guest)
            self._scenario = place.scenario
            self._scenario.begin(self._guest)
        return self._guest

    def _end(self) -> None:
        """The next place gets another guest."""
        guest, self._guest, self._scenario = self._guest, None, None
        self._moved = False
        if guest is None:
            return
        for host in guest.host.lab.computes:  # a failover leaves a domain that is off
            try:
                guest.on(host).destroy()
                for (
                    path
                ) in _IMAGES:  # after a failover they are its own on both: not the next one's
                    host.disk_path(path).unlink(missing_ok=True)
            except (exception.PmtError, OSError, libvirt.libvirtError) as error:
                self._report.note(f"{guest!r} on {host.name} cannot be taken away: {error}")

    def _boot(self, lab: Lab) -> LabGuest:
        disks = (
            Disk(_QCOW2, DISK_MIB),
            Disk(_RAW, DISK_MIB, format="raw"),
        )
        spec = GuestSpec(
            "eval",
            memory_mib=self._options.memory_mib,
            disks=disks,
            workload=Workload(console_every=0),
        )
        guest = lab.computes[0].boot(spec).wait_ready(120)
        fill(guest)
        return guest

    def _files(self) -> Any:
        return _Files(self._directory)

    def write(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Write ``summary.json``; returns what is in it.

        :param machine: facts about it, see :func:`nova_pmt.bench.environment.header`.
        """
        summary = {
            "machine": machine,
            "options": {
                "scenarios": list(self._options.scenarios),
                "strategies": list(self._options.strategies),
                "links_mbit": list(self._options.links_mbit),
                "seconds": self._options.seconds,
                "repeats": self._options.repeats,
                "interval_ms": self._options.interval_ms,
                "epoch_limit_ms": self._options.epoch_limit_ms,
                "seed": self._options.seed,
                "memory_mib": self._options.memory_mib,
                "peers": self._options.peers,
                "failovers": self._options.failovers,
                "plain": self._options.plain,
            },
            "complete": self._measured == len(self._options.places()) and not self.failures,
            "failures": self.failures,
            "figures": figures.summarise(self.rows),
        }
        part = self._directory / "summary.json.part"
        part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        part.replace(self._directory / "summary.json")
        return summary


class _Files:
    """``rows.csv`` and ``cache.csv``, written line by line."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Any:
        self._rows = (self._directory / "rows.csv").open("w", newline="", encoding="utf-8")
        self._cache = (self._directory / "cache.csv").open("w", newline="", encoding="utf-8")
        rows = csv.DictWriter(self._rows, COLUMNS, extrasaction="ignore")
        rows.writeheader()
        cache = csv.writer(self._cache)
        cache.writerow(("scenario", "strategy", "link_mbit", "repeat", "half_seconds", "mib"))

        def write(row: dict[str, Any]) -> None:
            rows.writerow(row)
            place = [row[name] for name in ("scenario", "strategy", "link_mbit", "repeat")]
            for at, mib in enumerate(row.get("cache_mib", ())):
                cache.writerow((*place, at, mib))
            self._rows.flush()
            self._cache.flush()

        return write

    def __exit__(self, *exc: object) -> None:
        self._rows.close()
        self._cache.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``rows.csv``: numbers are numbers, what is empty is None.

    :raises OSError: it cannot be read.
    :raises ValueError: it is no such file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    if found and not {"scenario", "strategy", "link_mbit", "repeat"} <= found[0].keys():
        raise ValueError(f"{path} has no rows of an evaluation")
    return [
        {
            name: value if name in ("scenario", "strategy") else float(value) if value else None
            for name, value in row.items()
        }
        for row in found
    ]
