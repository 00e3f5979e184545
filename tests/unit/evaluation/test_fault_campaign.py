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

"""What a fault campaign writes down, when faults end, and what counts as left over."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nova_pmt import faultpoint
from nova_pmt.cmd import campaign as command
from nova_pmt.evaluation import report
from nova_pmt.evaluation.campaign import Options, summarise
from nova_pmt.evaluation.faultcampaign import NEGATIVES, FaultCampaign, gaps, of_faults
from nova_pmt.evaluation.faults import KINDS, Fault
from nova_pmt.evaluation.faulttrial import PATIENCE_S, FaultResult, FaultTrial
from nova_pmt.evaluation.injection import Strike
from nova_pmt.evaluation.leftovers import is_program
from nova_pmt.evaluation.timeline import Event

RESULTS = [
    FaultResult(1, "qemu-kill", 0.5, faults=["qemu-kill primary"], silence_ms=100.0, answered=9),
    FaultResult(2, "step", 0.5, faults=["step"], steps=["round.sent"], silence_ms=300.0),
    FaultResult(
        3,
        "two",
        0.5,
        faults=["qemu-kill standby", "database-lock"],
        silence_ms=None,
        split_brain=2,
        early_releases=1,
        leftovers=3,
    ),
]


def summary() -> dict[str, Any]:
    options = Options(trials=3, seed=5, kinds=KINDS)
    facts: dict[str, Any] = {"guests": 1, "void": [], "stopped": "", "seconds": 9.0}
    return {
        **summarise(RESULTS, options, {"cpus": 2}, also=FaultCampaign.sums, **facts),
        **of_faults(RESULTS),
        "skipped": {"repl-delay": "no netem"},
        "without": "",
        "managers": 2,
        "database": "SQLite",
    }


def test_the_summary_has_the_keys_that_are_asked_for() -> None:
    found = summary()
    assert (found["split_brain"], found["early_releases"], found["leftovers"]) == (2, 1, 3)
    assert found["unrecovered"] == 0
    assert found["faults"] == {
        "kinds": {"database-lock": 1, "qemu-kill": 2, "step": 1},
        "steps": {"round.sent": 1},
    }
    assert found["gap_ms"] == {"p50": 200.0, "p99": 298.0, "max": 300.0}
    assert found["kinds"]["two"]["trials"] == 1
    json.dumps(found, allow_nan=False)


def test_a_campaign_without_a_trial_has_a_summary() -> None:
    empty = {"faults": {"kinds": {}, "steps": {}}, "gap_ms": None, "gaps": {}}
    assert of_faults([]) == empty


def test_gaps_are_told_by_fault_and_side_of_trials_with_one_fault() -> None:
    def result(*names: str, gap: float | None, steps: tuple[str, ...] = ()) -> FaultResult:
        return FaultResult(1, "x", 0.5, silence_ms=gap, faults=list(names), steps=list(steps))

    found = gaps(
        [
            result("repl-one-way primary in", gap=100.0),
            result("repl-one-way primary out", gap=300.0),
            result("host-kill primary", gap=400.0),
            result("host-kill primary silent", gap=900.0),
            result("qemu-kill primary", "rabbit-kill", gap=1.0),
            result("step primary round.sent", gap=2.0, steps=("round.sent",)),
            result("managers-kill", gap=None),
        ]
    )
    assert list(found) == ["host-kill primary", "host-kill primary silent", "repl-one-way primary"]
    row = found["repl-one-way primary"]
    assert (row["trials"], row["p50"], row["max"]) == (2, 200.0, 300.0)


def test_a_summary_can_be_made_again_from_its_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = summary()
    lines = [json.dumps(result.to_dict()) for result in RESULTS]
    (tmp_path / "trials.jsonl").write_text("\n".join(lines) + "\n")
    left_out = {key: value for key, value in old.items() if key not in ("gaps", "gap_ms")}
    (tmp_path / "summary.json").write_text(json.dumps(left_out))
    assert command.main(["summarise", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(old))
    (tmp_path / "trials.jsonl").write_text('{"trial": 1}\n')
    assert command.main(["summarise", str(tmp_path)]) == 1
    assert "no results of a campaign" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", ["lost", "split_brain", "early_releases", "leftovers", "unrecovered"]
)
def test_a_trial_with_anything_wrong_is_not_clean(wrong: str) -> None:
    assert FaultResult(1, "two", 0.5).clean
    assert not FaultResult(1, "two", 0.5, **{wrong: 1}).clean  # type: ignore[arg-type]


def test_the_line_and_the_table_tell_what_was_done_and_what_was_wrong() -> None:
    out = io.StringIO()
    with report.Report(Console(file=out), 3, negative=False, short=False) as progress:
        progress.trial(RESULTS[0])
    assert out.getvalue().startswith("trial 1: qemu-kill primary: nobody went on alone")
    Console(file=out, width=300).print(report.table(summary(), "Faults"))
    assert "Faults, seed 5" in out.getvalue()
    words = " ".join(out.getvalue().split())
    assert "2 outputs of two hosts, 1 epochs released early, 3 things left over" in words


def test_the_page_has_sums_faults_and_what_was_left_out(tmp_path: Path) -> None:
    data, made = tmp_path / "faults.json", tmp_path / "faults.md"
    machine = {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["nova-pmt-campaign", "faults", "--seed", "5"],
        **dict.fromkeys(("kernel", "qemu", "python", "nova_pmt", "cpu_model"), "x"),
        "cpus": 2,
        "load_average": [1, 2, 3],
    }
    data.write_text(json.dumps({**summary(), "machine": machine, "void": ["trial 9 (two): x"]}))
    assert command.main(["page", "--faults", str(data), "--output", str(made)]) == 0
    text = made.read_text()
    assert "| **outputs of two hosts** | **2** |" in text
    assert "| `qemu-kill` | 2 |" in text
    assert "| died at `round.sent` | 1 |" in text
    assert "Not done: `repl-delay`: no netem" in text
    assert "1 trials do not count" in text
    assert "2 managers over SQLite" in text
    assert "## All together" not in text
    assert command.main(["page", "--faults", *[str(data)] * 2, "--output", str(made)]) == 0
    text = made.read_text()
    assert "| **outputs of two hosts** | 4 |" in text
    assert "## Without" not in text
    negative = tmp_path / "faults-negative.json"
    negative.write_text(json.dumps({**json.loads(data.read_text()), "without": "no-arbiter"}))
    files = [str(negative), str(data), str(data)]
    assert command.main(["page", "--faults", *files, "--output", str(made)]) == 0
    text = made.read_text()
    assert text.index("## Without") > text.index("## 3 trials")
    assert "`NOVA_PMT_UNSAFE=no-arbiter`" in text
    assert "| **outputs of two hosts** | 4 |" in text
    assert (
        f"1 of {len(faultpoint.WORKER_STEPS)} named steps were died at, none at `sync.prelude`"
        in text
    )


def test_a_negative_must_find_what_it_looks_for(tmp_path: Path) -> None:
    assert set(command.NEGATIVES) == set(NEGATIVES)
    for key, what in NEGATIVES.items():
        campaign = object.__new__(FaultCampaign)
        campaign._without, campaign._options = key, Options(trials=1, seed=1)
        campaign.results = [FaultResult(1, "repl-cut", 0.5)]
        assert not campaign.succeeded
        campaign.results.append(FaultResult(2, "repl-cut", 0.5, **{what: 1}))
        assert campaign.succeeded
        campaign._without = ""
        assert not campaign.succeeded


def strike(*, seconds: float = 2.0, patient: bool = False) -> Strike:
    fault = Fault("worker-stop", "primary", seconds=seconds, patient=patient)
    return Strike(fault, lambda: None, lambda: None, begun_at=100.0)


def test_a_fault_ends_after_its_time() -> None:
    assert not FaultTrial.is_over(strike(), None, 101.9)
    assert FaultTrial.is_over(strike(), None, 102.0)


def test_a_patient_one_ends_when_it_is_decided_who_goes_on_but_not_much_later() -> None:
    first = Event(103.0, "two", "run", 1, 5)
    patient = strike(patient=True)
    assert not FaultTrial.is_over(patient, None, 104.0)
    assert not FaultTrial.is_over(patient, first, 103.1)
    assert FaultTrial.is_over(patient, first, 103.3)
    assert FaultTrial.is_over(patient, None, 100.0 + PATIENCE_S)
    assert not FaultTrial.is_over(strike(seconds=5.0, patient=True), first, 104.0)


def test_a_fault_is_put_right_once() -> None:
    calls: list[str] = []
    one = Strike(Fault("worker-stop"), lambda: None, lambda: calls.append("healed"))
    assert one.lasts
    one.heal_once()
    one.heal_once()
    assert calls == ["healed"]
    assert not Strike(Fault("qemu-kill"), lambda: None).lasts


def test_programs_are_known_by_their_name_or_as_a_module() -> None:
    qemu = ["/usr/bin/qemu-system-x86_64", "-name", "guest"]
    worker = ["/venv/bin/python3", "-m", "nova_pmt.cmd.worker", "--control-fd", "5"]
    assert is_program(qemu, "qemu-system-x86_64")
    assert is_program(worker, "nova_pmt.cmd.worker")
    assert not is_program(worker, "qemu-system-x86_64")
    assert not is_program(["/usr/bin/less", "qemu-storage-daemon.log"], "qemu-storage-daemon")


def test_the_documented_command_is_understood() -> None:
    args = command.make_parser().parse_args(
        ["faults", "--trials", "30", "--seed", "1", "--kinds", "two,qemu-kill"]
    )
    assert args.negative == ""
    assert (args.command, args.trials, args.seed) == ("faults", 30, 1)
    assert args.kinds == ("qemu-kill", "two")
    assert command.make_parser().parse_args(["faults"]).kinds == KINDS
    with pytest.raises(SystemExit):
        command.main(["faults", "--kinds", "host"])
