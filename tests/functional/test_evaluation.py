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

"""``nova-pmt-eval run --quick`` on real guests: all is measured, and what must be so is so.

How fast anything is says nothing here; that is for the results page.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nova_pmt.cmd import evaluate
from nova_pmt.evaluation.study import matrix, peers
from nova_pmt.evaluation.study.cell import PLAIN, UNPROTECTED
from nova_pmt.evaluation.study.figures import Table
from nova_pmt.evaluation.study.matrix import QUICK


@pytest.mark.timeout(600)
def test_the_quick_evaluation_measures_all(tmp_path: Path) -> None:
    assert evaluate.main(["run", "--quick", "--directory", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failures"] == []
    rows = matrix.read(tmp_path / "rows.csv")
    assert summary["complete"]
    plain = [row for row in rows if row["strategy"] not in peers.NAMES]
    assert len(plain) == len(QUICK.scenarios) * (2 + 2 * len(QUICK.strategies))
    table, link = Table(summary["figures"]), QUICK.links_mbit[0]
    for scenario in QUICK.scenarios:
        assert table.mean(scenario, UNPROTECTED, link, "pause_p50_ms") is None
        for strategy in QUICK.strategies:
            assert table.mean(scenario, strategy, link, "mbit_per_s") is not None
            # A client waits for all that the standby does, and for its own TCP.
            waited = table.mean(scenario, strategy, link, "failover_ms")
            assert waited is not None
            assert waited >= (table.mean(scenario, strategy, link, "activation_ms") or 0)
            if scenario != "idle":
                share = table.mean(scenario, strategy, link, "throughput_ratio")
                assert share is not None
                assert share > 0
        for peer in peers.NAMES:
            assert table.mean(scenario, peer, link, "pause_p50_ms") is not None
        # Copying everything takes longer than copying what a checkpoint has.
        everything = table.mean(scenario, "stop-and-copy", link, "pause_p50_ms") or 0
        assert everything > (table.mean(scenario, "memcpy", link, "pause_p50_ms") or 0)
    # Without codecs nearly all that was written is sent.
    assert (table.mean("web", PLAIN, link, "sent_per_dirty_byte") or 0) > 0.9
    assert (table.mean("web", "pmt", link, "sent_per_dirty_byte") or 1) < 0.9
    # Rounds are what a strategy decides: an interval, output, or neither.
    assert (table.mean("idle", "kemari", link, "rounds_per_s") or 0) < (
        table.mean("idle", "pmt", link, "rounds_per_s") or 0
    )
    assert (table.mean("database", "kemari", link, "rounds_per_s") or 0) > 1
    # Kemari's pause contains its commit; the others' does not.
    for scenario in ("web", "database"):
        pause = table.mean(scenario, "kemari", link, "pause_p50_ms")
        commit = table.mean(scenario, "kemari", link, "commit_p50_ms")
        assert pause is not None
        assert commit is not None
        assert pause > commit
    assert (tmp_path / "cache.csv").stat().st_size > 0
    assert (tmp_path / "evaluation-mbit_per_s.svg").exists()
