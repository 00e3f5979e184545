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

"""The benchmark, small, in a process of its own: it sets Nova's databases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_it_measures_each_kind_of_request_on_what_the_database_says(tmp_path: Path) -> None:
    out = tmp_path / "filter.json"
    arguments = ["filter", "--hosts", "40", "--pairs", "8", "--rounds", "3", "--json", str(out)]
    run = subprocess.run(
        [sys.executable, "-m", "nova_pmt.cmd.bench", *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "p50 / p99" in run.stdout
    rows = {row["request"]: row for row in json.loads(out.read_text())["rows"]}
    for row in rows.values():
        assert {"p50", "p99"} <= row["without_ms"].keys() & row["added_ms"].keys()
        assert {"p50", "p99"} <= row["added_cpu_ms"].keys()
        assert isinstance(row["met"], bool)
    assert rows["unprotected"]["passing"] == 40
    assert rows["protected"]["passing"] == 36, "4 have no agent"
    # Nor its own host, nor the others' CPU: 2, 9, 16, 23, 30, 37.
    assert rows["standby"]["passing"] == 29
