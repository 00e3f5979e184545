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

"""nova-pmt-bench on a real guest: the schema, and that figures are figures. No absolute times."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nova_pmt.cmd import bench

ROUNDS = 10


@pytest.mark.timeout(180)
def test_pause_on_a_small_guest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pause.json"
    arguments = ["pause", "--memory", "128", "--dirty", "1000,50000", "--rounds", str(ROUNDS)]
    assert bench.main([*arguments, "--json", str(file)]) == 0
    read = json.loads(file.read_text())
    assert read["header"]["qemu"][0].isdigit()
    (row,) = read["rows"]
    assert (row["memory_mib"], row["rounds"], row["machine"]) == (128, ROUNDS, "q35")
    for name in ("pause_ms", "floor_ms", "plain_ms", "memcpy_ms"):
        assert 0 < row[name]["p50"] <= row[name]["p99"] <= row[name]["max"]
    for name in ("ratio", "ratio_p99", "plain_ratio"):
        assert math.isfinite(row[name])
        assert row[name] > 0
    assert 200 < row["dirty_pages"] < 5000
    assert row["pages_in_pause"] <= row["plain_pages"]
    output = capfd.readouterr()
    assert "50000 pages: left out" in output.err
    assert "plain ratio" in output.out


@pytest.mark.timeout(120)
def test_qmp_clients_on_a_small_guest(tmp_path: Path) -> None:
    file = tmp_path / "qmp.json"
    arguments = ["qmp", "--rounds", str(ROUNDS), "--block", "5", "--json", str(file)]
    assert bench.main(arguments) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["rounds"] == ROUNDS
    for name in ("ratio", "ratio_p99", "pipelined_ratio"):
        assert math.isfinite(row[name])
        assert row[name] > 0
