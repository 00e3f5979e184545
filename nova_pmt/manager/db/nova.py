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

"""What the managers remember of servers of Nova.

A manager works on a server in a *turn*: it counts the row's turns up by one, and may change the
row for as long as nobody else has counted on. So a manager that stood still can do no harm when
it goes on, and no clock of another machine is compared with ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nova_pmt.manager.db import models
from nova_pmt.manager.db.api import MAX_REASON
from nova_pmt.manager.db.engine import Engine, retried


@dataclass(frozen=True)
class Note:
    """A server; see :class:`nova_pmt.manager.db.models.NovaServer`."""

    uuid: str
    standby: str = ""
    ordered: str = ""
    generation: int = 0
    step: str = ""
    source: str = ""
    target: str = ""
    turn: int = 0
    holder: str = ""
    attempts: int = 0
    reason: str = ""
    changed_at: float = 0.0


class NovaNotes:
    """Used by any number of threads.

    Every method raises :class:`nova_pmt.exception.DatabaseUnavailable` when the database cannot be
    asked now.

    :param now: seconds since 1970; only shown to people.
    """

    def __init__(self, engine: Engine, now: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._now = now

    @retried
    def note(self, uuid: str) -> Note | None:
        """One server; None: it is not followed."""
        with self._engine.reader() as session:
            row = session.get(models.NovaServer, uuid)
            return None if row is None else _note(row)

    @retried
    def notes(self) -> list[Note]:
        """All that are followed."""
        with self._engine.reader() as session:
            rows = session.scalars(sa.select(models.NovaServer).order_by(models.NovaServer.uuid))
            return [_note(row) for row in rows]

    @retried
    def keep(self, uuid: str) -> Note:
        """Follow a server from now on."""
        with self._engine.writer() as session:
            # A write first: SQLite does not let two that have read before they write both go on.
            session.execute(
                sa.update(models.NovaServer)
                .where(models.NovaServer.uuid == uuid)
                .values(changed_at=models.NovaServer.changed_at)
                .execution_options(synchronize_session=False)
            )
            row = session.get(models.NovaServer, uuid, populate_existing=True)
            if row is None:
                row = models.NovaServer(**{**_BLANK, "uuid": uuid, "changed_at": self._now()})
                session.add(row)
                session.flush()  # a duplicate: somebody else was faster, and we try again
            return _note(row)

    @retried
    def take(self, uuid: str, turn: int, holder: str) -> bool:
        """Take the next turn; false when another manager has."""
        return self._swap(uuid, turn, {"turn": turn + 1, "holder": holder})

    @retried
    def write(self, uuid: str, turn: int, **values: Any) -> bool:
        """Change a row in one's own turn; false when it is over, and nothing was changed."""
        if "reason" in values:
            values["reason"] = str(values["reason"])[:MAX_REASON]
        return self._swap(uuid, turn, values)

    @retried
    def drop(self, uuid: str, turn: int) -> bool:
        """Follow it no more; false when one's turn is over."""
        with self._engine.writer() as session:
            done = session.execute(sa.delete(models.NovaServer).where(*_mine(uuid, turn)))
            return bool(done.rowcount == 1)

    @retried
    def remark(self, uuid: str, what: str, reason: str, *, generation: int = 0) -> None:
        """A line in the audit trail, of kind ``nova``."""
        with self._engine.writer() as session:
            session.add(
                models.Event(
                    at=self._now(),
                    kind="nova",
                    pair_uuid=uuid,
                    generation=generation,
                    host="",
                    old="",
                    new=what,
                    reason=reason[:MAX_REASON],
                )
            )

    def _swap(self, uuid: str, turn: int, values: dict[str, Any]) -> bool:
        with self._engine.writer() as session:
            done = session.execute(
                sa.update(models.NovaServer)
                .where(*_mine(uuid, turn))
                .values(changed_at=self._now(), **values)
                .execution_options(synchronize_session=False)
            )
            return bool(done.rowcount == 1)

    # -- services that were forced down -------------------------------------------------

    @retried
    def force(self, host: str, service: str) -> None:
        """Remember, before it is done, that a host's service is forced down."""
        with self._engine.writer() as session:
            done = session.execute(
                sa.update(models.NovaForcedHost)
                .where(models.NovaForcedHost.host == host)
                .values(service=service)
            )
            if not done.rowcount:
                session.add(
                    models.NovaForcedHost(host=host, service=service, forced_at=self._now())
                )

    @retried
    def forced(self) -> dict[str, str]:
        """Hosts whose service was forced down, and the service's UUID."""
        with self._engine.reader() as session:
            rows = session.scalars(sa.select(models.NovaForcedHost))
            return {row.host: row.service for row in rows}

    @retried
    def unforce(self, host: str) -> None:
        """It is up again."""
        with self._engine.writer() as session:
            session.execute(
                sa.delete(models.NovaForcedHost).where(models.NovaForcedHost.host == host)
            )


_BLANK = {name: field.default for name, field in Note.__dataclass_fields__.items()}


def _mine(uuid: str, turn: int) -> tuple[Any, Any]:
    return models.NovaServer.uuid == uuid, models.NovaServer.turn == turn


def _note(row: models.NovaServer) -> Note:
    return Note(**{name: getattr(row, name) for name in Note.__dataclass_fields__})
