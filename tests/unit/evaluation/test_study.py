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

"""The evaluation's figures, findings, page and files, from rows that are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.cmd import evaluate
from nova_pmt.evaluation.study import (
    cell,
    figures,
    matrix,
    page,
    peers,
    peers_inside,
    plots,
    scenarios,
)
from nova_pmt.evaluation.study.cell import PLAIN
from nova_pmt.evaluation.study.figures import Table
from nova_pmt.evaluation.study.findings import findings, link_name
from nova_pmt.evaluation.study.matrix import Options, Study


def row(
    scenario: str, strategy: str, link: int = 1000, repeat: int = 1, **figures_: Any
) -> dict[str, Any]:
    return {
        "scenario": scenario,
        "strategy": strategy,
        "link_mbit": link,
        "repeat": repeat,
        "per_s": 100.0,
        "rounds": 100,
        **figures_,
    }


def table(*rows: dict[str, Any]) -> Table:
    return Table(figures.summarise(rows))


def verdict(found: Table, words: str) -> bool | None:
    matching = [one for one in findings(found) if words in one.statement]
    assert len(matching) == 1, [one.statement for one in findings(found)]
    return matching[0].holds


# -- figures ---------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_the_mean_lies_within_its_interval(values: list[float]) -> None:
    mean, low, high = figures.interval(values)
    assert low <= mean <= high
    if len(set(values)) == 1:
        assert high - low <= 1e-6 * max(1.0, mean)


def test_the_interval_is_students() -> None:
    # scipy.stats.t.interval(0.95, 2, 2.0, scipy.stats.sem([1, 2, 3])): -0.484 to 4.484
    assert figures.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)


def test_ratios_are_those_of_the_same_repeat() -> None:
    rows = []
    for repeat, (plain, protected) in enumerate([(100.0, 50.0), (1000.0, 500.0)], 1):
        rows.append(row("web", "unprotected", repeat=repeat, per_s=plain, latency_p50_ms=1.0))
        rows.append(row("web", "pmt", repeat=repeat, per_s=protected, latency_p50_ms=20.0))
    found = table(*rows)
    entry = found.entry("web", "pmt", 1000, "throughput_ratio")
    assert (entry["mean"], entry["low"], entry["high"], entry["n"]) == (0.5, 0.5, 0.5, 2)
    assert found.mean("web", "pmt", 1000, "latency_ratio") == 20.0
    assert found.mean("web", "unprotected", 1000, "throughput_ratio") is None
    assert found.strategies == ["pmt"]


def test_what_was_not_there_is_no_figure() -> None:
    found = table(row("idle", "kemari", output_delay_p50_ms=None, per_s=0.0))
    assert found.mean("idle", "kemari", 1000, "output_delay_p50_ms") is None


# -- findings ----------------------------------------------------------------------------------


def test_published_findings_hold_or_do_not_by_the_figures() -> None:
    good = table(
        row("idle", "pmt", mbit_per_s=1.0),
        row("idle", "kemari", mbit_per_s=0.1),
        row("disk", "pmt", kib_per_work=10.0),
        row("disk", "kemari", kib_per_work=20.0),
        row("heavy", "pmt", pause_p50_ms=5.0),
        row("heavy", "kemari", pause_p50_ms=41.0),
    )
    assert verdict(good, "Kemari sends less than PMT") is True
    assert verdict(good, "disk: PMT sends less") is True
    assert verdict(good, "at most 1/8") is True
    assert verdict(good, "heavy: PMT's pause is shorter") is True
    assert verdict(good, "idle: PMT's pause is shorter") is None
    bad = table(
        row("idle", "pmt", mbit_per_s=0.1),
        row("idle", "kemari", mbit_per_s=1.0),
        row("heavy", "pmt", pause_p50_ms=5.2),
        row("heavy", "kemari", pause_p50_ms=41.0),
    )
    assert verdict(bad, "Kemari sends less than PMT") is False
    assert verdict(bad, "at most 1/8") is False


@pytest.mark.parametrize(("auto", "holds"), [(1.1, True), (1.11, False)])
def test_auto_is_compared_with_the_better_of_both(auto: float, holds: bool) -> None:
    found = table(
        row("web", "pmt", kib_per_work=1.0, pause_p50_ms=2.0, output_delay_p50_ms=9.0),
        row("web", "kemari", kib_per_work=5.0, pause_p50_ms=1.0, output_delay_p50_ms=3.0),
        row("web", "auto", kib_per_work=auto, pause_p50_ms=auto, output_delay_p50_ms=3.0),
    )
    assert verdict(found, "better of both (KiB") is holds
    assert verdict(found, "better of both (pause") is holds
    assert verdict(found, "above neither's") is True


def test_a_few_rounds_and_a_missing_rival_decide_nothing() -> None:
    few = table(
        row("web", "pmt", pause_p50_ms=1.0), row("web", "kemari", pause_p50_ms=9.0, rounds=5)
    )
    assert verdict(few, "web: PMT's pause is shorter") is None
    alone = table(row("web", "pmt", kib_per_work=9.0), row("web", "auto", kib_per_work=1.0))
    assert verdict(alone, "better of both (KiB") is None


def test_half_of_the_database_is_asked_for_on_each_link() -> None:
    rows = [row("database", "unprotected", link, per_s=100.0) for link in (100, 0)]
    rows += [row("database", "pmt", 100, per_s=49.0), row("database", "pmt", 0, per_s=50.0)]
    found = {one.statement: one.holds for one in findings(table(*rows)) if "half" in one.statement}
    assert sorted(found.values()) == [False, True]


@pytest.mark.parametrize(("sent", "commit", "holds"), [(0.35, 4.0, True), (0.36, 4.1, False)])
def test_codecs_are_to_pay(sent: float, commit: float, holds: bool) -> None:
    found = table(
        row("web", "pmt", sent_per_dirty_byte=sent, commit_p50_ms=commit),
        row("web", PLAIN, sent_per_dirty_byte=1.0, commit_p50_ms=4.0),
    )
    assert verdict(found, "bytes for a dirty byte") is holds
    assert verdict(found, "commits take no longer") is holds


def test_links_have_names() -> None:
    assert [link_name(mbit) for mbit in (100, 1000, 2500, 0)] == [
        "100 Mbit/s", "1 Gbit/s", "2500 Mbit/s", "no limit",
    ]  # fmt: skip


# -- what is measured --------------------------------------------------------------------------


def test_what_is_compared_is_measured_one_after_the_other() -> None:
    options = Options(
        scenarios=("web", "idle"), links_mbit=(100, 0), repeats=2, peers=False, failovers=False
    )
    places = [tuple(place.facts().values()) for place in options.places()]
    assert {place[1] for place in places[:4]} == {"unprotected", "pmt", "kemari", "auto"}
    assert [(place[0], place[2], place[3]) for place in places[:5]] == [
        *[("idle", 100, 1)] * 4,
        ("web", 100, 1),
    ]
    assert len({place[1] for place in places[::4]}) > 1, "one strategy is always the first"
    assert len(places) == len(set(places)) == 2 * 2 * 2 * 4


def test_failovers_come_last_of_a_scenario_on_the_first_link() -> None:
    options = Options(scenarios=("web",), links_mbit=(100, 0), repeats=1)
    places = [
        (place.facts()["strategy"], place.link_mbit, place.failover) for place in options.places()
    ]
    assert places[4] == ("peers", 100, False)
    assert places[5:8] == [(name, 100, True) for name in ("pmt", "kemari", "auto")]
    assert not any(failover for _, _, failover in places[8:])


def test_pmt_without_codecs_is_measured_where_it_is_compared() -> None:
    options = Options(scenarios=("web",), links_mbit=(100, 1000), repeats=1, peers=False)
    places = [place.facts() for place in options.places()]
    assert [one["link_mbit"] for one in places if one["strategy"] == PLAIN] == [1000]


def test_peers_are_measured_once_for_each_scenario_when_pmt_was() -> None:
    options = Options(scenarios=("web", "idle"), links_mbit=(100, 0), repeats=2)
    places = [tuple(place.facts().values()) for place in options.places()]
    found = [number for number, place in enumerate(places) if place[1] == "peers"]
    assert [places[number][0] for number in found] == ["idle", "web"] * 2
    for number in found:
        assert places[number][2] == 100
        assert (places[number][0], "pmt", *places[number][2:]) in places[number - 4 : number]


@pytest.mark.parametrize("pages", [None, 120])
def test_a_peer_that_cannot_do_it_is_told_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, pages: int | None
) -> None:
    asked = []

    class Played:
        def __init__(self, *_what: object) -> None: ...

        def __enter__(self) -> Played:
            return self

        def __exit__(self, *_exc: object) -> None: ...

        def ask(self, request: dict[str, Any]) -> dict[str, Any]:
            asked.append(request["peer"])
            if request["peer"] == "snapshot":
                return {"pauses_ms": [], "why": "no room"}
            return {"pauses_ms": [3.0, 1.0, 2.0]}

    monkeypatch.setattr(peers, "Child", Played)
    scenario = scenarios.Scenario("web", "", "", lambda *_: scenarios.Work(1.0))
    place = cell.Place(scenario, peers.PEERS, 1000, 1)
    guest: Any = SimpleNamespace(host=None, uuid="")
    rows, failures = peers.measure(place, guest, 0.1, pages)
    assert asked == [name for name in peers.NAMES if pages or name != "memcpy"]
    assert [one["strategy"] for one in rows] == [one for one in asked if one != "snapshot"]
    assert {one["pause_p50_ms"] for one in rows} == {2.0}
    (failure,) = failures
    assert (failure["strategy"], failure["why"]) == ("snapshot", "no room")


def test_copying_pages_takes_the_longer_the_more_there_are() -> None:
    assert 0 < peers_inside.memcpy(10) < peers_inside.memcpy(2_000)


def test_the_page_has_peers_beside_the_pause() -> None:
    found = table(
        row("web", "pmt", pause_p50_ms=4.0),
        row("web", "unprotected"),
        {**row("web", "memcpy", pause_p50_ms=1.0), "per_s": None},
        {name: value for name, value in row("web", "snapshot", pause_p50_ms=200.0).items()
         if name != "per_s"},
    )  # fmt: skip
    assert found.strategies == ["pmt"] and found.peers == ["memcpy", "snapshot"]
    text = page._peers(found)
    assert "| scenario | pmt | memcpy | snapshot |" in text
    assert "| web | 4 | 1 (0.25 x) | 200 (50 x) |" in text


def test_what_was_not_measured_anywhere_is_an_empty_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = plots.draw(table(row("idle", "pmt", mbit_per_s=1.0)), tmp_path)
    assert all(path.exists() for path in made)


def test_a_scenario_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no scenario 'wev'; there are build, database"):
        scenarios.named(["wev"])


def stats(rounds: int, paused_s: float, pages: int, sent: int) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "throttled_rounds": 0,
        "pages": {"total": pages},
        "log_bytes_total": 0,
        "sent_bytes": sent,
        "histograms": {"pause_seconds": {"sum": paused_s}},
        "pause_ms": {"p50": 5.0, "p99": 9.0, "max": 11.0},
        "commit_ms": {"p50": 2.0},
        "output_delay_ms": {"p50": 0.0, "p99": 0.0},
        "network": [{"dropped_packets": rounds // 10}],
    }


def test_a_row_is_the_difference_over_the_measurement() -> None:
    found = cell._rounds(stats(10, 0.1, 1000, 0), stats(110, 0.6, 3000, 4_096_000), 10.0)
    assert found["rounds_per_s"] == 10
    assert found["pause_mean_ms"] == 5
    assert found["paused_share"] == 0.05
    assert found["pages_per_round"] == 20
    assert found["sent_per_dirty_byte"] == 0.5
    assert found["mbit_per_s"] == pytest.approx(3.277, abs=1e-3)
    assert found["output_delay_p50_ms"] is None  # there was no output
    assert found["dropped_packets"] == 10
    assert found["rounds"] == 100


def test_without_rounds_there_is_no_pause() -> None:
    same = stats(10, 0.1, 1000, 5)
    found = cell._rounds(same, same, 5.0)
    assert found["pause_mean_ms"] is found["pages_per_round"] is None
    assert found["sent_per_dirty_byte"] is None
    assert found["paused_share"] == 0


# -- files -------------------------------------------------------------------------------------


class NoReport:
    def note(self, text: str) -> None: ...


@pytest.fixture
def study(tmp_path: Path) -> Study:
    made = Study(Options(repeats=1), tmp_path, NoReport())  # type: ignore[arg-type]
    made.rows = [
        row(name, strategy, mbit_per_s=2.0, pause_p50_ms=3.0, output_delay_p50_ms=4.0)
        for name in ("idle", "web")
        for strategy in ("unprotected", "pmt", "kemari", "auto")
    ]
    made.failures = [{**row("disk", "kemari"), "why": "it broke"}]
    return made


MACHINE = {
    "command": ["nova-pmt-eval", "run"], "date": "2026-11-27T00:00:00", "cpus": 2,
    "cpu_model": "x", "kernel": "6.12", "qemu": "7.2", "python": "3.11",
    "load_average": [0.1, 0.2, 0.3],
}  # fmt: skip


def test_the_summary_has_an_entry_for_each_figure(study: Study, tmp_path: Path) -> None:
    study.write(MACHINE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    entry = summary["figures"][0]
    assert {"scenario", "strategy", "figure", "mean", "low", "high"} <= entry.keys()
    assert "link_mbit" in entry
    assert summary["options"]["repeats"] == 1


def test_rows_are_read_as_they_were_written(study: Study, tmp_path: Path) -> None:
    with study._files() as write:
        for one in study.rows:
            write({**one, "cache_mib": [1.0, 2.0]})
    found = matrix.read(tmp_path / "rows.csv")
    assert [one["mbit_per_s"] for one in found] == [2.0] * 8
    assert found[0]["pause_p99_ms"] is None
    assert sorted(map(str, figures.summarise(found))) == sorted(
        map(str, figures.summarise(study.rows))
    )
    lines = list(csv.reader((tmp_path / "cache.csv").open()))
    assert lines[1] == ["idle", "unprotected", "1000", "1", "0", "1.0"]
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no rows"):
        matrix.read(tmp_path / "rows.csv")


def test_the_page_says_what_held_and_what_could_not_be_measured(
    study: Study, tmp_path: Path
) -> None:
    text = page.page(study.write(MACHINE))
    assert "idle: Kemari sends less than PMT at a fixed interval (Mbit/s)" in text
    assert "| web | kemari |" in text
    assert "it broke" in text
    for part in text.split("\n\n"):  # every row of a table has as many cells as its head
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, lines


def test_the_command_makes_the_page_and_its_pictures(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    study.write(MACHINE)
    output = tmp_path / "doc" / "evaluation.md"
    output.parent.mkdir()
    assert evaluate.main(["page", str(tmp_path / "summary.json"), "--output", str(output)]) == 0
    pictures = {f"evaluation-{figure}.svg" for figure, _, _ in plots.PLOTS}
    assert pictures <= {path.name for path in output.parent.iterdir()}
    assert all(f"({name})" in output.read_text() for name in pictures)
    (tmp_path / "other.json").write_text("{}")
    assert evaluate.main(["page", str(tmp_path / "other.json"), "--output", str(output)]) == 1
    assert "no result of an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--scenarios", "x"], ["--links", "a"], ["--links", "-1"], ["--repeats", "0"],
     ["--strategies", "pmt,none"]],
)  # fmt: skip
def test_what_cannot_be_measured_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["run", *words])
    assert caught.value.code == 2


class Broken(Study):
    """Nothing can be booted."""

    def run(self) -> None:
        raise exception.LabError("no libvirtd")


def test_a_lab_that_fails_is_told_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "Study", Broken)
    monkeypatch.setattr("nova_pmt.bench.environment.qemu_version", lambda: "7.2")
    assert evaluate.main(["run", "--quick", "--directory", str(tmp_path)]) == 1
    assert "no libvirtd" in capsys.readouterr().err
