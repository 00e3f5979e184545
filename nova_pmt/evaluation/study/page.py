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

"""The page of an evaluation, from its ``summary.json``; nothing in it is typed by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nova_pmt.evaluation.study.figures import Table
from nova_pmt.evaluation.study.findings import findings, link_name
from nova_pmt.evaluation.study.plots import PLOTS
from nova_pmt.evaluation.study.scenarios import SCENARIOS

_HEAD = """\
# Evaluation: PMT, Kemari and auto

This page is made by `nova-pmt-eval page` from the files that `nova-pmt-eval run` wrote. Guests are
emulated (TCG), and both hosts are on one machine: what is compared with each other was measured in
one run, one right after the other; absolute times mean nothing. Intervals are 95 %, over repeats.
"""
#: Column, its head.
_COLUMNS = (
    ("throughput_ratio", "throughput, of unprotected"),
    ("latency_ratio", "latency p50, to unprotected"),
    ("pause_p50_ms", "pause p50 ms"),
    ("pause_p99_ms", "p99"),
    ("paused_share", "share paused"),
    ("output_delay_p50_ms", "output delay p50 ms"),
    ("rounds_per_s", "rounds/s"),
    ("pages_per_round", "pages a round"),
    ("rounds", "rounds"),
    ("commit_p50_ms", "commit p50 ms"),
    ("throttled_rounds", "throttled"),
    ("dropped_packets", "dropped"),
    ("mbit_per_s", "sent Mbit/s"),
    ("kib_per_work", "sent KiB a unit"),
    ("sent_per_dirty_byte", "sent per dirty byte"),
    ("cpu_s_per_gib", "CPU s/GiB"),
    ("cache_peak_mib", "cache MiB"),
    ("standby_mib", "standby worker MiB"),
    ("failover_ms", "failover: no answer for ms"),
    ("activation_ms", "of that the standby takes ms"),
)


def page(summary: Mapping[str, Any]) -> str:
    """The page, in Markdown.

    :raises KeyError: it is no summary of an evaluation.
    """
    table = Table(summary["figures"])
    if not summary["complete"]:
        head = _HEAD + "\n**Not all was measured.**\n"
    else:
        head = _HEAD
    parts = [head, _facts(summary), "## What it shows\n\n" + _findings(table)]
    if summary["failures"]:
        parts.append("## What could not be measured\n\n" + _failures(summary["failures"]))
    parts.append("## Pictures\n\n" + _pictures())
    for link in table.links:
        parts.append(f"## Link: {link_name(link)}\n\n" + _figures(table, link))
    if table.peers:
        parts.append("## Peers, and the limit\n\n" + _peers(table))
    parts.append("## Scenarios\n\n" + _scenarios(table.scenarios))
    return "\n".join(parts)


def _facts(summary: Mapping[str, Any]) -> str:
    machine, options = summary["machine"], summary["options"]
    load = ", ".join(str(value) for value in machine["load_average"])
    return (
        f"Each measurement {options['seconds']:g} s, {options['repeats']} repeats, on a guest of "
        f"{options['memory_mib']} MiB, booted anew for each repeat and link; `interval_ms` "
        f"{options['interval_ms']:g}, `epoch_limit_ms` {options['epoch_limit_ms']:g}; strategies "
        f"in an order drawn with seed {options['seed']}.\n"
        f"Command: `{shlex.join(machine['command'])}`, {machine['date'][:10]}; "
        f"{machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']}, "
        f"QEMU {machine['qemu']}, Python {machine['python']}, load average {load}.\n"
    )


def _findings(table: Table) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [(one.statement, one.values, words[one.holds]) for one in findings(table)]
    return _table(("finding", "measured", "holds"), rows)


def _failures(failures: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (one["scenario"], one["strategy"], link_name(int(one["link_mbit"])), one["why"])
        for one in failures
    ]
    return _table(("scenario", "strategy", "link", "why"), rows)


def _pictures() -> str:
    return "\n".join(f"![{label}](evaluation-{figure}.svg)\n" for figure, label, _ in PLOTS)


def _figures(table: Table, link: int) -> str:
    rows = []
    for scenario in table.scenarios:
        for strategy in table.strategies:
            cells = [_cell(table.entry(scenario, strategy, link, name)) for name, _ in _COLUMNS]
            if any(cells):
                rows.append((scenario, strategy, *cells))
    return _table(("scenario", "strategy", *(head for _, head in _COLUMNS)), rows)


_PEERS = """\
What others stop the same guest for, once, under the same load in the same run (ms, and how many
times PMT's pause that is). `memcpy` is the limit: the pages of one of PMT's checkpoints, copied in
memory. `live-migration`: QEMU's switchover, without network and destination. `snapshot`: the stop
part of libvirt's live snapshot of memory, to tmpfs. `stop-and-copy`: all memory, thrown away at the
other end of a socket.
"""


def _peers(table: Table) -> str:
    link, rows = table.links[0], []
    for scenario in table.scenarios:
        own = table.mean(scenario, "pmt", link, "pause_p50_ms")
        cells = [_cell(table.entry(scenario, "pmt", link, "pause_p50_ms"))]
        for name in table.peers:
            entry = table.entry(scenario, name, link, "pause_p50_ms")
            ratio = f" ({entry['mean'] / own:.3g} x)" if entry and own else ""
            cells.append(_cell(entry) + ratio)
        rows.append((scenario, *cells))
    return _PEERS + "\n" + _table(("scenario", "pmt", *table.peers), rows)


def _cell(entry: Mapping[str, Any]) -> str:
    if not entry:
        return ""
    half = (entry["high"] - entry["low"]) / 2
    return f"{entry['mean']:.3g}" + (f" ± {half:.2g}" if entry["n"] > 1 else "")


def _scenarios(names: Sequence[str]) -> str:
    rows = [(one.name, one.text, one.unit) for one in SCENARIOS if one.name in names]
    return _table(("scenario", "the guest", "throughput in"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    :raises OSError: it cannot be written.
    """
    path.write_text(page(summary), encoding="utf-8")


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """A few lines for the terminal: what holds and what does not."""
    table = Table(summary["figures"])
    marks = {True: "holds ", False: "FAILS ", None: "-     "}
    return [f"{marks[one.holds]} {one.statement}: {one.values}" for one in findings(table)]
