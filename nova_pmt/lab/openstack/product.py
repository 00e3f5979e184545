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
"""nova_pmt in the cloud: its configuration, agents, managers, and what the managers remember."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from nova_pmt.exception import LabError
from nova_pmt.lab import deployment
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.lab import Lab
from nova_pmt.lab.mariadb import MariaDB
from nova_pmt.lab.openstack import settings
from nova_pmt.lab.openstack.control import ENVIRONMENT
from nova_pmt.lab.openstack.settings import Account
from nova_pmt.lab.process import LabProcess
from nova_pmt.manager.db.api import PairRow

PROGRAM = "nova-pmt-compute"
DATABASE = "nova_pmt"
#: In nova.conf.
COMPUTE: settings.Settings = {"DEFAULT": {"compute_driver": "pmt.PMTDriver"}}
CONTROL: settings.Settings = {
    "filter_scheduler": {
        "available_filters": (
            "nova.scheduler.filters.all_filters",
            "nova_pmt.openstack.nova.filter.PMTStandbyFilter",
        ),
        "enabled_filters": "ComputeFilter,ComputeCapabilitiesFilter,ImagePropertiesFilter,"
        "ServerGroupAntiAffinityFilter,ServerGroupAffinityFilter,PMTStandbyFilter",
        "weight_classes": "nova.scheduler.weights.all_weighers,"
        "nova_pmt.openstack.nova.weigher.PMTSpreadWeigher",
    }
}
#: In the demo one machine stands for a data centre: nothing answers as fast as it would there.
PEER_TIMEOUT_MS = 3000
_DATABASE_S = 60.0
_MANAGER: Mapping[str, str] = {
    "enabled": "true",
    "heartbeat_interval_s": "1",
    "host_timeout_s": "10",
    "repair_interval_s": "1",
    "repair_backoff_s": "3",
}


class Product:
    """nova_pmt on the hosts of a lab.

    :param account: of the managers in the cloud.
    :param managers: how many.
    """

    def __init__(self, lab: Lab, database: MariaDB, account: Account, managers: int) -> None:
        self._lab = lab
        self._mariadb = database
        self._account = account
        self._managers = managers
        self._database: Any = None

    def configure(self, user_id: str) -> None:
        """Write nova-pmt.conf everywhere.

        :param user_id: of the managers' account.
        """
        nova = {"standby_user_id": user_id, "notification_topic": settings.NOTIFICATION_TOPIC}
        ctl = {
            "database": {"connection": self._mariadb.create(DATABASE)},
            "nova": {"enabled": "true", "reconcile_interval_s": "10", **self._account.options()},
        }
        deployment.configure(
            self._lab,
            peer_timeout_ms=PEER_TIMEOUT_MS,
            extra={"arbiter": {"driver": "manager"}, "manager": _MANAGER, "nova": nova},
            own={"ctl": ctl},
        )

    def start(self) -> None:
        """Agents and managers; :meth:`wait` waits for them."""
        config = ["--config-file", deployment.CONFIG]
        self._lab.ctl.run(["nova-pmt-manage", *config, "db", "sync"], timeout=300)
        for number in self.numbers:
            self.start_manager(number)
        for host in self._lab.computes:
            self.start_agent(host)

    @property
    def numbers(self) -> range:
        """The managers', for :meth:`start_manager`."""
        return range(1, self._managers + 1)

    def start_manager(self, number: int, env: Mapping[str, str] | None = None) -> LabProcess:
        """Start a manager, in the place of the one of this number that runs."""
        name = deployment.manager(number)
        old = self._lab.ctl.processes.get(name)
        if old is not None and old.alive():
            old.kill()
        argv = ["nova-pmt-manager", "--config-file", deployment.CONFIG]
        return self._lab.ctl.spawn(name, argv, {**ENVIRONMENT, **(env or {})})

    def start_agent(self, host: LabHost) -> None:
        """Start the agent of a host."""
        deployment.start_agent(host, ENVIRONMENT)

    def wait(self, timeout: float = 300.0) -> None:
        """Wait until all that :meth:`start` started listens."""
        deployment.wait_agents(self._lab, timeout)
        for number in self.numbers:
            deployment.wait_ready(self._lab.ctl.processes[deployment.manager(number)], timeout)

    # -- what the managers remember ------------------------------------------------------------

    def pair(self, uuid: str) -> PairRow | None:
        """The pair of a server, read from the managers' database."""
        with (
            self._mariadb.connect(DATABASE, _DATABASE_S) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT * FROM pairs WHERE uuid = %s", (uuid,))
            row = cursor.fetchone()
        if row is None:
            return None
        return PairRow(**{name: row.get(name) for name in PairRow.__dataclass_fields__})

    def events(self, uuid: str) -> list[dict[str, Any]]:
        """The audit trail of a pair, the oldest first."""
        with (
            self._mariadb.connect(DATABASE, _DATABASE_S) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT * FROM events WHERE pair_uuid = %s ORDER BY id", (uuid,))
            return list(cursor.fetchall())

    def wait_pair(
        self,
        uuid: str,
        wanted: Callable[[PairRow], object],
        what: str,
        timeout: float = 300.0,
    ) -> PairRow:
        """Wait until a pair is as it is wanted.

        :raises LabError: not in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            pair = self.pair(uuid)
            if pair is not None and wanted(pair):
                return pair
            if time.monotonic() > deadline:
                raise LabError(f"server {uuid}: not {what} after {timeout:.0f} s: {pair}")
            time.sleep(0.2)

    def wait_protected(
        self, uuid: str, standby: str | None = None, timeout: float = 300.0
    ) -> PairRow:
        """Wait until a server is protected, on ``standby`` if one is named."""
        return self.wait_pair(
            uuid,
            lambda pair: pair.state == "protected" and standby in (None, pair.standby_host),
            "protected",
            timeout,
        )
