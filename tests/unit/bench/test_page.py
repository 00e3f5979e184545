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

"""The results page is made from what benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nova_pmt.bench import page
from nova_pmt.cmd import bench

HEADER = {
    "benchmark": "qmp",
    "date": "2026-01-02T03:04:05+00:00",
    "command": ["nova-pmt-bench", "qmp", "--json", "a file"],
    "kernel": "6.18",
    "qemu": "7.2.22",
    "python": "3.11",
    "cpus": 2,
    "cpu_model": "some CPU",
    "load_average": [1, 2, 3],
}
TIMES = {"p50": 1.0, "p99": 2.0}
ROW = {f"{name}_ms": TIMES for name in ("library", "stepwise", "direct", "pipelined")}


def write(path: Path, **header: object) -> Path:
    rows = [{**ROW, "ratio": 1.18, "product_ratio": 1.31}]
    path.write_text(json.dumps({"header": {**HEADER, **header}, "rows": rows}))
    return path


def test_figures_and_the_command_that_made_them_are_on_the_page(tmp_path: Path) -> None:
    text = page.page([write(tmp_path / "qmp.json")])
    assert "**1.31**" in text
    assert "``nova-pmt-bench qmp --json 'a file'``" in text
    assert "2026-01-02" in text


def test_a_file_of_something_else_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["page", str(write(tmp_path / "x.json", benchmark="other"))]) == 1
    assert "no result of a benchmark" in capsys.readouterr().err
