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

"""What the benchmarks of output commit make of their measurements."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nova_pmt.bench import idle, loads, output, page, report
from nova_pmt.bench.output import Load, Measured
from nova_pmt.cmd import bench
from tests.unit.bench.test_page import HEADER

STEPS = {"stop": 1.0, "scan": 0.4, "copy": 0.0, "save": 1.0, "cont": 0.5}
STATS: dict[str, Any] = {
    "rounds": 200,
    "throttled_rounds": 3,
    "pages": {"p50": 150.0},
    "log_bytes_total": 4096,
    "sent_bytes": 1 << 20,
    "network": [{"dropped_packets": 2}, {"dropped_packets": 0}],
    "pause_ms": {"p50": 4.0, "p99": 9.0, "max": 9.5},
    "pause_steps_ms": STEPS,
    "commit_ms": {"p50": 3.0, "p99": 8.0, "max": 8.5},
    "output_delay_ms": {"p50": 15.0, "p99": 30.0, "max": 31.0},
}
CAPTURE: dict[str, Any] = {
    "seconds": 300.0,
    "interval_ms": 20,
    "packets": 1234567,
    "bytes": 7654321,
    "smallest": 60,
    "largest": 65226,
    "epochs": 9999,
    "violations": 0,
    "unmatched_ends": 0,
    "lost_captures": 0,
    "header_bytes": 12,
    "closest_ms": 0.098,
    "control_violations": 1111111,
}
IDLE: dict[str, Any] = {
    "interval_ms": 100,
    "mbit_per_s": 0.42,
    "checkpoint_bursts_per_interval": 0.98,
    "heartbeat_bursts_per_interval": 0.1,
    "pages_per_round": 35.0,
    "bytes_per_round": 4400,
    "rounds": 200,
}


def throughput(on: float) -> dict[str, Any]:
    measured = Measured([100.0, 120.0], on, STATS, {"guest": 0.5})
    return output.row(Load("stream", lambda *_: None), measured, interval_ms=20)


def latency(on: float) -> dict[str, Any]:
    measured = Measured([[1.0] * 9, [2.0] * 9], [on] * 9, STATS, {})
    return output.row(Load("echo", lambda *_: None, is_latency=True), measured, interval_ms=20)


def test_throughput_is_compared_with_the_mean_of_before_and_after() -> None:
    row = throughput(66.0)
    assert (row["ratio"], row["met"], row["drift"]) == (0.6, True, 1.2)
    assert throughput(65.0)["met"] is False
    assert row["dropped_packets"] == 2


def test_latency_is_bounded_by_interval_pause_and_an_allowance() -> None:
    row = latency(29.0)
    assert (row["bound_ms"], row["met"]) == (29.0, True)
    assert (row["ratio"], row["requests"]) == (pytest.approx(19.333), 9)
    assert latency(29.1)["met"] is False


def test_a_stream_is_settled_when_it_gets_no_faster() -> None:
    steps = loads.STREAM_STEPS
    growing = [step * step for step in range(3 * steps)]
    assert not loads.is_settled(growing)
    assert not loads.is_settled([0] * (2 * steps))  # too early to say
    assert loads.is_settled([10 * step for step in range(2 * steps + 1)])


def test_bursts_with_and_without_a_checkpoint() -> None:
    at = np.array([0.0, 0.001, 0.002, 0.1, 0.15, 0.2, 0.2001])
    lengths = np.array([1500, 66, 112, 1500, 112, 66, 66])
    assert idle.bursts(at, lengths) == (2, 2)
    assert idle.bursts(at[:0], lengths[:0]) == (0, 0)


def test_the_tables_show_what_counts() -> None:
    out = io.StringIO()
    console = Console(file=out, width=250)
    console.print(report.output_table([latency(29.1), throughput(66.0)]))
    console.print(report.capture_table(CAPTURE))
    console.print(report.idle_table(IDLE))
    text = out.getvalue()
    for figure in ("29.0 ms", "NO", "yes", "0.60", "1234567", "60 - 65226", "0.098", "0.42"):
        assert figure in text, figure


def write(path: Path, benchmark: str, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"header": {**HEADER, "benchmark": benchmark}, "rows": rows}))
    return path


def test_the_page_has_all_three(tmp_path: Path) -> None:
    facts = {"memory_mib": 512, "vcpus": 1, "disk_mb_s": 50, "network_mbit": 0}
    rows = [{**latency(29.1), **facts}, {**throughput(66.0), **facts}]
    text = page.page(
        [
            write(tmp_path / "output.json", "output", rows),
            write(tmp_path / "capture.json", "capture", [CAPTURE]),
            write(tmp_path / "idle.json", "idle", [IDLE]),
        ]
    )
    assert "Output commit: the figures" in text
    assert "Pause: the figures" not in text
    for figure in ("**0.60**", "29.10", "**no**", "1,234,567", "**0**", "50 MB/s", "**0.42**"):
        assert figure in text, figure


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["output"], {"interval_ms": 20, "seconds": 8, "memory": 512, "disk_mb_s": 0}),
        (["capture"], {"interval_ms": 20, "seconds": 300}),
        (["idle"], {"interval_ms": 100, "seconds": 20}),
    ],
)
def test_the_documented_commands_are_understood(
    arguments: list[str], expected: dict[str, int]
) -> None:
    args = vars(bench.make_parser().parse_args(arguments))
    assert expected.items() <= args.items()


@pytest.mark.parametrize(("violations", "status"), [(0, 0), (3, 1)])
def test_a_violation_is_an_exit_status(
    violations: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {**CAPTURE, "violations": violations}
    monkeypatch.setitem(
        bench._RUN, "capture", lambda *_: (report.capture_table(row), [row], "7.2.22")
    )
    assert bench.main(["capture"]) == status
