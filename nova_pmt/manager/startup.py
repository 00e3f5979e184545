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

"""From the configuration to a running manager."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from oslo_log import log

from nova_pmt import exception, rpc
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.conf import opts
from nova_pmt.manager import rpcapi
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from nova_pmt.manager.db.nova import NovaNotes
from nova_pmt.manager.endpoint import Endpoint
from nova_pmt.manager.fencing import Fence, Fencing
from nova_pmt.manager.repair import Repairs
from nova_pmt.manager.service import ManagerService
from nova_pmt.manager.watch import HostWatch
from nova_pmt.messaging import oslo_messaging
from nova_pmt.metrics.manager import ManagerCollector
from nova_pmt.metrics.server import MetricsServer
from nova_pmt.openstack.startup import Following
from nova_pmt.plugins import load_class

LOG = log.getLogger(__name__)

#: That answer, by default. They share one Python: with 64 a claim takes half as much processor time
#: again (``nova-pmt-bench managers``), and more connections than the database keeps open.
THREADS = 16
_DAY_S = 86400.0
_PURGE_S = 3600.0


def check(conf: Any) -> None:
    """Refuse what could not work.

    :raises nova_pmt.exception.ConfigError: with what is wrong and how to make it right.
    """
    if not conf.database.connection:
        raise exception.ConfigError(
            "[database] connection is not set",
            cure="For one machine: sqlite:////var/lib/nova_pmt/manager.sqlite; for a cloud: "
            "mysql+pymysql://nova_pmt:PASSWORD@HOST/nova_pmt",
        )
    if conf.manager.host_timeout_s <= 2 * conf.manager.heartbeat_interval_s:
        raise exception.ConfigError(
            "[manager] host_timeout_s must be more than twice heartbeat_interval_s",
            cure="A host whose one heartbeat gets lost is not dead: make it at least four times.",
        )


class Manager:
    """A running manager: RPC server and the two things that it does by itself. Close it.

    :raises nova_pmt.exception.ConfigError: the database's tables are not this release's.
    :raises nova_pmt.exception.DatabaseUnavailable: it cannot be asked.
    """

    def __init__(self, conf: Any) -> None:
        self._engine = Engine(conf)
        try:
            self._engine.ask(migration.check)
            database = Database(self._engine)
            transport = oslo_messaging.get_rpc_transport(conf)
            self._stopping = threading.Event()
            self._workers = ThreadPoolExecutor(
                conf.manager.repairs_at_once, thread_name_prefix="repair"
            )
            self._repairs = Repairs(
                database,
                AgentAPI(transport, work_timeout_s=conf.agent.worker_start_timeout_s + 20.0),
                self._workers,
                backoff_s=conf.manager.repair_backoff_s,
                others=lambda: self._nova.owned() if self._nova else frozenset(),
            )
            self._fencing = Fencing(load_class("nova_pmt.fences", conf.manager.fence, Fence)(conf))
            self._watch = HostWatch(database, conf.manager.host_timeout_s)
            self._nova = Following(conf, self._engine, transport) if conf.nova.enabled else None
        except BaseException:
            self._engine.close()
            raise
        self._database = database
        self._event_days = conf.manager.event_days
        self._purged = time.monotonic() - _PURGE_S
        name = f"{opts.host_name(conf)}.{os.getpid()}"
        claimed = self._nova.claimed if self._nova else lambda uuid: None
        notes = NovaNotes(self._engine) if self._nova else None
        service = ManagerService(database, self._fencing, claimed, notes)
        self._server = rpc.server(transport, rpcapi.TOPIC, name, Endpoint(service), THREADS)
        self._serving = threading.Event()
        self._metrics = MetricsServer(
            conf.metrics.listen_address,
            conf.metrics.manager_port,
            [ManagerCollector(database, service)],
            self._problems,
        )
        self._threads = [
            threading.Thread(target=self._serve, args=(name,), name="serve", daemon=True),
            self._loop("hosts", conf.manager.heartbeat_interval_s, self._watch.look),
            self._loop("repairs", conf.manager.repair_interval_s, self._repairs.sweep),
            self._loop("purge", 60.0, self._purge),
        ]
        if self._nova is not None:
            self._threads += [
                threading.Thread(target=self._follow, name="nova", daemon=True),
                self._loop("services", conf.manager.heartbeat_interval_s, self._nova.settle),
            ]
        for thread in self._threads:
            thread.start()

    def _problems(self) -> list[str]:
        found = [] if self._serving.is_set() else ["the message bus does not answer"]
        try:
            self._database.counts()
        except exception.DatabaseUnavailable as error:
            found.append(error.message)
        return found

    def _serve(self, name: str) -> None:
        self._server.start()  # waits for the message bus for as long as there is none
        self._serving.set()
        LOG.info("nova-pmt-manager %s is ready", name)

    def _follow(self) -> None:
        """Every second, and at once when there is something to do."""
        assert self._nova is not None
        self._repeat("nova", self._nova.wait, self._nova.sweep)

    def _loop(self, name: str, every_s: float, work: Callable[[], None]) -> threading.Thread:
        return threading.Thread(
            target=self._repeat,
            args=(name, lambda: self._stopping.wait(every_s), work),
            name=name,
            daemon=True,
        )

    def _repeat(self, name: str, wait: Callable[[], Any], work: Callable[[], None]) -> None:
        failing = False
        while True:
            wait()
            if self._stopping.is_set():
                return
            try:
                work()
                failing = False
            except exception.PmtError as error:
                if not failing:  # once for each time that it begins to fail
                    LOG.error("%s: %s", name, error)
                failing = True
            except Exception:
                LOG.exception("%s: this turn failed", name)

    def _purge(self) -> None:
        if time.monotonic() - self._purged >= _PURGE_S:
            self._purged = time.monotonic()
            self._database.forget(time.time() - self._event_days * _DAY_S)

    def close(self) -> None:
        """End it; repairs that were ordered go on at the agents."""
        self._stopping.set()
        if self._nova is not None:
            self._nova.close()
        self._metrics.close()
        if self._serving.is_set():
            self._server.stop()
            self._server.wait()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._fencing.close()
        self._engine.close()
