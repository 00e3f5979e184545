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

"""From samples to the rows of the report: pure functions, and the schema of the JSON file.

Times are in milliseconds. A ratio is that of two quantiles of the same run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCHEMA = 1
STEPS = ("stop", "scan", "copy", "save", "cont")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and max.

    :raises ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no samples")
    return {
        "p50": round(float(np.percentile(values, 50)), 3),
        "p99": round(float(np.percentile(values, 99)), 3),
        "max": round(float(np.max(values)), 3),
    }


def ratio(above: float, below: float) -> float:
    """``above / below`` to three decimals; infinite where there is nothing to divide by."""
    return round(above / below, 3) if below > 0 else math.inf


def median(values: Sequence[float]) -> float:
    """The median, to three decimals; 0 where there are no values."""
    return round(float(np.median(values)), 3) if len(values) else 0.0


def pause_row(
    result: Mapping[str, Any],
    *,
    memory_mib: int,
    asked_pages: int,
    machine: str,
    vcpus: int,
    passes: int,
    threads: int,
) -> dict[str, Any]:
    """One row of ``nova-pmt-bench pause``.

    :param result: what :func:`nova_pmt.bench.measure.measure` told.
    :param asked_pages: what the dirtier was set for.
    """
    samples, records = result["samples"], result["records"]
    pause, plain, floor, copying = (
        quantiles(samples[name]) for name in ("pause", "plain", "floor", "memcpy")
    )
    whole, bare = records["pause"], records["plain"]
    return {
        "memory_mib": memory_mib,
        "dirty_pages": median(whole["pages"]),
        "asked_pages": asked_pages,
        "pause_ms": pause,
        "floor_ms": floor,
        "plain_ms": plain,
        "memcpy_ms": copying,
        "ratio": ratio(pause["p50"], floor["p50"]),
        "ratio_p99": ratio(pause["p99"], floor["p99"]),
        "plain_ratio": ratio(plain["p50"], floor["p50"]),
        "pages_in_pause": median(whole["pause_pages"]),
        "plain_pages": median(bare["pages"]),
        "scan_ms": median(whole["scan_ms"]),
        "steps_ms": {step: median(whole[f"{step}_ms"]) for step in STEPS},
        "plain_steps_ms": {step: median(bare[f"{step}_ms"]) for step in STEPS},
        "machine": machine,
        "vcpus": vcpus,
        "passes": passes,
        "threads": threads,
        "rounds": len(samples["pause"]),
    }


def calibrated(asked: int, set_to: int, found: float) -> int:
    """What to set the dirtier to, so that a checkpoint has ``asked`` pages.

    A guest dirties pages of its own, too: what it was set to is scaled by what is missing, within
    a factor of two, so that one odd measurement does not lead astray.

    :param set_to: pages per interval that the dirtier is set for now.
    :param found: pages that a checkpoint had.
    """
    if found <= 0:
        return set_to
    return max(1, round(set_to * min(2.0, max(0.5, asked / found))))


def qmp_row(samples: Mapping[str, Sequence[float]], **facts: Any) -> dict[str, Any]:
    """The result of ``nova-pmt-bench qmp``.

    :param samples: per client: ``direct``, ``pipelined``, ``library`` and ``stepwise``.
    """
    times = {name: quantiles(values) for name, values in samples.items()}
    return {
        **{f"{name}_ms": value for name, value in times.items()},
        "ratio": ratio(times["library"]["p50"], times["direct"]["p50"]),
        "ratio_p99": ratio(times["library"]["p99"], times["direct"]["p99"]),
        "pipelined_ratio": ratio(times["library"]["p50"], times["pipelined"]["p50"]),
        "product_ratio": ratio(times["stepwise"]["p50"], times["pipelined"]["p50"]),
        "rounds": len(samples["library"]),
        **facts,
    }
