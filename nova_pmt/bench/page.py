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

"""The results pages: made from the JSON files of benchmarks, never typed by hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nova_pmt.bench import slopes
from nova_pmt.bench.gaps import CAUSES

_INTRODUCTION = """\
==================
Pause: the figures
==================

This page is made by ``nova-pmt-bench page`` from the files that the benchmarks wrote. Only ratios
mean something: they compare what was measured in one run, interleaved, on one guest under TCG.

floor
    stop, save the devices, go on: nothing is scanned or copied
pause
    the pause of a round as the product does it, after its pre-copy passes
plain
    the same without passes: everything dirty is copied in the pause
"""
_PAUSE_PICTURE = "the pause over its floor, by dirty pages, for guests of several sizes"
_OUTPUT_INTRODUCTION = """\
==========================
Output commit: the figures
==========================

This page is made by ``nova-pmt-bench page`` from the files that the benchmarks wrote: guests under
TCG, and both hosts on one machine. Only ratios of one run mean something. What campaigns of kills
found is on another page.

unprotected
    the same guest in the same run, before and after it was protected
drift
    unprotected after, to unprotected before: what the machine did meanwhile
output delay
    how long the oldest packet of a checkpoint was held
"""

_MANAGERS_INTRODUCTION = """\
=====================
Managers: the figures
=====================

This page is made by ``nova-pmt-bench page`` from the files that the benchmarks wrote. The managers'
code and the database are real, hosts and agents are simulated: each side that lost its peer asks
0.5 to 0.65 s after the death, as its timeout would have it. Managers, database and all that asks
share one machine.

.. image:: managers.svg
   :alt: claims that were asked and decided, over time
"""

_FILTER_INTRODUCTION = """\
===================
Filter: the figures
===================

This page is made by ``nova-pmt-bench page`` from the files that the benchmarks wrote. Hosts are
made up, database and filters are Nova's: each request is filtered as its scheduler does it, with
``PMTStandbyFilter`` and without, in turn. Goal: at most 2 ms more at p50.
"""


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A list table of reStructuredText."""
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in (head, *rows):
        for index, cell in enumerate(row):
            lines.append(f"   {'* -' if index == 0 else '  -'} {cell}")
    return "\n".join(lines) + "\n"


def _pair(times: dict[str, float]) -> str:
    return f"{times['p50']:.2f} / {times['p99']:.2f}"


def _pause(rows: list[dict[str, Any]]) -> str:
    head: tuple[str, ...] = (
        "memory MiB",
        "dirty pages",
        "copied in the pause",
        "floor ms p50 / p99",
    )
    head += ("pause ms p50 / p99", "pause / floor p50", "at p99", "plain / floor p50", "rounds")
    body = [
        (
            str(row["memory_mib"]),
            f"{row['dirty_pages']:.0f}",
            f"{row['pages_in_pause']:.0f}",
            _pair(row["floor_ms"]),
            _pair(row["pause_ms"]),
            f"**{row['ratio']:.2f}**",
            f"{row['ratio_p99']:.2f}",
            f"{row['plain_ratio']:.2f}",
            str(row["rounds"]),
        )
        for row in rows
    ]
    return _table("Pause against its floor", head, body) + _slopes(rows)


def _slopes(rows: list[dict[str, Any]]) -> str:
    """How the pause grows; nothing where the rows do not tell."""
    body = []
    for series, name in slopes.SERIES:
        found = slopes.fit(rows, series)
        if found is None:
            return ""
        met = all(getattr(found, goal) < most for goal, most in slopes.GOALS.items())
        body.append(
            (
                name,
                f"{found.us_per_page:.3f}",
                f"{found.ms_per_gib:.3f}",
                f"{found.explained:.2f}",
                "yes" if met else "no",
            )
        )
    head = ("pause over its floor", "us a dirty page", "ms a GiB of memory", "explained")
    goals = "under 1 us and 1 ms"
    return "\n" + _table("Slopes, by least squares", (*head, goals), body)


