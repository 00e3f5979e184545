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

"""The managers' memory on SQLite; and what becomes of callers when it is away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nova_pmt import exception
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from tests.unit.manager.connect import connect as engine_of
from tests.unit.manager.database_cases import *  # noqa: F403
from tests.unit.manager.database_cases import FIRST, UUID, Connect, state

_QUESTIONS = {
    "begin": lambda database: database.begin(FIRST),
    "claim": lambda database: database.claim(UUID, 1, "primary"),
    "reserve": lambda database: database.reserve(UUID, 1),
    "winner": lambda database: database.winner(UUID, 1),
    "transition": lambda database: database.transition(UUID, 1, "protected", host="a"),
    "want": lambda database: database.want(UUID, True),
    "attempt": lambda database: database.attempt(UUID, 1, 0),
    "challenge": lambda database: database.challenge(UUID, "token"),
    "challenged": lambda database: database.challenged(UUID),
    "beat": lambda database: database.beat("a", {}),
    "judge": lambda database: database.judge("a", 1, False, ""),
    "maintain": lambda database: database.maintain("a", True),
    "hosts": lambda database: database.hosts(),
    "pair": lambda database: database.pair(UUID),
    "pairs": lambda database: database.pairs(),
    "events": lambda database: database.events(),
    "counts": lambda database: database.counts(),
    "load": lambda database: database.load(),
    "forget": lambda database: database.forget(0.0),
}


def test_every_question_is_asked_below() -> None:
    assert set(_QUESTIONS) == {name for name in vars(Database) if not name.startswith("_")}


@pytest.mark.parametrize("question", _QUESTIONS)
def test_a_database_that_is_away_is_said_so_in_one_way(tmp_path: Path, question: str) -> None:
    away = engine_of(f"sqlite:///{tmp_path}/secret-directory/manager.sqlite")
    with pytest.raises(exception.DatabaseUnavailable) as caught:
        _QUESTIONS[question](Database(away))
    text = str(caught.value)
    assert "SELECT" not in text and "UPDATE" not in text and "secret" not in text
    assert "[database] connection" in caught.value.cure
    away.close()


def test_tables_that_are_not_there_are_a_database_that_cannot_be_used(connect: Connect) -> None:
    for question in _QUESTIONS.values():
        with pytest.raises(exception.DatabaseUnavailable) as caught:
            question(Database(connect()))
        assert "SELECT" not in str(caught.value) and "UPDATE" not in str(caught.value)


def test_no_password_is_told_when_the_server_does_not_answer() -> None:
    away = engine_of("mysql+pymysql://nova_pmt:hunter2@127.0.0.1:1/nova_pmt")
    with pytest.raises(exception.DatabaseUnavailable) as caught:
        away.ask(migration.check)
    assert "hunter2" not in str(caught.value) + str(caught.value.__cause__)


def test_callers_go_on_when_the_database_is_back(
    database: Database, engine: Engine, tmp_path: Path
) -> None:
    database.begin(FIRST)
    engine.close()
    file, away = tmp_path / "manager.sqlite", tmp_path / "away.sqlite"
    shutil.move(file, away)
    file.mkdir()
    with pytest.raises(exception.DatabaseUnavailable):
        database.claim(UUID, 1, "standby")
    file.rmdir()
    shutil.move(away, file)
    assert database.claim(UUID, 1, "standby") is True


def test_a_transaction_that_fails_leaves_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.begin(FIRST)
    monkeypatch.setattr(Database, "_note", lambda *_args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        database.claim(UUID, 1, "standby")
    monkeypatch.undo()
    assert database.winner(UUID, 1) is None
    assert state(database) == "checking"
    assert database.claim(UUID, 1, "primary") is True


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "managers.sqlite"
    engine = engine_of(f"sqlite:///{path}")
    engine.ask(migration.upgrade)
    Database(engine).begin(FIRST)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    engine.close()


def test_a_database_without_tables_is_refused_with_the_cure(connect: Connect) -> None:
    bare = connect()
    with pytest.raises(exception.ConfigError, match="at revision none") as caught:
        bare.ask(migration.check)
    assert "nova-pmt-manage db sync" in caught.value.cure
    bare.ask(migration.upgrade)
    bare.ask(migration.check)
