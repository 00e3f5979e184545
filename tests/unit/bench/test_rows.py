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

"""Samples become rows: quantiles, ratios, the members that readers of the JSON rely on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.bench import environment, rows
from nova_pmt.bench.measure import orders
from nova_pmt.bench.measure_qmp import blocks
from nova_pmt.bench.pause import buffer_mib

NAMES = ("pause", "plain", "floor", "memcpy")


def result(pause: list[float], floor: list[float]) -> dict[str, Any]:
    count = len(pause)
    record = {
        "pages": [1000] * count,
        "pause_pages": [24] * count,
        **{f"{step}_ms": [0.5] * count for step in rows.STEPS},
    }
    samples = {"pause": pause, "plain": [6.0] * count, "floor": floor, "memcpy": [0.4] * count}
    return {"samples": samples, "records": {"pause": record, "plain": record}}


def row(pause: list[float], floor: list[float]) -> dict[str, Any]:
    return rows.pause_row(
        result(pause, floor),
        memory_mib=128,
        asked_pages=1000,
        machine="q35",
        vcpus=1,
        passes=2,
        threads=1,
    )


def test_a_row_compares_quantiles_of_one_run() -> None:
    made = row([2.2] * 99 + [9.0], [2.0] * 99 + [6.0])
    assert made["ratio"] == 1.1
    assert made["plain_ratio"] == 3.0
    assert made["pause_ms"]["p50"] == 2.2
    assert made["ratio_p99"] == round(made["pause_ms"]["p99"] / made["floor_ms"]["p99"], 3)
    assert (made["dirty_pages"], made["pages_in_pause"], made["rounds"]) == (1000, 24, 100)


def test_a_row_has_what_the_documentation_promises() -> None:
    made = row([2.0], [2.0])
    for name in ("memory_mib", "dirty_pages", "ratio", "plain_ratio", "machine", "vcpus", "rounds"):
        assert name in made
    for name in NAMES:
        assert set(made[f"{name}_ms"]) == {"p50", "p99", "max"}
    assert set(made["steps_ms"]) == {"stop", "scan", "copy", "save", "cont"}
    assert json.loads(json.dumps(made)) == made


def test_no_samples_are_no_figures() -> None:
    with pytest.raises(ValueError, match="no samples"):
        rows.quantiles([])


def test_nothing_to_divide_by_is_infinite_and_null_in_json(tmp_path: Path) -> None:
    assert rows.ratio(1.0, 0.0) == math.inf
    file = tmp_path / "sub" / "out.json"
    environment.write(file, environment.header("pause", ["x"], "7.2.22"), [{"ratio": math.inf}])
    read = json.loads(file.read_text())
    assert read["rows"] == [{"ratio": None}]
    assert {"kernel", "qemu", "cpus", "command", "date"} <= set(read["header"])
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(exception.PmtError) as caught:
        environment.write(tmp_path / "file" / "out.json", {}, [])
    assert "--json" in caught.value.cure


@pytest.mark.parametrize(
    ("found", "expected"),
    [(1000, 1000), (1250, 800), (800, 1250), (10, 2000), (100_000, 500), (0, 1000)],
)
def test_calibration_goes_towards_what_was_asked_and_not_too_far(
    found: float, expected: int
) -> None:
    assert rows.calibrated(1000, 1000, found) == expected


def test_pages_that_do_not_fit_are_left_out() -> None:
    assert buffer_mib(128, 1000) == 16
    assert buffer_mib(128, 20_000) is None
    assert buffer_mib(4096, 20_000) == 313


def test_each_round_measures_each_variant_once_in_changing_order() -> None:
    made = list(orders(list(NAMES), 50))
    assert all(sorted(order) == sorted(NAMES) for order in made)
    assert len({tuple(order) for order in made}) > 10
    assert made == list(orders(list(NAMES), 50))


def test_clients_take_turns_in_blocks() -> None:
    assert blocks(60, 25) == [25, 25, 10]
    samples = {"library": [3.0], "direct": [2.0], "pipelined": [1.5], "stepwise": [3.3]}
    made = rows.qmp_row(samples, machine="pc")
    assert (made["ratio"], made["pipelined_ratio"], made["machine"]) == (1.5, 2.0, "pc")
    assert made["product_ratio"] == 2.2
