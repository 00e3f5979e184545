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

"""One combination of scenario, strategy and link, measured: a row.

The worker counts since it began; what is told here is the difference over the measurement. Only
quantiles are over its last 2,048 rounds, so that the load goes on for a while before it counts.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_pmt.bench.cpu import Usage
from nova_pmt.bench.protection import Protection, protect
from nova_pmt.bench.rows import quantiles
from nova_pmt.checkpoint.interfaces import PAGE_SIZE
from nova_pmt.evaluation.study.scenarios import Scenario, Work
from nova_pmt.lab import LabGuest, LabHost

#: The strategy of what is measured without protection.
UNPROTECTED = "unprotected"
#: PMT that sends all pages as they are: what codecs and deltas are compared with.
PLAIN = "pmt-plain"
_PLAIN_ENV = {"OS_REPLICATION__CODECS": "", "OS_REPLICATION__DELTA_CACHE_MIB": "0"}
#: After the first synchronisation, before it counts.
SETTLE_S = 1.0
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """A combination.

    :param link_mbit: of the link between the hosts; 0: no limit.
    :param repeat: 1, 2, ...
    :param failover: it is the failover that is measured.
    """

    scenario: Scenario
    strategy: str
    link_mbit: int
    repeat: int
    failover: bool = False

    def protect(
        self, guest: LabGuest, standby: LabHost, interval_ms: float, epoch_limit_ms: float
    ) -> contextlib.AbstractContextManager[Protection]:
        """Protect the guest as this place has it."""
        plain = self.strategy == PLAIN
        return protect(
            guest,
            standby,
            interval_ms=interval_ms,
            strategy="pmt" if plain else self.strategy,
            more={"epoch_limit_ms": epoch_limit_ms},
            primary_env=_PLAIN_ENV if plain else None,
        )

    def facts(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario.name,
            "strategy": self.strategy,
            "link_mbit": self.link_mbit,
            "repeat": self.repeat,
        }


class _Cache:
    """Looks at the cache as often as the worker tells of it."""

    def __init__(self, protection: Protection) -> None:
        self.used_mib: list[float] = []
        self._protection = protection
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="cache", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.is_set():
            try:
                cache = self._protection.stats()["cache"]
            except Exception:  # noqa: BLE001 - protection has ended: whoever measures is told
                return
            self.used_mib.append(cache["used_mib"])

    def close(self) -> list[float]:
        self._end.set()
        self._thread.join(15.0)
        return self.used_mib


def measure(
    place: Place,
    guest: LabGuest,
    standby: LabHost,
    *,
    seconds: float,
    interval_ms: float,
    epoch_limit_ms: float,
) -> dict[str, Any]:
    """The row; the guest runs, its background too, and hosts are configured (lab.deployment).

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    if place.strategy == UNPROTECTED:
        work = place.scenario.drive(guest, seconds)
        return {**place.facts(), **_work(work)}
    with place.protect(guest, standby, interval_ms, epoch_limit_ms) as protection:
        place.scenario.drive(guest, SETTLE_S)
        workers = {
            "primary": protection.primary_pid,
            "standby": protection.standby_pid,
        }
        before, start = protection.stats(), time.monotonic()
        usage, cache = Usage(workers), _Cache(protection)
        work = place.scenario.drive(guest, seconds)
        cores, driven_s = usage.cores(), time.monotonic() - start
        used = cache.close()
        after, elapsed = protection.stats(), time.monotonic() - start
        standby_mib = _own_bytes(protection.standby_pid) / MIB
    row = {**place.facts(), **_work(work), **_rounds(before, after, elapsed)}
    if work.per_s:
        row["kib_per_work"] = round(row["mbit_per_s"] * 1e6 / 8 / 1024 / work.per_s, 3)
    used_s = (cores.get("primary", 0.0) + cores.get("standby", 0.0)) * driven_s
    sent_gib = (after["sent_bytes"] - before["sent_bytes"]) / GIB
    return {
        **row,
        "cpu_s_per_gib": round(used_s / sent_gib, 3) if sent_gib > 1e-3 else None,
        "cores": round(cores.get("primary", 0.0) + cores.get("standby", 0.0), 3),
        "cache_peak_mib": max(used, default=0.0),
        "cache_mib": used,
        "standby_mib": round(standby_mib, 1),
    }


def _work(work: Work) -> dict[str, Any]:
    row: dict[str, Any] = {"per_s": round(work.per_s, 3)}
    if work.latencies_ms:
        times = quantiles(work.latencies_ms)
        row |= {f"latency_{name}_ms": times[name] for name in ("p50", "p99")}
    return row


def _rounds(
    before: Mapping[str, Any], after: Mapping[str, Any], elapsed_s: float
) -> dict[str, Any]:
    rounds = after["rounds"] - before["rounds"]
    paused_s = _sum(after, "pause_seconds") - _sum(before, "pause_seconds")
    pages = after["pages"]["total"] - before["pages"]["total"]
    logged = after["log_bytes_total"] - before["log_bytes_total"]
    sent = after["sent_bytes"] - before["sent_bytes"]
    dirty = pages * PAGE_SIZE + logged
    delays, pauses = after["output_delay_ms"], after["pause_ms"]
    return {
        "rounds_per_s": round(rounds / elapsed_s, 3),
        "pause_mean_ms": round(paused_s * 1e3 / rounds, 3) if rounds else None,
        "pause_p50_ms": pauses["p50"],
        "pause_p99_ms": pauses["p99"],
        "pause_max_ms": pauses["max"],
        "paused_share": round(paused_s / elapsed_s, 4),
        "output_delay_p50_ms": delays["p50"] or None,
        "output_delay_p99_ms": delays["p99"] or None,
        "commit_p50_ms": after["commit_ms"]["p50"],
        "pages_per_round": round(pages / rounds, 1) if rounds else None,
        "mbit_per_s": round(sent * 8 / 1e6 / elapsed_s, 3),
        "sent_per_dirty_byte": round(sent / dirty, 4) if dirty else None,
        "throttled_rounds": after["throttled_rounds"] - before["throttled_rounds"],
        "dropped_packets": _dropped(after) - _dropped(before),
        "rounds": rounds,
    }


def _sum(stats: Mapping[str, Any], histogram: str) -> float:
    return float(stats["histograms"][histogram]["sum"])


def _dropped(stats: Mapping[str, Any]) -> int:
    return sum(nic["dropped_packets"] for nic in stats["network"])


def _own_bytes(pid: int) -> int:
    """Memory of a process's own: not the guest's, which a standby's worker maps."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
