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

"""Pictures of an evaluation, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nova_pmt.bench import pictures
from nova_pmt.evaluation.study.cell import PLAIN
from nova_pmt.evaluation.study.figures import Table
from nova_pmt.evaluation.study.findings import link_name

#: Figure, its axis, and whether the axis is logarithmic.
PLOTS = (
    ("pause_p50_ms", "pause p50, ms", True),
    ("output_delay_p50_ms", "output delay p50, ms", True),
    ("mbit_per_s", "sent (before TLS), Mbit/s", True),
    ("throughput_ratio", "throughput, of unprotected", False),
    ("paused_share", "share of time paused", False),
)
_COLOURS = {"pmt": "#1b6ca8", "kemari": "#c8553d", "auto": "#4c956c", PLAIN: "#9fb8cc"}


def draw(table: Table, directory: Path) -> list[Path]:
    """One picture for each figure; all links beside each other. Returns the SVG files.

    :raises nova_pmt.exception.ConfigError: there is no matplotlib.
    """
    made = []
    for figure, label, logarithmic in PLOTS:
        path = directory / f"evaluation-{figure}.svg"
        _bars(table, figure, label, logarithmic).savefig(path)
        _bars(table, figure, label, logarithmic).savefig(path.with_suffix(".png"), dpi=110)
        made.append(path)
    return made


def _bars(table: Table, figure: str, label: str, logarithmic: bool) -> Any:
    links, scenarios = table.links, table.scenarios
    picture = pictures.figure(4.2 * len(links), 3.4)
    axes = picture.subplots(1, len(links), sharey=True, squeeze=False)[0]
    width = 0.8 / max(1, len(table.strategies))
    positive = False
    for plot, link in zip(axes, links, strict=True):
        for number, strategy in enumerate(table.strategies):
            entries = [table.entry(name, strategy, link, figure) for name in scenarios]
            positive = positive or any(entry and entry["mean"] > 0 for entry in entries)
            _series(plot, entries, number, width, strategy)
        plot.set_title(link_name(link), fontsize=9)
        plot.set_xticks(
            [at + 0.4 - width / 2 for at in range(len(scenarios))],
            scenarios,
            rotation=50,
            ha="right",
            rotation_mode="anchor",
            fontsize=8,
        )
        plot.grid(axis="y", alpha=0.3)
    if logarithmic and positive:
        axes[0].set_yscale("log")  # of all: they share it
    axes[0].set_ylabel(label, fontsize=9)
    # From where most were measured.
    most = max((plot.get_legend_handles_labels() for plot in axes), key=lambda one: len(one[0]))
    axes[-1].legend(*most, fontsize=8, frameon=False)
    return picture


def _series(plot: Any, entries: Sequence[Any], number: int, width: float, strategy: str) -> None:
    if not any(entries):
        return
    at = [place + number * width for place, entry in enumerate(entries) if entry]
    means = [entry["mean"] for entry in entries if entry]
    ends = [
        [max(0.0, entry["mean"] - entry["low"]) for entry in entries if entry],
        [max(0.0, entry["high"] - entry["mean"]) for entry in entries if entry],
    ]
    plot.bar(
        at,
        means,
        width,
        yerr=ends if any(map(any, ends)) else None,
        label=strategy,
        color=_COLOURS.get(strategy),
        error_kw={"linewidth": 0.8},
    )
