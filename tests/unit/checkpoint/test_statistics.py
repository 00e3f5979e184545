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

"""Figures for people come from the last rounds, in the units that they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nova_pmt.checkpoint.statistics import RING, RoundRecord, Statistics, percentiles


def record(
    epoch: int,
    pause_us: float = 1000.0,
    pages: int = 10,
    log_bytes: int = 0,
    output_us: float = 0.0,
) -> RoundRecord:
    return RoundRecord(
        epoch=epoch,
        started_s=float(epoch),
        pause_us=pause_us,
        stop_us=100,
        scan_us=200,
        copy_us=300,
        save_us=400,
        cont_us=50,
        pages=pages,
        pause_pages=3,
        commit_us=2500,
        device_bytes=40_000,
        log_bytes=log_bytes,
        output_us=output_us,
    )


def test_nothing_yet_is_zeros() -> None:
    summary = Statistics().summary()
    assert summary["rounds"] == 0
    assert summary["pause_ms"] == {"p50": 0.0, "p99": 0.0, "max": 0.0, "mean": 0.0, "last": 0.0}
    assert summary["pages"]["last"] == 0
    assert summary["output_delay_ms"] == {"p50": 0.0, "p99": 0.0, "max": 0.0, "mean": 0.0}
    assert summary["log_bytes_total"] == 0


def test_summary_is_in_milliseconds_and_pages() -> None:
    statistics = Statistics()
    for epoch in range(1, 101):
        statistics.add(record(epoch, pause_us=epoch * 100.0, pages=epoch))
    summary = statistics.summary()
    assert summary["rounds"] == 100
    assert summary["pause_ms"]["p50"] == pytest.approx(5.05)
    assert summary["pause_ms"]["p99"] == pytest.approx(9.901)
    assert summary["pause_ms"]["max"] == summary["pause_ms"]["last"] == 10.0
    assert summary["pause_ms"]["mean"] == pytest.approx(5.05)
    assert summary["pause_steps_ms"] == {
        "stop": 0.1,
        "scan": 0.2,
        "copy": 0.3,
        "save": 0.4,
        "wait": 0.0,
        "cont": 0.05,
    }
    pages = summary["pages"]
    assert (pages["p50"], pages["last"], pages["total"]) == (50.5, 100, 5050)
    assert pages["in_pause_p50"] == 3.0
    assert summary["commit_ms"]["p50"] == 2.5


def test_output_delay_leaves_out_rounds_that_held_nothing() -> None:
    statistics = Statistics()
    for epoch in range(1, 101):
        statistics.add(record(epoch, output_us=epoch * 1000.0 if epoch % 2 else 0.0))
    delay = statistics.summary()["output_delay_ms"]
    assert (delay["p50"], delay["mean"], delay["max"]) == (50.0, 50.0, 99.0)


def test_logs_count_for_ever() -> None:
    statistics = Statistics()
    for epoch in range(1, RING + 6):
        statistics.add(record(epoch, log_bytes=512))
    assert statistics.summary()["log_bytes_total"] == 512 * (RING + 5)


def test_only_the_last_rounds_count_but_totals_count_all() -> None:
    statistics = Statistics()
    statistics.add(record(1, pause_us=1e9))
    for epoch in range(2, RING + 2):
        statistics.add(record(epoch))
    assert statistics.column("pause_us").max() == 1000
    assert len(statistics.column("epoch")) == RING
    assert statistics.rounds == RING + 1
    assert statistics.pages_total == 10 * (RING + 1)


def test_every_figure_of_a_record_has_a_column() -> None:
    statistics = Statistics()
    statistics.add(record(7))
    for field in dataclasses.fields(RoundRecord):
        assert statistics.column(field.name)[0] == getattr(record(7), field.name)


def test_percentiles_scale() -> None:
    assert percentiles(np.array([1.0, 3.0]), 1e3)["mean"] == 2000.0
