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

"""The managers' memory on a private MariaDB: what the unit tests ask of SQLite, and its death."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from nova_pmt import exception
from nova_pmt.lab.mariadb import MariaDB
from nova_pmt.manager.db import migration, models
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from tests.unit.manager.connect import connect as engine_of
from tests.unit.manager.database_cases import *  # noqa: F403
from tests.unit.manager.database_cases import (
    FIRST,
    OTHER,
    SIDES,
    UUID,
    Connect,
    at_once,
    managers,
    protected,
    story,
)

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDB]:
    # (Not pytest's directory: its path may be too long for a socket's.)
    with tempfile.TemporaryDirectory(prefix="pmt-db-") as directory:
        with MariaDB(Path(directory) / "server") as running:
            yield running


@pytest.fixture(scope="module")
def tables(server: MariaDB) -> str:
    """One database for all tests that leave its tables as they are; they are emptied for each."""
    url = server.create("nova_pmt")
    engine = engine_of(url)
    engine.ask(migration.upgrade)
    engine.close()
    return url


@pytest.fixture
def url(tables: str) -> str:
    return tables


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    made: list[Engine] = []

    def make() -> Engine:
        made.append(engine_of(url, max_pool_size=5))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(connect: Connect) -> Engine:
    def empty(bare: sa.Engine) -> None:
        with bare.begin() as connection:
            for table in models.Base.metadata.sorted_tables:
                connection.execute(table.delete())

    made = connect()
    made.ask(empty)
    return made


@pytest.fixture
def database(engine: Engine) -> Database:
    return Database(engine)


# -- tables -----------------------------------------------------------------------------


def test_a_database_without_tables_is_refused_and_made_usable(server: MariaDB) -> None:
    engine = engine_of(server.create(f"bare{next(_numbers)}"))
    with pytest.raises(exception.ConfigError, match="revision none"):
        engine.ask(migration.check)
    with pytest.raises(exception.DatabaseUnavailable) as caught:
        Database(engine).begin(FIRST)
    assert "UPDATE" not in str(caught.value)
    engine.ask(migration.upgrade)
    engine.ask(migration.check)
    assert Database(engine).begin(FIRST).state == "checking"
    engine.close()


def test_a_database_that_is_not_there_tells_no_password(server: MariaDB) -> None:
    url = server.url("nowhere")
    password = str(sa.engine.make_url(url).password)
    engine = engine_of(url)
    with pytest.raises(exception.DatabaseUnavailable) as caught:
        Database(engine).pair(UUID)
    assert password not in f"{caught.value} {caught.value.__cause__}"
    engine.close()


def test_no_command_line_has_the_password(server: MariaDB) -> None:
    password = str(sa.engine.make_url(server.url("x")).password)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert password.encode() not in path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            pass


def test_connections_that_are_all_in_use_are_a_database_that_cannot_be_asked(
    url: str, engine: Engine
) -> None:
    narrow = engine_of(url, max_pool_size=1, max_overflow=0, pool_timeout=1)
    with narrow.reader() as session:
        session.connection()
        (answer,) = at_once(lambda: Database(narrow).pair(UUID))
    assert isinstance(answer, exception.DatabaseUnavailable)
    assert Database(narrow).pair(UUID) is None
    narrow.close()


# -- races ------------------------------------------------------------------------------


def test_a_transaction_that_was_the_victim_of_a_deadlock_is_tried_again(
    database: Database, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two begin two pairs in opposite order, in one transaction each: one of them must lose."""
    protected(database)
    protected(database, replace(FIRST, uuid=OTHER))
    locked = Database._locked
    first_locks, tried = threading.Barrier(2), itertools.count()

    def both(self: Database, session: Any, uuid: str) -> Any:
        found = locked(self, session, uuid)
        if next(tried) < 2:
            first_locks.wait(20)
            locked(self, session, OTHER if uuid == UUID else UUID)
        return found

    monkeypatch.setattr(Database, "_locked", both)
    one, two = managers(connect, 2)
    answers = at_once(lambda: one.claim(UUID, 1, "standby"), lambda: two.claim(OTHER, 1, "primary"))
    assert answers == [True, True]
    assert next(tried) == 3  # it was one, and it was tried again
    assert [kind for kind, *_ in story(database)].count("claim") == 1
    assert [kind for kind, *_ in story(database, OTHER)].count("claim") == 1


