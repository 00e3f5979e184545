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


from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from nova_pmt.bench import gaps, page, report
from nova_pmt.bench.gaps import Samples
from nova_pmt.cmd import bench
from tests.unit.bench.test_page import HEADER


def samples(*gap: float, **changes: int) -> Samples:
    times = [1.0] * len(gap)
    return Samples(list(gap), times, times, times, times, **changes)


@pytest.mark.parametrize(
    ("cause", "gap", "met"),
    [
        ("qemu", (200.0, 300.0, 400.0), True),
        ("qemu", (310.0, 310.0, 310.0), False),
        ("qemu", (100.0, 100.0, 1100.0), False),
        ("silent", (700.0, 800.0, 9000.0), True),
        ("silent", (700.0, 801.0, 900.0), False),
        ("stopped", (900.0, 1500.0), True),
        ("stopped", (900.0, 1501.0), False),
    ],
)
def test_each_cause_has_its_goal(cause: str, gap: tuple[float, ...], met: bool) -> None:
    assert gaps.row(cause, samples(*gap), 500)["met"] is met


def test_every_cause_is_in_the_help_and_has_a_goal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.make_parser().parse_args(["failover", "--help"])
    text = capsys.readouterr().out
    for cause in gaps.CAUSES:
        assert f"\n  {cause} " in text
        assert gaps.goals(cause, 500)


def test_the_documented_command_is_understood() -> None:
    arguments = ["failover", "--runs", "50", "--cause", "qemu,silent,stopped"]
    args = bench.make_parser().parse_args(arguments)
    assert (args.runs, args.cause, args.peer_timeout_ms) == (50, tuple(gaps.CAUSES), 500)
    with pytest.raises(SystemExit):
        bench.make_parser().parse_args(["failover", "--cause", "fire"])


def test_table_and_page_have_the_gap_and_what_was_let_out(tmp_path: Path) -> None:
    rows = [gaps.row("stopped", samples(1234.0, late_releases=7, late_frames=3), 500)]
    out = io.StringIO()
    Console(file=out, width=200).print(report.failover_table(rows))
    assert "1234" in out.getvalue()
    path = tmp_path / "failover.json"
    path.write_text(json.dumps({"header": {**HEADER, "benchmark": "failover"}, "rows": rows}))
    text = page.page([path])
    assert text.startswith("=====================\nFailover")
    assert "**1234.00 / 1234.00**" in text
    assert "max 1500" in text
    assert "**7**" in text
