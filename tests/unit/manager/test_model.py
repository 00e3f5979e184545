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

"""One survivor, whatever the network does: messages get lost, are repeated and overtake another.

Two managers share the database; hosts begin generations, their sides claim them and report. Every
message may be delivered late, to either manager, more than once or never, and its answer may be
lost.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nova_pmt import exception
from nova_pmt.arbiter.base import Arrangement, Side
from nova_pmt.manager import states
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.service import ManagerService
from tests.unit.manager.connect import connect
from tests.unit.manager.database_cases import FIRST, SIDES, UUID

HOSTS = ("a", "b", "c")
_TOLD = sorted({state for _, state in states.REPORTED})


@dataclass(frozen=True)
class Claim:
    generation: int
    side: Side


@dataclass(frozen=True)
class Report:
    generation: int
    role: Side
    state: str


Message = Arrangement | Claim | Report


class OneSurvivor(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        url = f"sqlite:///{Path(self.directory.name)}/manager.sqlite"
        self.engines = [connect(url, sqlite_synchronous=False) for _ in range(2)]
        self.engines[0].ask(migration.upgrade)
        self.databases = [Database(engine) for engine in self.engines]
        self.services = [ManagerService(database) for database in self.databases]
        self.generations = itertools.count(1)
        self.arrangements: dict[int, Arrangement] = {}
        self.network: list[Message] = []
        #: What each side was told, whether the answer reached it or not.
        self.won: dict[int, Side] = {}
        self.lost: set[tuple[int, Side]] = set()
        #: Generations that another one has followed, with the winner that they had then.
        self.closed: dict[int, str | None] = {}

    # -- what hosts say -----------------------------------------------------------------

    @rule(primary=st.sampled_from(HOSTS), standby=st.sampled_from(HOSTS))
    def some_host_begins(self, primary: str, standby: str) -> None:
        if primary != standby:
            generation = next(self.generations)
            wanted = replace(
                FIRST, generation=generation, primary_host=primary, standby_host=standby
            )
            self.arrangements[generation] = wanted
            self.network.append(wanted)

    @rule()
    def the_host_with_the_guest_begins(self) -> None:
        pair = self.databases[0].pair(UUID)
        if pair is not None:
            primary = pair.active_host
            self.some_host_begins(primary, next(name for name in HOSTS if name != primary))

    @precondition(lambda self: self.arrangements)
    @rule(data=st.data(), side=st.sampled_from(SIDES))
    def a_side_claims(self, data: Any, side: Side) -> None:
        generation = data.draw(st.sampled_from(sorted(self.arrangements)[-3:]))
        self.network.append(Claim(generation, side))

    @precondition(lambda self: self.arrangements)
    @rule(data=st.data(), side=st.sampled_from(SIDES), state=st.sampled_from(_TOLD))
    def a_host_reports(self, data: Any, side: Side, state: str) -> None:
        generation = data.draw(st.sampled_from(sorted(self.arrangements)[-2:]))
        self.network.append(Report(generation, side, state))

    # -- what the network makes of it ---------------------------------------------------

    @precondition(lambda self: self.network)
    @rule(data=st.data(), manager=st.integers(0, 1), times=st.integers(1, 2), stays=st.booleans())
    def a_message_arrives(self, data: Any, manager: int, times: int, stays: bool) -> None:
        number = data.draw(st.integers(0, len(self.network) - 1))
        message = self.network[number] if stays else self.network.pop(number)
        for _ in range(times):
            self.deliver(message, manager)

    @precondition(lambda self: self.network)
    @rule()
    def the_newest_message_arrives(self) -> None:
        self.deliver(self.network.pop(), 0)

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def a_message_is_lost(self, data: Any) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    def deliver(self, message: Message, manager: int) -> None:
        if isinstance(message, Claim):
            self.claim(message, self.databases[manager])
        elif isinstance(message, Report):
            self.report(message, self.services[manager])
        else:
            self.begin(message, self.databases[manager])

    def begin(self, wanted: Arrangement, database: Database) -> None:
        before = database.pair(UUID)
        try:
            after = database.begin(wanted)
        except exception.PairMismatch:
            assert before is not None
            assert database.pair(UUID) == before
            return
        assert (after.generation, after.winner) == (wanted.generation, "")
        if before is None or before.generation == wanted.generation:
            return
        assert wanted.generation > before.generation
        winner = database.winner(UUID, before.generation)
        if before.winner:
            assert winner == before.winner
        if before.state != "unprotected" and (before.winner or before.state != "error"):
            assert wanted.primary_host == before.active_host
        if not before.winner and wanted.primary_host != before.standby_host:
            assert winner != "standby"
        self.closed[before.generation] = winner

    def claim(self, message: Claim, database: Database) -> None:
        generation, side = message.generation, message.side
        try:
            won = database.claim(UUID, generation, side)
        except exception.ArbiterUnavailable:
            # It never began here, and nobody was told anything.
            assert generation not in self.won
            assert generation not in self.closed
            return
        if won:
            assert (generation, side) not in self.lost
            assert self.won.setdefault(generation, side) == side
            if generation in self.closed:
                assert self.closed[generation] == side
        else:
            assert self.won.get(generation) != side
            self.lost.add((generation, side))

    def report(self, message: Report, service: ManagerService) -> None:
        wanted = self.arrangements[message.generation]
        host = wanted.primary_host if message.role == "primary" else wanted.standby_host
        before = self.databases[0].pair(UUID)
        service.beat(
            host,
            {},
            [
                {
                    "uuid": UUID,
                    "generation": message.generation,
                    "role": message.role,
                    "state": message.state,
                    "reason": "",
                }
            ],
        )
        after = self.databases[1].pair(UUID)
        if before is None or after is None or before.generation != message.generation:
            assert after == before
            return
        if before.winner:
            assert after.winner == before.winner
        # No report makes a standby go on, and none of its host ends the primary's claim.
        assert after.winner in (before.winner, "primary")
        if message.role == "standby":
            assert after.winner == before.winner

    # -- what holds at all times --------------------------------------------------------

    @invariant()
    def what_was_decided_stays(self) -> None:
        for generation, side in self.won.items():
            assert self.databases[1].winner(UUID, generation) == side
        for generation, winner in self.closed.items():
            assert self.databases[0].winner(UUID, generation) == winner

    def teardown(self) -> None:
        try:
            self.demand_a_consistent_story()
        finally:
            for engine in self.engines:
                engine.close()
            self.directory.cleanup()

    def demand_a_consistent_story(self) -> None:
        rows = self.databases[0].events(uuid=UUID, limit=100_000)
        changes = [row for row in rows if row.kind != "refused"]
        state, generation = "", 0
        for row in changes:
            assert row.old == state
            assert row.old == "" or row.old == row.new or row.new in states.STEPS[row.old]  # type: ignore[index]
            assert row.generation >= generation
            state, generation = row.new, row.generation
        pair = self.databases[0].pair(UUID)
        assert (pair.state if pair is not None else "") == state
        claims = [row for row in rows if row.kind == "claim"]
        assert len({row.generation for row in claims}) == len(claims)
        for row in claims:
            winner = self.databases[0].winner(UUID, row.generation)
            assert winner is not None and states.CLAIMED[winner] == row.new
        refused = [(row.generation, row.new) for row in rows if row.kind == "refused"]
        assert len(set(refused)) == len(refused)
        assert set(refused) == self.lost


TestOneSurvivor = OneSurvivor.TestCase
TestOneSurvivor.settings = settings(
    # An example is a database of its own and takes 0.1 s.
    max_examples=min(settings().max_examples, 20) if settings().max_examples <= 100 else 1000,
    stateful_step_count=40,
    deadline=None,
    # What fails is made smaller at night only: it would take longer than a test may.
    phases=[phase for phase in Phase if phase is not Phase.shrink or settings().max_examples > 100],
)
