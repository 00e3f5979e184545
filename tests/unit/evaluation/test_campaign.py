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

"""What a campaign writes down, and the page that is made of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nova_pmt.cmd import campaign as command
from nova_pmt.evaluation import page, report
from nova_pmt.evaluation.campaign import Options, quantiles, summarise
from nova_pmt.evaluation.trial import Result

ROOT = Path(__file__).resolve().parents[3]
MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": ["nova-pmt-campaign", "run", "--seed", "5"],
    "kernel": "6.18",
    "qemu": "7.2.22",
    "python": "3.11",
    "nova_pmt": "1.0",
    "cpus": 2,
    "cpu_model": "some CPU",
    "load_average": [1, 2, 3],
}
KEYS = {
    *("trials", "failovers", "answered", "lost", "repeated", "broken_connections"),
    *("image_mismatches", "seed"),
}
RESULTS = [
    Result(1, "qemu", 0.5, winner="standby", answered=100, records=100, failover_ms=80.0),
    Result(2, "worker", 0.5, winner="primary", answered=50, records=150, silence_ms=300.0),
    Result(3, "host", 0.5, winner="standby", answered=25, records=170, lost=5, failover_ms=1200.0),
]


def summary(*, negative: bool = False, **more: Any) -> dict[str, Any]:
    options = Options(trials=3, seed=5, kinds=("qemu", "worker", "host"), negative=negative)
    facts = {"guests": 1, "void": [], "stopped": "", "seconds": 90.0, **more}
    return summarise(RESULTS, options, MACHINE, **facts)


def test_the_summary_has_the_keys_that_are_asked_for() -> None:
    found = summary()
    assert set(found) >= KEYS
    assert {key: found[key] for key in sorted(KEYS)} == {
        "answered": 175,
        "broken_connections": 0,
        "failovers": 2,
        "image_mismatches": 0,
        "lost": 5,
        "repeated": 0,
        "seed": 5,
        "trials": 3,
    }
    assert found["trials_with_loss"] == 1
    assert found["kinds"]["worker"]["failovers"] == 0
    assert found["failover_ms"]["max"] == 1200.0
    json.dumps(found, allow_nan=False)


def test_a_campaign_without_a_trial_has_a_summary() -> None:
    found = summarise([], Options(trials=1, seed=1), MACHINE, seconds=1.0, stopped="interrupted")
    assert (found["trials"], found["lost"], found["failover_ms"]) == (0, 0, None)


def test_quantiles_are_of_what_is_known() -> None:
    assert quantiles([None]) is None
    assert quantiles([None, 1.0, 3.0]) == {"p50": 2.0, "p90": 2.8, "p99": 3.0, "max": 3.0}


@pytest.mark.parametrize(
    "wrong",
    [
        *("lost", "repeated", "unexplained", "broken_connections", "image_mismatches"),
        *("image_check_errors", "disks_unlike_memory", "two_survivors"),
    ],
)
def test_a_trial_with_anything_wrong_is_not_clean(wrong: str) -> None:
    assert Result(1, "qemu", 0.5).clean
    assert not Result(1, "qemu", 0.5, **{wrong: 1}).clean  # type: ignore[arg-type]


def write(path: Path, found: dict[str, Any]) -> Path:
    path.write_text(json.dumps(found))
    return path


def test_figures_seed_machine_and_command_are_on_the_page(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "output-commit-negative.json", summary(negative=True)),
        write(tmp_path / "output-commit.json", summary(void=["x"], stopped="interrupted")),
    ]
    text = page.page(files)
    assert "| requests answered | 175 |" in text
    assert "**5**" in text
    assert "`nova-pmt-campaign run --seed 5`, 2026-01-02; 2 CPUs (some CPU)" in text
    assert "It ended early: interrupted." in text
    assert text.index("## 3 trials: seed 5") < text.index("## Without holding packets: seed 5")


def test_the_page_of_the_documentation_is_made_of_its_data() -> None:
    data = sorted((ROOT / page.DATA).glob(page.PATTERN))
    if data:
        assert (ROOT / page.PAGE).read_text() == page.page(data)


def test_the_page_command_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, made = write(tmp_path / "a.json", summary()), tmp_path / "page.md"
    assert command.main(["page", str(data), "--output", str(made)]) == 0
    assert made.read_text() == page.page([data])
    assert command.main(["page", str(write(tmp_path / "b.json", {})), "--output", str(made)]) == 1
    assert "no results of a campaign" in capsys.readouterr().err


def test_the_documented_command_is_understood() -> None:
    args = command.make_parser().parse_args(
        ["run", "--trials", "20", "--seed", "1", "--kinds", "host,qemu", "--negative"]
    )
    assert (args.trials, args.seed, args.kinds, args.negative) == (20, 1, ("qemu", "host"), True)
    assert command.make_parser().parse_args(["run"]).trials == 500


@pytest.mark.parametrize(
    "arguments", [[], ["run", "--kinds", "qemu,all"], ["run", "--trials", "0"], ["run", "--x"]]
)
def test_bad_arguments_are_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert "usage: nova-pmt-campaign" in capsys.readouterr().err


def test_progress_off_a_terminal_tells_what_is_wrong_and_how_it_goes() -> None:
    out = io.StringIO()
    with report.Report(Console(file=out), 10, negative=False) as progress:
        for number in range(1, 11):
            progress.trial(Result(number, "qemu", 0.5, winner="standby", answered=10))
        progress.trial(Result(11, "host", 0.5, lost=1, problems=["(1, 2) was answered 3"]))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("10 of 10: 10 failovers, 100 answered, 0 lost")
    assert lines[1] == "trial 11 (host): (1, 2) was answered 3"


def test_the_table_has_a_line_for_each_kind() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(report.table(summary()))
    assert "worker" in out.getvalue()
    assert "175 answered, 5 lost" in out.getvalue()
