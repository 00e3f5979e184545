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

"""Rows to figures: the mean of repeats, and between what it lies.

Ratios are taken within one repeat, since what is compared was measured one right after the other,
and then averaged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nova_pmt.evaluation.study.cell import UNPROTECTED
from nova_pmt.evaluation.study.peers import NAMES

Row = Mapping[str, Any]
Key = tuple[str, str, int]

#: Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1 on.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
_T95_MANY = 1.96
#: Of strategies on pages and in pictures.
_ORDER = "pmt pmt-plain kemari auto"
#: Columns that are no figures.
_PLACE = ("scenario", "strategy", "link_mbit", "repeat", "cache_mib")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % confidence interval; all the same for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    freedom = len(values) - 1
    factor = _T95[freedom - 1] if freedom <= len(_T95) else _T95_MANY
    half = factor * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def with_ratios(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows, each protected one with what it is of the unprotected one of its repeat:
    ``throughput_ratio`` and ``latency_ratio``."""
    rows = list(rows)
    plain = {
        (row["scenario"], row["link_mbit"], row["repeat"]): row
        for row in rows
        if row["strategy"] == UNPROTECTED
    }
    found = []
    for row in rows:
        more: dict[str, Any] = {}
        base = plain.get((row["scenario"], row["link_mbit"], row["repeat"]))
        if base is not None and row["strategy"] != UNPROTECTED:
            if base["per_s"] and row.get("per_s"):
                more["throughput_ratio"] = row["per_s"] / base["per_s"]
            if base.get("latency_p50_ms") and row.get("latency_p50_ms"):
                more["latency_ratio"] = row["latency_p50_ms"] / base["latency_p50_ms"]
        found.append({**row, **more})
    return found


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry for each place and figure: ``scenario``, ``strategy``, ``link_mbit``, ``figure``,
    ``mean``, ``low``, ``high`` and ``n``."""
    places: dict[Key, dict[str, list[float]]] = {}
    for row in with_ratios(rows):
        key = (row["scenario"], row["strategy"], int(row["link_mbit"]))
        columns = places.setdefault(key, {})
        for name, value in row.items():
            if name not in _PLACE and value is not None:
                columns.setdefault(name, []).append(float(value))
    found = []
    for (scenario, strategy, link), columns in places.items():
        for name, values in columns.items():
            mean, low, high = interval(values)
            found.append(
                {
                    "scenario": scenario,
                    "strategy": strategy,
                    "link_mbit": link,
                    "figure": name,
                    "mean": round(mean, 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                    "n": len(values),
                }
            )
    return found


class Table:
    """Looks figures up.

    :param entries: of :func:`summarise`.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self._entries = {
            (one["scenario"], one["strategy"], one["link_mbit"], one["figure"]): one
            for one in entries
        }
        self.scenarios = list(dict.fromkeys(key[0] for key in self._entries))
        names = dict.fromkeys(key[1] for key in self._entries)
        found = [name for name in names if name not in (UNPROTECTED, *NAMES)]
        # Not in the order in which they were drawn.
        self.strategies = sorted(found, key=lambda name: (_ORDER.find(name), name))
        self.peers = [name for name in NAMES if name in names]
        self.links = list(dict.fromkeys(key[2] for key in self._entries))

    def mean(self, scenario: str, strategy: str, link: int, figure: str) -> float | None:
        """The mean; None where it was not measured, or there was nothing to measure."""
        entry = self._entries.get((scenario, strategy, link, figure))
        return None if entry is None else float(entry["mean"])

    def entry(self, scenario: str, strategy: str, link: int, figure: str) -> Mapping[str, Any]:
        """Mean, low, high, n; empty where there is none."""
        return self._entries.get((scenario, strategy, link, figure), {})
