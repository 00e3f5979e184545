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

"""The rig with a manager: a real one, on the same bus, with an SQLite database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oslo_config import cfg

from nova_pmt import rpc
from nova_pmt.agent.heartbeat import Heartbeats
from nova_pmt.arbiter.base import Arbiter, Arrangement, Side
from nova_pmt.conf import opts
from nova_pmt.manager import rpcapi
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from nova_pmt.manager.endpoint import Endpoint
from nova_pmt.manager.rpcapi import ManagerAPI
from nova_pmt.manager.service import ManagerService
from tests.unit.agent.rig import UUID, FakeCompute, Rig

OTHER = UUID[:-1] + "1"
OTHER_NAME = "web2"


class Both(Arbiter):
    """The rig's workers ask the file arbiter; a manager hears of what begins."""

    def __init__(self, inner: Arbiter, database: Database) -> None:
        self._inner, self._database = inner, database

    def begin(self, arrangement: Arrangement) -> None:
        self._database.begin(arrangement)

    def claim(
        self,
        pair: str,
        generation: int,
        side: Side,
        *,
        reason: str = "",
        other_stopped: bool = False,
    ) -> bool:
        won = self._inner.claim(pair, generation, side)
        if won:
            self._database.claim(pair, generation, side)
        return won

    def winner(self, pair: str, generation: int) -> Side | None:
        return self._inner.winner(pair, generation)

    def challenge(self, pair: str) -> str:
        return self._inner.challenge(pair)

    def answer(self, pair: str, token: str) -> bool:
        return self._inner.answer(pair, token)


class Managed:
    """A manager, and heartbeats of the hosts of a rig."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self.rig = rig
        conf = cfg.ConfigOpts()
        opts.register(conf)
        conf([], default_config_files=[], default_config_dirs=[])
        conf.set_override("connection", f"sqlite:///{path}/manager.sqlite", "database")
        self._engine = Engine(conf)
        self._engine.ask(migration.upgrade)
        self.database = Database(self._engine)
        self.api = ManagerAPI(rig.transport, timeout_s=5)
        self._server: Any = None
        self._beats: list[Heartbeats] = []
        for compute in (rig.a, rig.b):
            compute.arbiter = Both(rig.arbiter, self.database)
        self.start()

    def start(self) -> None:
        service = ManagerService(self.database)
        self._server = rpc.server(self.rig.transport, rpcapi.TOPIC, "m1", Endpoint(service))
        self._server.start()

    def stop(self) -> None:
        """No manager answers any more."""
        if self._server is not None:
            self._server.stop()
            threading.Thread(target=self._server.wait, daemon=True).start()
            self._server = None

    def beat(self) -> None:
        """Both hosts tell of themselves from now on; to be called when their agents run."""
        for compute in (self.rig.a, self.rig.b):
            compute.parts.pairs.on_change(self._claims(compute))
            self._beats.append(
                Heartbeats(compute.name, self.api, compute.parts.pairs, _facts, interval_s=0.2)
            )

    def _claims(self, compute: FakeCompute) -> Callable[[], None]:
        """What a worker has won at the file arbiter is won at the manager, too."""

        def listen() -> None:
            for entry in compute.parts.pairs:
                if (entry.record.role, entry.state) == ("standby", "failing_over"):
                    self.database.claim(entry.uuid, entry.pair.generation, "standby")

        return listen

    def remember(self, uuid: str = OTHER, name: str = OTHER_NAME, **changes: Any) -> Arrangement:
        """A pair that no agent knows of."""
        made = Arrangement(
            uuid=uuid,
            name=name,
            generation=7,
            **{"primary_host": "a", "standby_host": "b"} | changes,
        )
        self.database.begin(made)
        return made

    def state(self, uuid: str = UUID) -> str | None:
        found = self.database.pair(uuid)
        return found.state if found else None

    def close(self) -> None:
        for beats in self._beats:
            beats.close(2)
        self.stop()
        self._engine.close()


def _facts() -> dict[str, Any]:
    return {"memory_free_bytes": 8 << 30, "cpu_model": "EPYC"}