def _qmp(rows: list[dict[str, Any]]) -> str:
    head = ("client", "one command after the other, ms p50 / p99", "as the pause uses it")
    body = []
    for row in rows:
        body += [
            ("``qemu.qmp``", _pair(row["library_ms"]), _pair(row["stepwise_ms"])),
            ("``DirectMonitor``", _pair(row["direct_ms"]), _pair(row["pipelined_ms"])),
            ("ratio at p50", f"**{row['ratio']:.2f}**", f"**{row['product_ratio']:.2f}**"),
        ]
    return _table("QMP clients at stop + save devices + cont", head, body)


def _link(rows: list[dict[str, Any]]) -> str:
    head: tuple[str, ...] = (
        "link",
        "pause ms p50 / p99",
        "commit ms p50",
        "dirty pages",
        "cache peak / limit MiB",
    )
    head += ("throttled rounds", "rounds")
    body = [
        (
            f"{row['mbit']} Mbit/s" if row["mbit"] else "full",
            _pair(row["pause_ms"]),
            f"{row['commit_ms']['p50']:.0f}",
            f"{row['dirty_pages']:.0f}",
            f"{row['cache_peak_mib']:.0f} / {row['cache_limit_mib']:.0f}",
            str(row["throttled_rounds"]),
            str(row["rounds"]),
        )
        for row in rows[:-1]
    ]
    last = rows[-1]
    text = _table("Pause with the link limited", head, body)
    return text + f"\nPause, limited against full: **{last['ratio']:.2f}** at p50.\n"


_FAILOVER_INTRODUCTION = """\
=====================
Failover: the figures
=====================

This page is made by ``nova-pmt-bench page`` from the files that the benchmarks wrote. Two hosts
with agents and two managers on one machine, a guest under TCG. Four clients, each on a TCP
connection of its own, send a request when they have the last answer.

no answer
    the longest time in which no client had an answer
gone
    from when the failed host is well again until its old domain is destroyed
late releases
    what a side let out that it must not: after the other went on, or before its commit
late frames
    of the guest, out of the failed host's cable after the standby went on: what its kernel had on
    the way when its processes were stopped, all of it committed before
"""


def _gaps(rows: list[dict[str, Any]]) -> str:
    head: tuple[str, ...] = (
        "the primary",
        "runs",
        "no answer, ms p50 / p99",
        "at most",
        "goal, ms",
        "met",
    )
    head += ("fault to running", "to detected", "detected to running", "gone")
    head += ("late releases", "late frames")
    keys = ("failover_ms", "detection_ms", "activation_ms", "destroyed_ms")
    body = [
        (
            CAUSES[row["cause"]],
            str(row["runs"]),
            f"**{_pair(row['gap_ms'])}**",
            f"{row['gap_ms']['max']:.0f}",
            ", ".join(f"{key} {limit:.0f}" for key, limit in row["goal_ms"].items()),
            _met(row),
            *(_pair(row[key]) for key in keys),
            f"**{row['late_releases']}**",
            str(row["late_frames"]),
        )
        for row in rows
    ]
    timeout = rows[0]["peer_timeout_ms"]
    return _table(f"Failover, as clients see it; peer_timeout_ms {timeout}", head, body)


def _failover(rows: list[dict[str, Any]]) -> str:
    if "cause" in rows[0]:
        return _gaps(rows)
    head = ("runs", "kill to running, ms p50 / p99", "kill to detected", "detected to running")
    keys = ("failover_ms", "detection_ms", "activation_ms")
    body = [(str(row["runs"]), *(_pair(row[key]) for key in keys)) for row in rows]
    return _table("Failover", head, body)


def _limits(row: dict[str, Any]) -> str:
    found = []
    if row["disk_mb_s"]:
        found.append(f"each disk's writes limited to {row['disk_mb_s']} MB/s")
    if row["network_mbit"]:
        found.append(f"network limited to {row['network_mbit']} Mbit/s")
    return ", ".join(found) or "no limits"


