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

"""The tables. Times are UTC, in seconds since 1970, from the clock of the manager that wrote them;
they are shown to people and decide nothing.
"""

from __future__ import annotations

from oslo_db.sqlalchemy import models
from sqlalchemy import JSON, BigInteger, Boolean, Double, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: SQLite counts up by itself only what it calls INTEGER.
_Serial = BigInteger().with_variant(Integer, "sqlite")


class Base(models.ModelBase, DeclarativeBase):
    """Of all tables."""

    #: MariaDB's usual order finds "web1" and "WEB1" to be the same; hosts and servers are not.
    __table_args__ = {
        "mysql_engine": "InnoDB",
        "mysql_charset": "utf8mb4",
        "mysql_collate": "utf8mb4_bin",
    }


class Pair(Base):
    """A server that is, or was, protected, and its newest generation."""

    __tablename__ = "pairs"
    __table_args__ = (
        Index("ix_pairs_primary_host", "primary_host"),
        Index("ix_pairs_standby_host", "standby_host"),
        Index("ix_pairs_state", "state"),
        Base.__table_args__,
    )

    uuid: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    generation: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(32))
    #: Of this generation: ``primary`` or ``standby``; empty while nobody has won, ``nobody`` where
    #: nobody ever will.
    winner: Mapped[str] = mapped_column(String(16), default="")
    primary_host: Mapped[str] = mapped_column(String(255))
    standby_host: Mapped[str] = mapped_column(String(255))
    strategy: Mapped[str] = mapped_column(String(64))
    options: Mapped[dict[str, float]] = mapped_column(JSON)
    #: False when an operator ended protection, or the guest ended.
    wanted: Mapped[bool] = mapped_column(Boolean, default=True)
    reason: Mapped[str] = mapped_column(Text, default="")
    changed_at: Mapped[float] = mapped_column(Double)
    #: Repairs since it was protected last.
    attempts: Mapped[int] = mapped_column(Integer, default=0)


class Decision(Base):
    """A claim that was won. Written once, never changed.

    Or, while the pair's own row has no winner: a generation that is reserved for its standby until
    the primary's host is off. Only an operator takes that back.
    """

    __tablename__ = "decisions"

    pair_uuid: Mapped[str] = mapped_column(String(36), primary_key=True)
    generation: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    winner: Mapped[str] = mapped_column(String(16))
    decided_at: Mapped[float] = mapped_column(Double)


class Challenge(Base):
    """A token that one host left for another to see."""

    __tablename__ = "challenges"

    pair_uuid: Mapped[str] = mapped_column(String(36), primary_key=True)
    token: Mapped[str] = mapped_column(String(128))
    left_at: Mapped[float] = mapped_column(Double)


class Host(Base):
    """A compute host with an agent."""

    __tablename__ = "hosts"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    #: Counts its heartbeats. A host is judged by whether this moves, seen with one's own clock.
    beats: Mapped[int] = mapped_column(BigInteger, default=0)
    alive: Mapped[bool] = mapped_column(Boolean, default=True)
    #: No new standbys, and its guests are to be moved away.
    maintenance: Mapped[bool] = mapped_column(Boolean, default=False)
    seen_at: Mapped[float] = mapped_column(Double)
    #: Free memory for standbys, CPU model and the like, as its agent says.
    facts: Mapped[dict[str, object]] = mapped_column(JSON)


class Event(Base):
    """The audit trail: every change of a pair's or host's state, and every refused claim."""

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_pair_uuid", "pair_uuid"),
        Index("ix_events_at", "at"),
        Base.__table_args__,
    )

    id: Mapped[int] = mapped_column(_Serial, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Double)
    #: ``transition``, ``claim``, ``reserved``, ``refused``, ``host``, ``nova``.
    kind: Mapped[str] = mapped_column(String(32))
    pair_uuid: Mapped[str] = mapped_column(String(36), default="")
    generation: Mapped[int] = mapped_column(BigInteger, default=0)
    #: Who said so.
    host: Mapped[str] = mapped_column(String(255), default="")
    old: Mapped[str] = mapped_column(String(32), default="")
    new: Mapped[str] = mapped_column(String(32), default="")
    reason: Mapped[str] = mapped_column(Text, default="")


class NovaServer(Base):
    """A server of Nova that is protected, is to be, or has just failed over."""

    __tablename__ = "nova_servers"

    uuid: Mapped[str] = mapped_column(String(36), primary_key=True)
    #: UUID of its standby server; empty: none.
    standby: Mapped[str] = mapped_column(String(36), default="")
    #: How its agent was told to protect it: mode and options; empty: not by us.
    ordered: Mapped[str] = mapped_column(String(255), default="")
    #: Of the pair, in which it failed over last.
    generation: Mapped[int] = mapped_column(BigInteger, default=0)
    #: What Nova is told next of a failover; empty: none is under way.
    step: Mapped[str] = mapped_column(String(32), default="")
    #: From which host to which it went.
    source: Mapped[str] = mapped_column(String(255), default="")
    target: Mapped[str] = mapped_column(String(255), default="")
    #: Counts the turns that managers took; only who took the last one may change the row.
    turn: Mapped[int] = mapped_column(BigInteger, default=0)
    #: The manager that is at it; empty: none.
    holder: Mapped[str] = mapped_column(String(255), default="")
    #: Turns that failed since something went well.
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    #: Why it is not protected, or what is waited for.
    reason: Mapped[str] = mapped_column(Text, default="")
    changed_at: Mapped[float] = mapped_column(Double)


class NovaForcedHost(Base):
    """A compute service that was forced down for a failover, and must be let up again."""

    __tablename__ = "nova_forced_hosts"

    host: Mapped[str] = mapped_column(String(255), primary_key=True)
    #: UUID of the service.
    service: Mapped[str] = mapped_column(String(36))
    forced_at: Mapped[float] = mapped_column(Double)
