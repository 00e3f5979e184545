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

"""The file arbiter: one survivor, whoever asks, however often, at whatever time."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.arbiter.base import Arbiter
from nova_pmt.arbiter.file import FileArbiter
from nova_pmt.arbiter.load import load

PAIR = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
OTHER = "4dea22b3-1d52-d8f3-2516-782e98ab3fa1"


def conf(directory: Path, driver: str = "file") -> Any:
    return SimpleNamespace(arbiter=SimpleNamespace(directory=str(directory), driver=driver))


@pytest.fixture
def arbiter(tmp_path: Path) -> FileArbiter:
    """One that knows of two pairs."""
    made = FileArbiter(conf(tmp_path))
    made.challenge(PAIR)
    made.challenge(OTHER)
    return made


def test_it_is_the_plug_in_of_that_name(tmp_path: Path) -> None:
    assert type(load(conf(tmp_path))) is FileArbiter
    with pytest.raises(exception.ConfigError, match="'none'"):
        load(conf(tmp_path, "none"))


@pytest.mark.parametrize("first", ["primary", "standby"])
def test_the_first_side_that_asks_wins_for_ever(arbiter: Arbiter, first: Any) -> None:
    second: Any = "standby" if first == "primary" else "primary"
    assert arbiter.winner(PAIR, 1) is None
    assert arbiter.claim(PAIR, 1, first) is True
    for _ in range(3):
        assert arbiter.claim(PAIR, 1, second) is False
        assert arbiter.claim(PAIR, 1, first) is True  # an answer that got lost is asked for again
    assert arbiter.winner(PAIR, 1) == first


def test_each_generation_of_each_pair_is_decided_for_itself(arbiter: Arbiter) -> None:
    assert arbiter.claim(PAIR, 1, "primary")
    assert arbiter.claim(PAIR, 2, "standby")
    assert arbiter.claim(PAIR, 11, "standby")
    assert arbiter.claim(OTHER, 1, "standby")
    assert arbiter.winner(PAIR, 1) == "primary"
    assert arbiter.winner(PAIR, 3) is None


def claim_at_once(directory: str, rounds: int, side: Any, start: Any, results: Any) -> None:
    own = FileArbiter(conf(Path(directory)))
    start.wait()
    results.put((side, [own.claim(PAIR, generation, side) for generation in range(rounds)]))


def test_exactly_one_side_of_many_that_ask_at_once_wins(tmp_path: Path) -> None:
    rounds, claimers = 60, 4
    FileArbiter(conf(tmp_path)).challenge(PAIR)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(claimers), context.Queue()
    processes = [
        context.Process(
            target=claim_at_once,
            args=(str(tmp_path), rounds, ("primary", "standby")[n % 2], start, results),
        )
        for n in range(claimers)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(10)
    for generation in range(rounds):
        winners = {side for side, won in answers if won[generation]}
        assert len(winners) == 1
        # all processes of a side hear the same
        for side, won in answers:
            assert won[generation] == (side in winners)
    assert len(list(tmp_path.iterdir())) == rounds + 1  # nothing is left lying about


# -- nobody to ask ----------------------------------------------------------------------


def test_a_directory_that_is_absent_decides_nothing(tmp_path: Path) -> None:
    arbiter = FileArbiter(conf(tmp_path / "not mounted"))
    for ask in (
        lambda: arbiter.claim(PAIR, 1, "primary"),
        lambda: arbiter.winner(PAIR, 1),
        lambda: arbiter.challenge(PAIR),
    ):
        with pytest.raises(exception.ArbiterUnavailable) as caught:
            ask()
        assert caught.value.code == "ARBITER_UNAVAILABLE"
        assert "directory" in caught.value.cure
    assert arbiter.answer(PAIR, "token") is False


def test_an_empty_mount_point_decides_nothing(tmp_path: Path) -> None:
    """The export is away: on each host there is an empty local directory in its place."""
    export, local = tmp_path / "export", tmp_path / "local"
    export.mkdir()
    local.mkdir()
    FileArbiter(conf(export)).challenge(PAIR)
    for side in ("primary", "standby"):
        with pytest.raises(exception.ArbiterUnavailable, match="does not hold"):
            FileArbiter(conf(local)).claim(PAIR, 1, side)
    assert FileArbiter(conf(export)).claim(PAIR, 1, "standby") is True


def test_a_directory_that_is_a_file_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    arbiter = FileArbiter(conf(tmp_path / "file"))
    for ask in (
        lambda: arbiter.claim(PAIR, 1, "primary"),
        lambda: arbiter.winner(PAIR, 1),
        lambda: arbiter.challenge(PAIR),
        lambda: arbiter.answer(PAIR, "x"),
    ):
        with pytest.raises(exception.ArbiterUnavailable):
            ask()


def test_a_claim_that_cannot_be_read_decides_nothing(arbiter: Arbiter, tmp_path: Path) -> None:
    (tmp_path / f"{PAIR}.1").write_text("nobody")
    for ask in (lambda: arbiter.winner(PAIR, 1), lambda: arbiter.claim(PAIR, 1, "primary")):
        with pytest.raises(exception.ArbiterUnavailable, match="unreadable"):
            ask()
    (tmp_path / f"{PAIR}.2").mkdir()
    with pytest.raises(exception.ArbiterUnavailable):
        arbiter.winner(PAIR, 2)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
def test_a_file_system_that_fails_decides_nothing(
    arbiter: Arbiter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(exception.ArbiterUnavailable, match="Input/output error"):
        arbiter.claim(PAIR, 1, "primary")
    monkeypatch.undo()
    assert arbiter.winner(PAIR, 1) is None
    assert {path.suffix for path in tmp_path.iterdir()} == {".challenge"}


def test_a_link_that_worked_though_its_answer_was_lost_is_a_win(
    arbiter: Arbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: the server made it, the reply was lost, the client asked again."""
    link = os.link

    def twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert arbiter.claim(PAIR, 1, "standby") is True


@pytest.mark.parametrize(
    "pair", ["", "x", "../../etc/passwd", PAIR.upper(), PAIR + "\n", PAIR + "/x", "%" + PAIR[1:]]
)
def test_what_is_no_uuid_never_becomes_a_file(arbiter: Arbiter, tmp_path: Path, pair: str) -> None:
    for ask in (
        lambda: arbiter.claim(pair, 1, "primary"),
        lambda: arbiter.winner(pair, 1),
        lambda: arbiter.challenge(pair),
        lambda: arbiter.answer(pair, "x"),
    ):
        with pytest.raises(ValueError, match="not a UUID"):
            ask()
    assert {path.suffix for path in tmp_path.iterdir()} == {".challenge"}


# -- is it the same arbiter? ------------------------------------------------------------


def test_a_token_is_seen_by_whoever_shares_the_directory(tmp_path: Path) -> None:
    one, two = FileArbiter(conf(tmp_path)), FileArbiter(conf(tmp_path))
    token = one.challenge(PAIR)
    assert two.answer(PAIR, token)
    assert not two.answer(PAIR, token + "x")
    assert not two.answer(OTHER, token)
    assert one.challenge(PAIR) != token
    assert not two.answer(PAIR, token)


def test_a_token_is_not_seen_in_another_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    token = FileArbiter(conf(tmp_path / "a")).challenge(PAIR)
    assert not FileArbiter(conf(tmp_path / "b")).answer(PAIR, token)
