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

"""Slopes that were put in are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_pmt.bench import page, slopes
from tests.unit.bench.test_page import HEADER


def row(memory_mib: int, pages: int, above_ms: float, plain_ms: float = 9.0) -> dict[str, Any]:
    times = {"p50": 5.0, "p99": 6.0, "max": 7.0}
    return {
        "memory_mib": memory_mib, "dirty_pages": pages, "pages_in_pause": 1, "rounds": 100,
        "floor_ms": times, "pause_ms": {**times, "p50": 5.0 + above_ms},
        "plain_ms": {**times, "p50": 5.0 + plain_ms}, "ratio": 1.1, "ratio_p99": 1.1,
        "plain_ratio": 2.0,
    }  # fmt: skip


def rows(us_per_page: float, ms_per_gib: float) -> list[dict[str, Any]]:
    return [
        row(mib, pages, 0.5 + us_per_page * pages / 1e3 + ms_per_gib * mib / 1024, pages / 1e2)
        for mib in (128, 4096, 8192)
        for pages in (100, 5000, 40_000)
    ]


@given(st.floats(0.01, 5), st.floats(0.01, 5))
def test_what_was_put_in_is_found(us_per_page: float, ms_per_gib: float) -> None:
    found = slopes.fit(rows(us_per_page, ms_per_gib), "pause_ms")
    assert found is not None
    assert found.us_per_page == pytest.approx(us_per_page, rel=1e-3)
    assert found.ms_per_gib == pytest.approx(ms_per_gib, rel=1e-3)
    assert found.explained == pytest.approx(1.0)


@pytest.mark.parametrize(
    "few",
    [rows(1, 1)[:3], [row(128, pages, 1.0) for pages in range(100, 900, 100)], []],
    ids=["three rows", "one size of guest", "none"],
)
def test_where_the_rows_do_not_tell_there_are_no_slopes(few: list[dict[str, Any]]) -> None:
    assert slopes.fit(few, "pause_ms") is None


@pytest.mark.parametrize(("us_per_page", "verdict"), [(0.4, "yes"), (1.4, "no")])
def test_the_page_has_slopes_and_their_picture(
    tmp_path: Path, us_per_page: float, verdict: str
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "pause.json"
    header = {**HEADER, "benchmark": "pause"}
    path.write_text(json.dumps({"header": header, "rows": rows(us_per_page, 0.5)}))
    text = page.page([path], tmp_path)
    assert f"- {us_per_page:.3f}\n     - 0.500\n     - 1.00\n     - {verdict}\n" in text
    assert ".. image:: pause.svg" in text
    assert (tmp_path / "pause.svg").stat().st_size > 1000
    assert ".. image::" not in page.page([path])
