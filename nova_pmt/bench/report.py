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

"""What people see: a progress bar on a terminal, plain lines elsewhere, and the tables."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

#: A pipe or a file has no width: lines there must not be folded.
_WIDE = 200


class Report:
    """Progress of a benchmark; a context manager.

    :param console: where it goes; standard error, so that the table can be piped.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        if not console.is_terminal:
            console.width = _WIDE
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: Any = None
        self._label = ""

    def note(self, text: str) -> None:
        """One line."""
        self._bar.print(text) if self._console.is_terminal else self._console.print(text)

    def progress(self, label: str, done: int, total: int) -> None:
        """``done`` of ``total``; a new label is a new bar, and one line where there are no bars."""
        if label != self._label:
            self._label = label
            if self._console.is_terminal:
                self._task = self._bar.add_task(label, total=total)
            else:
                self._console.print(label)
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


def _pair(times: dict[str, float]) -> str:
    return f"{times['p50']:.2f} / {times['p99']:.2f}"


def pause_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of ``nova-pmt-bench pause``."""
    table = Table(title="Pause against its floor: p50 / p99 in ms, and ratios within this run")
    for name in (
        *("memory", "dirty pages", "in pause", "floor", "pause", "plain", "memcpy p50", "scan"),
        *("ratio p50", "ratio p99", "plain ratio"),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['memory_mib']} MiB",
            f"{row['dirty_pages']:.0f}",
            f"{row['pages_in_pause']:.0f}",
            _pair(row["floor_ms"]),
            _pair(row["pause_ms"]),
            _pair(row["plain_ms"]),
            f"{row['memcpy_ms']['p50']:.2f}",
            f"{row['scan_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_p99']:.2f}",
            f"{row['plain_ratio']:.2f}",
        )
    return table


def link_table(rows: list[dict[str, Any]]) -> Table:
    """The result of ``nova-pmt-bench link``."""
    table = Table(title="pause on the full and on a limited link: p50 / p99 in ms")
    for name in ("link", "pause", "commit p50", "cache peak MiB", "throttled", "rounds"):
        table.add_column(name, justify="right")
    for row in rows[:-1]:
        table.add_row(
            f"{row['mbit']} Mbit/s" if row["mbit"] else "full",
            _pair(row["pause_ms"]),
            f"{row['commit_ms']['p50']:.0f}",
            f"{row['cache_peak_mib']:.0f}",
            str(row["throttled_rounds"]),
            str(row["rounds"]),
        )
    table.add_row("limited / full", f"{rows[-1]['ratio']:.2f} / {rows[-1]['ratio_p99']:.2f}")
    return table


def failover_table(rows: list[dict[str, Any]]) -> Table:
    """The result of ``nova-pmt-bench failover``."""
    table = Table(title="failover: p50 / p99 in ms")
    table.add_column("cause")
    for name in ("runs", "no answer", "max", "goal", "to running", "to detected", "activation"):
        table.add_column(name, justify="right")
    for name in ("old one gone after", "late releases", "late frames"):
        table.add_column(name, justify="right")
    keys = ("failover_ms", "detection_ms", "activation_ms", "destroyed_ms")
    for row in rows:
        table.add_row(
            row["cause"],
            str(row["runs"]),
            _pair(row["gap_ms"]),
            f"{row['gap_ms']['max']:.0f}",
            _yes(row["met"]),
            *(_pair(row[key]) for key in keys),
            str(row["late_releases"]),
            str(row["late_frames"]),
        )
    return table


def _yes(met: bool) -> str:
    return "yes" if met else "NO"


def output_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of ``nova-pmt-bench output``."""
    interval = rows[0]["interval_ms"]
    table = Table(
        title=f"Protected every {interval:g} ms against unprotected (before, after)",
        caption="latency in ms p50 / p99, throughput in MB/s; goal: latency p50 at most interval + "
        "pause + 5 ms, throughput at least 60 %",
    )
    table.add_column("load")
    for name in (
        *("unprotected", "protected", "ratio", "goal", "met", "drift"),
        *("pause ms", "commit ms", "output delay ms", "throttled", "pages"),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        if row["kind"] == "latency":
            before, after = (_pair(times) for times in row["off_ms"])
            figures = (f"{before}, {after}", _pair(row["on_ms"]), f"{row['ratio']:.1f}")
            goal = f"{row['bound_ms']:.1f} ms"
        else:
            before, after = (f"{speed:.1f}" for speed in row["off_mb_s"])
            figures = (f"{before}, {after}", f"{row['on_mb_s']:.1f}", f"{row['ratio']:.2f}")
            goal = f"{row['goal']:.2f}"
        table.add_row(
            row["load"],
            *figures,
            goal,
            _yes(row["met"]),
            f"{row['drift']:.2f}",
            *(_pair(row[f"{name}_ms"]) for name in ("pause", "commit", "output_delay")),
            f"{row['throttled_rounds']} / {row['rounds']}",
            f"{row['pages_per_round']:.0f}",
        )
    return table


def capture_table(row: dict[str, Any]) -> Table:
    """The result of ``nova-pmt-bench capture``."""
    table = Table(title="Packets on the far side of the tap, against the releases of their epochs")
    for name in (
        *("packets", "bytes", "sizes", "epochs", "violations", "closest ms"),
        *("not captured", "unmatched ends", "control's violations"),
    ):
        table.add_column(name, justify="right")
    table.add_row(
        str(row["packets"]),
        str(row["bytes"]),
        f"{row['smallest']} - {row['largest']}",
        str(row["epochs"]),
        str(row["violations"]),
        f"{row['closest_ms']:.3f}",
        str(row["lost_captures"]),
        str(row["unmatched_ends"]),
        str(row["control_violations"]),
    )
    return table


def idle_table(row: dict[str, Any]) -> Table:
    """The result of ``nova-pmt-bench idle``."""
    table = Table(title=f"Between the hosts for an idle guest, every {row['interval_ms']:g} ms")
    for name in (
        *("Mbit/s", "checkpoint bursts per interval", "bursts of heartbeats"),
        *("pages per round", "bytes per round", "rounds"),
    ):
        table.add_column(name, justify="right")
    table.add_row(
        f"{row['mbit_per_s']:.2f}",
        f"{row['checkpoint_bursts_per_interval']:.2f}",
        f"{row['heartbeat_bursts_per_interval']:.2f}",
        f"{row['pages_per_round']:.0f}",
        str(row["bytes_per_round"]),
        str(row["rounds"]),
    )
    return table


def managers_table(row: dict[str, Any]) -> Table:
    """The result of ``nova-pmt-bench managers``."""
    table = Table(
        title=f"{row['dead']} of {row['hosts']} hosts die, {row['pairs']} pairs, "
        f"{row['managers']} managers on {row['database']}"
    )
    for name in (
        *("pairs hit", "decided", "last asked s", "last decided s", "longest wait s"),
        *("processor time s", "statements per claim", "repaired", "in s", "statements per repair"),
    ):
        table.add_column(name, justify="right")
    table.add_row(
        str(row["affected"]),
        str(row["decided"]),
        f"{row['last_asked_s']:.2f}",
        f"{row['last_decided_s']:.2f}",
        f"{row['backlog_max_s']:.2f}",
        ", ".join(f"{used:.2f}" for used in row["manager_cpu_s"]),
        f"{row['statements_per_claim']:.1f}",
        str(row["repaired"]),
        f"{row['repaired_in_s']:.1f}",
        f"{row['statements_per_repair']:.1f}",
    )
    return table


def filter_table(rows: list[dict[str, Any]]) -> Table:
    """The result of ``nova-pmt-bench filter``."""
    table = Table(
        title=f"{rows[0]['hosts']} hosts, {rows[0]['pairs']} pairs: p50 / p99 in ms of a request"
    )
    table.add_column("request")
    for name in ("without", "added", "added processor time", "goal", "hosts that pass"):
        table.add_column(name, justify="right")
    for row in rows:
        times = (row[name] for name in ("without_ms", "added_ms", "added_cpu_ms"))
        table.add_row(
            row["request"],
            *(f"{found['p50']:.2f} / {found['p99']:.2f}" for found in times),
            f"{row['goal_ms']:.0f} {'met' if row['met'] else 'missed'}",
            str(row["passing"]),
        )
    return table


def qmp_table(row: dict[str, Any]) -> Table:
    """The result of ``nova-pmt-bench qmp``."""
    table = Table(title="stop + save devices + cont: p50 / p99 in ms")
    table.add_column("client")
    for name in ("one by one", "as the pause uses it"):
        table.add_column(name, justify="right")
    table.add_row("qemu.qmp", _pair(row["library_ms"]), _pair(row["stepwise_ms"]))
    table.add_row("ours", _pair(row["direct_ms"]), _pair(row["pipelined_ms"]))
    table.add_row("qemu.qmp / ours", f"{row['ratio']:.2f}", f"{row['product_ratio']:.2f}")
    return table