def test_many_new_pairs_begin_at_once(database: Database, connect: Connect) -> None:
    """Rows that are not there yet are locked by their gaps, on MariaDB: deadlocks come for sure."""
    databases = managers(connect, 4)
    uuids = [f"{UUID[:-2]}{number:02x}" for number in range(16)]
    answers = at_once(
        *[
            lambda u=u, d=databases[n % 4]: d.begin(replace(FIRST, uuid=u))
            for n, u in enumerate(uuids)
        ]
    )
    assert [one for one in answers if isinstance(one, Exception)] == []
    assert len(database.pairs()) == len(uuids)


# -- the server dies --------------------------------------------------------------------


def ask_until_answered(ask: Callable[[], bool], outages: list[str], deadline: float) -> bool:
    """As a side of a pair does; what else comes than an outage is the test's to see."""
    while True:
        try:
            return ask()
        except exception.DatabaseUnavailable as error:
            outages.append(error.message)
            assert time.monotonic() < deadline
            time.sleep(0.05)  # as a worker waits between two questions


def test_a_server_that_is_killed_amid_claims_decides_each_of_them_once(
    server: MariaDB, database: Database, connect: Connect
) -> None:
    uuids = [f"{UUID[:-3]}{number:03x}" for number in range(40)]
    for uuid in uuids:
        protected(database, replace(FIRST, uuid=uuid))
    heard: dict[tuple[str, str], list[bool]] = {(u, s): [] for u in uuids for s in SIDES}
    outages: list[str] = []
    enough, deadline = threading.Semaphore(0), time.monotonic() + 90

    def claims(own: Database, side: Any, order: list[str]) -> None:
        for uuid in order:
            won = ask_until_answered(lambda u=uuid: own.claim(u, 1, side), outages, deadline)
            heard[uuid, side].append(won)
            enough.release()

    def outage() -> None:
        for _ in range(20):
            assert enough.acquire(timeout=60)
        server.kill()
        # It stays away until it was noticed.
        while not outages and time.monotonic() < deadline:
            time.sleep(0.01)

    workers = [
        lambda d=d, n=n: claims(d, SIDES[n % 2], uuids if n < 2 else uuids[::-1])
        for n, d in enumerate(managers(connect, 4))
    ]
    threads = [threading.Thread(target=worker) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        outage()
    finally:
        server.start()  # (here: it ends with the thread that started it)
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads)
    assert outages
    for uuid in uuids:
        winner = database.winner(uuid, 1)
        assert winner in SIDES
        for side in SIDES:
            assert heard[uuid, side] == [side == winner] * 2
        assert [kind for kind, *_ in story(database, uuid)].count("claim") == 1


def test_what_was_decided_survives_the_server(server: MariaDB, database: Database) -> None:
    protected(database)
    assert database.claim(UUID, 1, "standby")
    server.kill()
    with pytest.raises(exception.DatabaseUnavailable):
        database.claim(UUID, 1, "primary")
    server.start()
    assert database.claim(UUID, 1, "primary") is False
    assert database.claim(UUID, 1, "standby") is True


def test_a_server_is_ended_with_all_that_it_had() -> None:
    with tempfile.TemporaryDirectory(prefix="pmt-db-") as directory:
        with MariaDB(Path(directory) / "server") as server:
            pid = server.pid
            os.kill(pid, 0)
        assert list(Path(directory).iterdir()) == []
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_is_not_installed_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_options: None)
    with pytest.raises(exception.LabError, match="not installed") as caught:
        MariaDB(tmp_path / "server").__enter__()
    assert "apt-get install" in caught.value.cure
    assert not (tmp_path / "server").exists()


def test_a_directory_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    with pytest.raises(exception.LabError, match="too long"):
        MariaDB(directory).__enter__()
    assert not directory.exists()
