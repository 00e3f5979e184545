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

"""How the pause grows with what is dirty, and with memory that is not: fitted, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nova_pmt.bench import pictures

Row = Mapping[str, Any]
#: Fewer rows say nothing of two slopes.
LEAST_ROWS = 4
#: Columns of a row, and what they are.
SERIES = (("pause_ms", "the product's pause"), ("plain_ms", "without passes"))
GOALS = {"us_per_page": 1.0, "ms_per_gib": 1.0}


@dataclass(frozen=True)
class Slopes:
    """Of the pause over its floor, by least squares.

    :param us_per_page: microseconds for each dirty page.
    :param ms_per_gib: milliseconds for each GiB of memory.
    :param explained: share of the variance that the two explain.
    """

    us_per_page: float
    ms_per_gib: float
    explained: float


def fit(rows: Sequence[Row], series: str) -> Slopes | None:
    """The slopes of a series' p50; None where rows do not tell both apart.

    :param rows: of ``nova-pmt-bench pause``.
    """
    above = np.array([row[series]["p50"] - row["floor_ms"]["p50"] for row in rows])
    causes = np.array(
        [[row["dirty_pages"] / 1e3, row["memory_mib"] / 1024, 1.0] for row in rows], np.float64
    )
    if len(rows) < LEAST_ROWS or np.linalg.matrix_rank(causes) < causes.shape[1]:
        return None
    found = np.linalg.lstsq(causes, above, rcond=None)[0]
    left = above - causes @ found
    spread = float(np.sum((above - above.mean()) ** 2))
    explained = 1.0 - float(np.sum(left**2)) / spread if spread else 1.0
    return Slopes(float(found[0]), float(found[1]), explained)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture: the pause over its floor, by dirty pages, a line for each size of guest.

    :raises nova_pmt.exception.ConfigError: there is no matplotlib.
    """
    figure = pictures.figure(8.4, 3.4)
    plots = figure.subplots(1, len(SERIES), sharey=True)
    sizes = sorted({row["memory_mib"] for row in rows})
    for plot, (series, title) in zip(plots, SERIES, strict=True):
        for size in sizes:
            ours = sorted(
                (row for row in rows if row["memory_mib"] == size),
                key=lambda row: float(row["dirty_pages"]),
            )
            above = [row[series]["p50"] - row["floor_ms"]["p50"] for row in ours]
            pages = [row["dirty_pages"] for row in ours]
            plot.plot(pages, above, marker="o", markersize=3, label=f"{size} MiB")
        plot.set_title(title, fontsize=9)
        plot.set_xlabel("dirty pages of a checkpoint", fontsize=9)
        plot.grid(alpha=0.3)
    plots[0].set_ylabel("pause over its floor, p50, ms", fontsize=9)
    plots[-1].legend(fontsize=8, frameon=False, title="guest", title_fontsize=8)
    figure.savefig(path)
