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

"""What people see of a campaign: a line that tells how it goes, and a table at its end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from nova_pmt.evaluation.trial import Result

#: A pipe or a file has no width: lines there must not be folded.
_WIDE = 200
_EVERY = 10
#: What only campaigns of faults have.
_ALSO = {
    "split_brain": "outputs of two hosts",
    "early_releases": "epochs released early",
    "leftovers": "things left over",
    "unrecovered": "guests not protected again",
}


class Report:
    """Progress of a campaign; a context manager.

    :param console: where it goes; standard error, so that the table can be piped.
    :param negative: losses are what is looked for.
    :param short: without a terminal, not a line for each trial, but a sum of so many.
    """

    def __init__(
        self, console: Console, trials: int, *, negative: bool, short: bool = True
    ) -> None:
        self._console = console
        if not console.is_terminal:
            console.width = _WIDE
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[story]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("trials", total=trials, story="")
        self._negative = negative
        self._trials = trials
        self._short = short
        self._sums = {"answered": 0, "lost": 0, "repeated": 0, "broken_connections": 0}
        self._failovers = self._mismatches = 0

    def note(self, text: str) -> None:
        """One line."""
        shown = self._bar if self._console.is_terminal else self._console
        shown.print(text, markup=False, highlight=False)

    def trial(self, result: Result) -> None:
        """One more is done."""
        for key in self._sums:
            self._sums[key] += getattr(result, key)
        self._failovers += result.winner == "standby"
        self._mismatches += result.image_mismatches
        if not (result.clean or self._negative):
            self.note(f"trial {result.trial} ({result.what}): {'; '.join(result.problems)}")
        story = (
            f"{self._failovers} failovers, {self._sums['answered']} answered, "
            f"{self._sums['lost']} lost, {self._sums['repeated']} repeated, "
            f"{self._sums['broken_connections']} connections broken, "
            f"{self._mismatches} images wrong"
        )
        self._bar.update(self._task, advance=1, story=story)
        if self._console.is_terminal:
            return
        if not self._short:
            self.note(
                f"trial {result.trial}: {result.what}: {result.winner or 'nobody'} went on alone, "
                f"silence {result.silence_ms or 0:.0f} ms, {result.duration_s:.0f} s"
            )
        elif result.trial % _EVERY == 0:
            self.note(f"{result.trial} of {self._trials}: {story}")

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


def table(summary: Mapping[str, Any], title: str = "Output commit") -> Table:
    """The sums, and a line for each kind."""
    found = Table(title=f"{title}, seed {summary['seed']}: {summary['seconds']:.0f} s")
    columns = ("killed", "trials", "failovers", "lost", "to running ms p50 / p99", "silence ms")
    for name in columns:
        found.add_column(name, justify="right")
    for kind, row in summary["kinds"].items():
        found.add_row(
            kind,
            str(row["trials"]),
            str(row["failovers"]),
            str(row["lost"]),
            two(row["failover_ms"]),
            two(row["silence_ms"]),
        )
    words = (
        f"{summary['answered']} answered, {summary['lost']} lost, "
        f"{summary['repeated']} repeated, {summary['broken_connections']} connections broken, "
        f"{summary['image_mismatches']} images wrong"
    )
    for key, name in _ALSO.items():
        words += f", {summary[key]} {name}" if key in summary else ""
    found.caption = words + (f"; ended early: {summary['stopped']}" if summary["stopped"] else "")
    return found


def two(times: Mapping[str, float] | None) -> str:
    """p50 and p99."""
    return "-" if times is None else f"{times['p50']:.0f} / {times['p99']:.0f}"
