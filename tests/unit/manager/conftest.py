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

"""A manager's memory in a file of SQLite's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nova_pmt.manager.db import migration
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from tests.unit.manager.connect import connect as engine_of


@pytest.fixture
def url(tmp_path: Path) -> str:
    # (Nothing in tests has to survive a power cut.)
    return f"sqlite:///{tmp_path}/manager.sqlite"


@pytest.fixture
def connect(url: str) -> Iterator[Callable[[], Engine]]:
    """Each call is another manager's connection to the one database."""
    made: list[Engine] = []

    def make() -> Engine:
        made.append(engine_of(url, sqlite_synchronous=False))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(connect: Callable[[], Engine]) -> Engine:
    """With this release's tables, empty."""
    made = connect()
    made.ask(migration.upgrade)
    return made


@pytest.fixture
def database(engine: Engine) -> Database:
    return Database(engine)
