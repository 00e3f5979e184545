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

"""From the options of ``[database]`` to transactions that are tried again."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from oslo_db import api as oslo_db_api
from oslo_db import exception as db_exception
from oslo_db.sqlalchemy import enginefacade

from nova_pmt import exception

P = ParamSpec("P")
T = TypeVar("T")

_RETRIES = 5
_RETRY_S, _MAX_RETRY_S = 0.05, 1.0
_OPTIONS = (
    "connection",
    "mysql_sql_mode",
    "connection_recycle_time",
    "connection_debug",
    "max_pool_size",
    "max_overflow",
    "pool_timeout",
    "sqlite_synchronous",
    "connection_trace",
    "max_retries",
    "retry_interval",
)
#: SQLite has no pool of connections, and takes no options of one.
_OF_POOLS = frozenset({"max_pool_size", "max_overflow", "pool_timeout"})


@enginefacade.transaction_context_provider
class _Context(threading.local):
    """What oslo.db hangs a thread's transaction on."""


class Engine:
    """Connections and transactions.

    :param conf: with oslo.db's options.
    """

    def __init__(self, conf: Any) -> None:
        sqlite = str(conf.database.connection).startswith("sqlite")
        options = {
            name: getattr(conf.database, name)
            for name in _OPTIONS
            if not (sqlite and name in _OF_POOLS)
        }
        if sqlite:
            _private(str(conf.database.connection))
        self._manager = enginefacade.transaction_context()
        self._manager.configure(sqlite_fk=True, expire_on_commit=False, **options)
        self._context = _Context()
        # SQLite has one writer at a time, and whoever finds it busy sleeps and looks again: many
        # threads of one manager do better in a queue.
        self._turn: Any = threading.Lock() if sqlite else contextlib.nullcontext()

    @contextlib.contextmanager
    def writer(self) -> Iterator[Any]:
        """A transaction that writes; brings the session."""
        with self._turn, self._manager.writer.using(self._context) as session:
            yield session

    def reader(self) -> Any:
        """A transaction that only reads."""
        return self._manager.reader.using(self._context)

    def ask(self, question: Callable[[sa.Engine], T]) -> T:
        """Do something with SQLAlchemy's own engine: migrations.

        :raises nova_pmt.exception.DatabaseUnavailable: it cannot be used.
        """
        return retried(lambda: question(self._manager.writer.get_engine()))()

    def close(self) -> None:
        """Close all connections."""
        self._manager.dispose_pool()


def _private(connection: str) -> None:
    """A new file of SQLite is for its owner alone, and so is what SQLite makes beside it."""
    path = sa.make_url(connection).database
    if path and path != ":memory:":
        with contextlib.suppress(OSError):  # whoever opens it says why it cannot be
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))


def retried(operation: Callable[P, T]) -> Callable[P, T]:
    """Try a whole transaction again that another one, or a lost connection, has undone.

    Only for what can be done twice: a commit whose answer got lost may have happened.

    :raises nova_pmt.exception.DatabaseUnavailable: it cannot be done now.
    """
    tried = oslo_db_api.wrap_db_retry(
        max_retries=_RETRIES,
        retry_interval=_RETRY_S,
        inc_retry_interval=True,
        max_retry_interval=_MAX_RETRY_S,
        retry_on_disconnect=True,
        retry_on_deadlock=True,
        exception_checker=_is_race,
    )(operation)

    @functools.wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return tried(*args, **kwargs)  # type: ignore[no-any-return]
        except (db_exception.DBError, sa.exc.SQLAlchemyError) as error:
            # (The text of the statement may hold what nobody should read in a log.)
            raise exception.DatabaseUnavailable(
                f"the database cannot be used: {type(error).__name__}"
            ) from error

    return run


def _is_race(error: BaseException) -> bool:
    # oslo.db knows no name for what SQLite says when two transactions wait for each other.
    locked = isinstance(error, db_exception.DBError) and "database is locked" in str(error)
    return locked or isinstance(error, db_exception.DBDuplicateEntry)
