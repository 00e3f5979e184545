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

"""``nova-pmt-bench link``: the pause with the link between the hosts limited, against the full.

If the pause contained the transfer it would grow with the time that a checkpoint needs on the
link. Whole pairs, with agents, TLS and a standby; protected anew for each phase, so that each has
statistics of its own, and the phases alternate.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from nova_pmt.bench.report import Report
from nova_pmt.exception import LabError
from nova_pmt.lab import GuestSpec, Lab, LabGuest, Workload, deployment

#: A working set of 2,048 pages: on a slow link epochs get longer, checkpoints do not grow for ever.
WORKLOAD = Workload(console_every=0, dirty_pages=600, dirty_ms=20, buffer_mib=8)
CACHE_LIMIT_MIB = 16
PHASE_TIMEOUT_S = 240.0


def _primary(lab: Lab, guest: LabGuest) -> dict[str, Any]:
    """Statistics of the primary worker."""
    pairs = json.loads(deployment.operate(lab, "status", "-f", "json").stdout)["pairs"]
    for pair in pairs:
        if pair["uuid"] == guest.uuid and pair["role"] == "primary":
            return dict(pair["stats"] or {})
    raise LabError(f"{guest.name} is not protected any more")


def _phase(lab: Lab, guest: LabGuest, mbit: int, rounds: int, report: Report) -> dict[str, Any]:
    """Protect, collect so many rounds, unprotect. ``mbit`` 0: the full link."""
    one, two = lab.computes
    link = one.link("repl")
    if mbit:
        link.limit(mbit)
    try:
        options = ("--cache-limit-mib", str(CACHE_LIMIT_MIB), "--interval-ms", "50")
        deployment.operate(lab, "protect", guest.name, "--standby", two.name, *options)
        deadline = time.monotonic() + PHASE_TIMEOUT_S
        while (stats := _primary(lab, guest)).get("rounds", 0) < rounds:
            if time.monotonic() > deadline:
                raise LabError(f"no {rounds} rounds within {PHASE_TIMEOUT_S:.0f} s: {stats}")
            report.progress(f"{mbit or 'full'} link", stats.get("rounds", 0), rounds)
            time.sleep(1.0)
        deployment.operate(lab, "unprotect", guest.name)
    finally:
        if mbit:
            link.unlimit()
    return {
        "mbit": mbit,
        "rounds": stats["rounds"],
        "pause_ms": stats["pause_ms"],
        "commit_ms": stats["commit_ms"],
        "dirty_pages": stats["pages"]["p50"],
        "pages_in_pause": stats["pages"]["in_pause_p50"],
        "throttled_rounds": stats["throttled_rounds"],
        "cache_peak_mib": stats["cache"]["peak_mib"],
        "cache_limit_mib": stats["cache"]["limit_mib"],
    }


def run(*, mbit: int, rounds: int, repeats: int, report: Report) -> list[dict[str, Any]]:
    """Measure. Returns a row for each phase, and last one with the ratio.

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    with Lab(computes=2) as lab:
        report.note("two hosts with agents, a guest of 128 MiB")
        deployment.deploy(lab)
        guest = lab.computes[0].boot(GuestSpec("bench-link", workload=WORKLOAD))
        guest.wait_ready(120)
        rows = [
            _phase(lab, guest, limit, rounds, report) for _ in range(repeats) for limit in (0, mbit)
        ]
    return [*rows, summary(rows, mbit)]


def summary(rows: list[dict[str, Any]], mbit: int) -> dict[str, Any]:
    """The row with the ratio: medians over the phases, limited against full."""

    def median(limit: int, key: str) -> float:
        return statistics.median(row["pause_ms"][key] for row in rows if row["mbit"] == limit)

    return {
        "mbit": mbit,
        "ratio": round(median(mbit, "p50") / median(0, "p50"), 3),
        "ratio_p99": round(median(mbit, "p99") / median(0, "p99"), 3),
    }