def _met(row: dict[str, Any]) -> str:
    return "yes" if row["met"] else "**no**"


def _output(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    facts = (
        f"{first['memory_mib']} MiB, {first['vcpus']} vCPU, a qcow2 and a raw disk, "
        f"checkpoints every {first['interval_ms']:g} ms, {_limits(first)}"
    )
    latency = [row for row in rows if row["kind"] == "latency"]
    throughput = [row for row in rows if row["kind"] == "throughput"]
    parts = [
        _table(
            f"Request and response, ms p50 / p99 (at most: interval + pause + 5 ms): {facts}",
            (
                "request",
                "unprotected before, after",
                "protected",
                "interval + pause + 5 ms",
                "within",
            ),
            [
                (
                    row["load"],
                    ", ".join(_pair(times) for times in row["off_ms"]),
                    _pair(row["on_ms"]),
                    f"{row['bound_ms']:.2f}",
                    _met(row),
                )
                for row in latency
            ],
        ),
        _table(
            f"Throughput, MB/s: {facts}",
            ("load", "unprotected before, after", "protected", "ratio", "at least", "met", "drift"),
            [
                (
                    row["load"],
                    ", ".join(f"{speed:.1f}" for speed in row["off_mb_s"]),
                    f"{row['on_mb_s']:.1f}",
                    f"**{row['ratio']:.2f}**",
                    f"{row['goal']:.2f}",
                    _met(row),
                    f"{row['drift']:.2f}",
                )
                for row in throughput
            ],
        ),
        _table(
            "The rounds meanwhile, ms p50 / p99",
            ("load", "pause", "commit", "output delay", "held back", "rounds", "pages", "cores"),
            [
                (
                    row["load"],
                    *(_pair(row[f"{name}_ms"]) for name in ("pause", "commit", "output_delay")),
                    str(row["throttled_rounds"]),
                    str(row["rounds"]),
                    f"{row['pages_per_round']:.0f}",
                    ", ".join(f"{name} {used:.2f}" for name, used in row["cores"].items()),
                )
                for row in rows
            ],
        ),
    ]
    return "\n".join(parts)


def _capture(rows: list[dict[str, Any]]) -> str:
    head: tuple[str, ...] = ("seconds", "packets", "bytes", "sizes", "epochs", "violations")
    head += ("closest to its release, ms", "not captured", "ends that match no packet")
    head += ("violations if releases were one epoch later",)
    body = [
        (
            f"{row['seconds']:.0f}",
            f"{row['packets']:,}",
            f"{row['bytes']:,}",
            f"{row['smallest']} - {row['largest']}",
            f"{row['epochs']:,}",
            f"**{row['violations']}**",
            f"{row['closest_ms']:.3f}",
            str(row["lost_captures"]),
            str(row["unmatched_ends"]),
            f"{row['control_violations']:,}",
        )
        for row in rows
    ]
    return _table("Packets on the far side of the tap, against their epochs' releases", head, body)


def _idle(rows: list[dict[str, Any]]) -> str:
    head: tuple[str, ...] = (
        "interval ms",
        "Mbit/s between the hosts",
        "bursts with a checkpoint, per interval",
    )
    head += ("bursts of heartbeats", "pages per round", "bytes per round", "rounds")
    body = [
        (
            f"{row['interval_ms']:g}",
            f"**{row['mbit_per_s']:.2f}**",
            f"{row['checkpoint_bursts_per_interval']:.2f}",
            f"{row['heartbeat_bursts_per_interval']:.2f}",
            f"{row['pages_per_round']:.0f}",
            str(row["bytes_per_round"]),
            str(row["rounds"]),
        )
        for row in rows
    ]
    return _table("What an idle guest costs", head, body)


def _managers(rows: list[dict[str, Any]]) -> str:
    head: tuple[str, ...] = (
        "database",
        "managers",
        "pairs",
        "hosts",
        "that die",
        "pairs hit",
        "decided",
    )
    head += ("last asked, s", "last decided, s", "processor time of each manager, s")
    head += ("statements per claim",)
    head += ("protected again", "in s", "statements per repair")
    body = [
        (
            row["database"],
            str(row["managers"]),
            f"{row['pairs']:,}",
            f"{row['hosts']:,}",
            str(row["dead"]),
            str(row["affected"]),
            str(row["decided"]),
            f"{row['last_asked_s']:.2f}",
            f"**{row['last_decided_s']:.2f}**",
            ", ".join(f"{used:.2f}" for used in row["manager_cpu_s"]),
            f"{row['statements_per_claim']:.1f}",
            str(row["repaired"]),
            f"{row['repaired_in_s']:.1f}",
            f"{row['statements_per_repair']:.1f}",
        )
        for row in rows
    ]
    return _table("Hosts that die at once, simulated; seconds from their death", head, body)


def _filter(rows: list[dict[str, Any]]) -> str:
    head = ("request", "hosts", "pairs", "without", "added", "added processor time", "requests")
    body = [
        (
            row["request"],
            f"{row['hosts']:,}",
            str(row["pairs"]),
            _pair(row["without_ms"]),
            f"**{row['added_ms']['p50']:.2f}** / {row['added_ms']['p99']:.2f}",
            _pair(row["added_cpu_ms"]),
            str(row["rounds"]),
        )
        for row in rows
    ]
    return _table("What the filter adds to a request, ms p50 / p99", head, body)


_SECTIONS = {
    "failover": ("The failover", _failover),
    "link": ("The link", _link),
    "pause": ("The pause", _pause),
    "qmp": ("The QMP client", _qmp),
    "output": ("Latency and throughput", _output),
    "capture": ("No packet before its commit", _capture),
    "idle": ("An idle guest", _idle),
    "managers": ("Many hosts at once", _managers),
    "filter": ("The scheduler's filter", _filter),
}
_OF_OUTPUT = {"output", "capture", "idle"}


def page(files: Sequence[Path], pictures: Path | None = None) -> str:
    """The page for these files, in their order; those of one benchmark share a section.

    :param pictures: where the page will be, for its pictures; None: none are made.
    :raises ValueError: a file is not of a benchmark that the page knows.
    """
    parts, last, introduction = [], "", _INTRODUCTION
    for path in files:
        data = json.loads(path.read_text())
        header = data["header"]
        benchmark = header["benchmark"]
        if benchmark not in _SECTIONS:
            raise ValueError(f"{path}: unknown benchmark {benchmark!r}")
        if benchmark in _OF_OUTPUT:
            introduction = _OUTPUT_INTRODUCTION
        elif benchmark == "managers":
            introduction = _MANAGERS_INTRODUCTION
        elif benchmark == "failover" and "cause" in data["rows"][0]:
            introduction = _FAILOVER_INTRODUCTION
        elif benchmark == "filter":
            introduction = _FILTER_INTRODUCTION
        title, table = _SECTIONS[benchmark]
        if benchmark != last:
            parts.append(f"{title}\n{'=' * len(title)}\n")
        last = benchmark
        parts.append(table(data["rows"]))
        if benchmark == "pause" and pictures is not None:
            slopes.draw(data["rows"], pictures / f"{path.stem}.svg")
            parts.append(f".. image:: {path.stem}.svg\n   :alt: {_PAUSE_PICTURE}\n")
        load = ", ".join(str(value) for value in header["load_average"])
        parts.append(
            f"Command: ``{shlex.join(header['command'])}``, {header['date'][:10]}; "
            f"{header['cpus']} CPUs ({header['cpu_model']}), Linux {header['kernel']}, "
            f"QEMU {header['qemu']}, Python {header['python']}, load average {load}.\n"
        )
    return "\n".join([introduction, *parts])
