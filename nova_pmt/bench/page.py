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

"""The results page: made from the JSON files of benchmarks, never typed by hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    head = ("memory MiB", "dirty pages", "copied in the pause", "floor ms p50 / p99")
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
    return _table("Pause against its floor", head, body)


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
    head = ("link", "pause ms p50 / p99", "commit ms p50", "dirty pages", "cache peak / limit MiB")
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


def _failover(rows: list[dict[str, Any]]) -> str:
    head = ("runs", "kill to running, ms p50 / p99", "kill to detected", "detected to running")
    keys = ("failover_ms", "detection_ms", "activation_ms")
    body = [(str(row["runs"]), *(_pair(row[key]) for key in keys)) for row in rows]
    return _table("Failover", head, body)


_SECTIONS = {
    "failover": ("The failover", _failover),
    "link": ("The link", _link),
    "pause": ("The pause", _pause),
    "qmp": ("The QMP client", _qmp),
}


def page(files: Sequence[Path]) -> str:
    """The page for these files, in their order.

    :raises ValueError: a file is not of a benchmark that the page knows.
    """
    parts = [_INTRODUCTION]
    for path in files:
        data = json.loads(path.read_text())
        header = data["header"]
        if header["benchmark"] not in _SECTIONS:
            raise ValueError(f"{path}: unknown benchmark {header['benchmark']!r}")
        title, table = _SECTIONS[header["benchmark"]]
        parts.append(f"{title}\n{'=' * len(title)}\n")
        parts.append(table(data["rows"]))
        load = ", ".join(str(value) for value in header["load_average"])
        parts.append(
            f"Command: ``{shlex.join(header['command'])}``, {header['date'][:10]}; "
            f"{header['cpus']} CPUs ({header['cpu_model']}), Linux {header['kernel']}, "
            f"QEMU {header['qemu']}, Python {header['python']}, load average {load}.\n"
        )
    return "\n".join(parts)
