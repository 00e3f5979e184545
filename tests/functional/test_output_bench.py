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

"""nova-pmt-bench output and idle on real pairs: figures are figures. No absolute times."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nova_pmt.bench import idle, loads, output
from nova_pmt.lab import Disk, LabGuest, LabHost, Workload
from tests.functional.conftest import Boot

INTERVAL_MS = 20
SECONDS = 1.0
_IMAGES = "/var/lib/libvirt/images"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a stream has found its speed is not what these tests are about."""
    monkeypatch.setattr(loads, "STREAM_WARM_UP_S", SECONDS)


@pytest.fixture
def guest(one: LabHost, boot: Boot) -> LabGuest:
    disks = (Disk(f"{_IMAGES}/out.qcow2", 96), Disk(f"{_IMAGES}/out.raw", 96, format="raw"))
    return boot(one, disks=disks, workload=Workload(console_every=0))


@pytest.mark.timeout(240)
def test_each_kind_of_load_has_a_row(guest: LabGuest, two: LabHost) -> None:
    chosen = (output.LOADS[1], output.LOADS[2], output.LOADS[4])
    for load in chosen:
        row = output.measure(guest, two, load, seconds=SECONDS, interval_ms=INTERVAL_MS)
        assert row["rounds"] > 2, row
        assert 0 < row["pause_ms"]["p50"] <= row["pause_ms"]["p99"], row
        assert row["commit_ms"]["p50"] > 0, row
        assert row["drift"] > 0, row
        assert math.isfinite(row["ratio"]), row
        assert row["cores"]["primary worker"] > 0, row
        if load.is_latency:
            # An answer waits for the end of its epoch.
            assert row["on_ms"]["p50"] > min(times["p50"] for times in row["off_ms"]), row
            assert row["output_delay_ms"]["p50"] > 0, row
            assert row["requests"] > 1, row
            assert row["log_bytes"] > 0, row
        else:
            assert row["on_mb_s"] > 0, row
            assert min(row["off_mb_s"]) > 0, row
    assert guest.verify().startswith("ok")


def is_cheap(row: dict[str, Any]) -> bool:
    """On a busy machine a burst may be torn in two; two in an interval would be 2."""
    return (
        row["lost_captures"] == 0
        and row["rounds"] > 20
        and 0 < row["checkpoint_bursts_per_interval"] < 1.5
        and row["mbit_per_s"] < 1.0
    )


@pytest.mark.timeout(240)
def test_an_idle_guest_costs_one_burst_in_an_interval(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one, workload=Workload(tick_ms=1000, console_every=0))
    rows: list[dict[str, Any]] = []
    while not any(map(is_cheap, rows)) and len(rows) < 3:
        rows.append(idle.measure(guest, two, seconds=5.0, interval_ms=100))
    assert any(map(is_cheap, rows)), rows
