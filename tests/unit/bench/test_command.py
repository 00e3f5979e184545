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

"""The command line of nova-pmt-bench, and what it prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nova_pmt.bench import report
from nova_pmt.cmd import bench
from tests.unit.bench.test_rows import row


def test_the_documented_command_is_understood() -> None:
    args = bench.make_parser().parse_args(
        ["pause", "--memory", "128,4096", "--dirty", "1000,5000,20000", "--json", "x.json"]
    )
    assert args.memory == (128, 4096)
    assert args.dirty == (1000, 5000, 20000)
    assert (args.rounds, args.passes, args.threads) == (150, 2, 0)


@pytest.mark.parametrize(
    "arguments",
    [[], ["pause", "--memory", "a"], ["pause", "--dirty", "0"], ["qmp", "--rounds", "1"]],
)
def test_bad_arguments_are_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.make_parser().parse_args(arguments)
    assert caught.value.code == 2
    assert "usage: nova-pmt-bench" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "word"), [("pause", "floor"), ("qmp", "qemu.qmp")])
def test_help_says_what_is_compared(
    command: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.make_parser().parse_args([command, "--help"])
    assert word in capsys.readouterr().out


def test_the_table_shows_ratios_of_each_row() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(report.pause_table([row([2.2], [2.0])]))
    assert "1.10" in out.getvalue()
    assert "128 MiB" in out.getvalue()


def test_progress_off_a_terminal_is_one_line_for_each_label() -> None:
    out = io.StringIO()
    with report.Report(Console(file=out)) as progress:
        progress.note("booting")
        for done in range(5):
            progress.progress("128 MiB, 1000 pages", done, 5)
    assert out.getvalue().splitlines() == ["booting", "128 MiB, 1000 pages"]


def test_without_nova_the_filter_benchmark_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench.main(["filter"]) == 1
    told = capsys.readouterr().err
    assert "[NOVA_MISSING]" in told
    assert "cure: " in told
