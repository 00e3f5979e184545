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

"""``nova-pmt-bench pause``: the pause against its floor, for guests of several sizes and loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nova_pmt.bench.child import Child
from nova_pmt.bench.report import Report
from nova_pmt.bench.rows import calibrated, pause_row
from nova_pmt.exception import LabError
from nova_pmt.lab import GuestSpec, Lab, LabGuest, LabHost, Workload

PAGES_PER_MIB = 256
CALIBRATION_ROUNDS = 12
#: A checkpoint within this of what was asked for is good enough.
TOLERANCE = 0.1
#: Left to the guest's kernel and program when its memory is filled.
RESERVE_MIB = 40
#: Filled at a time, as long as there is so much; ``fill`` runs at the speed of an emulated CPU.
FILL_MIB = (256, 32)
_FULL = "are free"  # what the workload says then
FILL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class PauseOptions:
    """What is asked for on the command line."""

    memory_mib: tuple[int, ...]
    dirty_pages: tuple[int, ...]
    rounds: int = 150
    machine: Literal["q35", "pc"] = "q35"
    vcpus: int = 1
    passes: int = 2
    threads: int = 0
    interval_ms: int = 50
    burst_ms: int = 25


def buffer_mib(memory_mib: int, pages: int) -> int | None:
    """Memory over which the dirtier spreads its pages, in MiB; None where they do not fit.

    Four times what a checkpoint has, as far as the guest can give it, so that no page is
    written twice in one interval.
    """
    room = (memory_mib - RESERVE_MIB) // 2
    if pages > room * PAGES_PER_MIB * 0.8:
        return None
    return max(1, min(room, -(-pages * 4 // PAGES_PER_MIB)))


@contextlib.contextmanager
def booted(host: LabHost, options: PauseOptions, memory_mib: int) -> Iterator[LabGuest]:
    """A guest of that size, all of whose memory was really touched."""
    spread = max(
        (size for pages in options.dirty_pages if (size := buffer_mib(memory_mib, pages))),
        default=1,
    )
    guest = host.boot(
        GuestSpec(
            f"bench-{memory_mib}",
            memory_mib=memory_mib,
            vcpus=options.vcpus,
            machine=options.machine,
            workload=Workload(console_every=0, buffer_mib=spread),
        )
    ).wait_ready(120)
    try:
        yield guest
    finally:
        guest.destroy()


def fill(guest: LabGuest, report: Report) -> None:
    """Have the guest write to all memory that its kernel would give it: page tables exist then."""
    total, done = guest.spec.memory_mib, 0
    for part in FILL_MIB:
        while True:
            try:
                guest.control(f"fill {part}", FILL_TIMEOUT_S)
            except LabError as error:
                if _FULL in error.message:
                    break
                raise
            done += part
            report.progress(f"filling {total} MiB", done, total)


class PauseBenchmark:
    """Runs all cells and keeps their rows.

    :param report: where progress and the table go.
    """

    def __init__(self, options: PauseOptions, report: Report) -> None:
        self._options = options
        self._report = report
        self.rows: list[dict[str, Any]] = []
        self.qemu = "unknown"

    def run(self) -> None:
        """Boot, load and measure; :attr:`rows` grows with each cell.

        :raises nova_pmt.exception.PmtError: the lab, the guest or the measuring failed.
        """
        with Lab(computes=1, rabbit=False) as lab:
            for memory_mib in self._options.memory_mib:
                self._report.note(f"booting a guest of {memory_mib} MiB")
                with booted(lab.computes[0], self._options, memory_mib) as guest:
                    fill(guest, self._report)
                    first = {"domain": guest.uuid, "threads": self._options.threads}
                    with Child(guest.host, "nova_pmt.bench.measure", first) as child:
                        self.qemu = child.started["qemu"]
                        for pages in self._options.dirty_pages:
                            self._cell(guest, child, pages)

    def _cell(self, guest: LabGuest, child: Child, pages: int) -> None:
        options, memory_mib = self._options, guest.spec.memory_mib
        if buffer_mib(memory_mib, pages) is None:
            self._report.note(
                f"{memory_mib} MiB, {pages} pages: left out, so many do not fit into that guest"
            )
            return
        self._load(guest, child, pages)
        label = f"{memory_mib} MiB, {pages} pages"
        result = child.ask(
            {"do": "measure", "rounds": options.rounds, **self._common()},
            lambda done, total: self._report.progress(label, done, total),
        )
        guest.control("dirty 0 0")
        row = pause_row(
            result,
            memory_mib=memory_mib,
            asked_pages=pages,
            machine=options.machine,
            vcpus=options.vcpus,
            passes=options.passes,
            threads=child.started["threads"],
        )
        self.rows.append({**row, "interval_ms": options.interval_ms, "burst_ms": options.burst_ms})

    def _common(self) -> dict[str, Any]:
        return {"passes": self._options.passes, "interval_ms": self._options.interval_ms}

    def _load(self, guest: LabGuest, child: Child, pages: int) -> None:
        """Set the dirtier so that a checkpoint has about ``pages`` pages."""
        options, per_interval = self._options, pages
        for _ in range(4):
            burst = max(1, round(per_interval * options.burst_ms / options.interval_ms))
            guest.control(f"dirty {burst} {options.burst_ms}")
            found = child.ask({"do": "calibrate", "rounds": CALIBRATION_ROUNDS, **self._common()})
            if abs(found["pages"] - pages) <= TOLERANCE * pages:
                return
            per_interval = calibrated(pages, per_interval, found["pages"])
