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

"""The figures of a manager: what the database knows of pairs and hosts, and its own decisions."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nova_pmt import exception
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.service import ManagerService


class ManagerCollector(Collector):
    """Asks the database when it is asked."""

    def __init__(self, database: Database, service: ManagerService) -> None:
        self._database = database
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now; those of the database only while it can be asked."""
        claims = CounterMetricFamily(
            "nova_pmt_claims",
            "Claims that this manager has decided",
            labels=("side", "outcome"),
        )
        for (side, outcome), count in self._service.claims().items():
            claims.add_metric((side, outcome), count)
        yield claims
        up = GaugeMetricFamily("nova_pmt_database_up", "Whether the database can be asked")
        try:
            counts, hosts = self._database.counts(), self._database.hosts()
        except exception.DatabaseUnavailable:
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        yield up
        pairs = GaugeMetricFamily("nova_pmt_pairs", "Pairs by state", labels=("state",))
        for state, count in counts.items():
            pairs.add_metric((state,), count)
        yield pairs
        alive = GaugeMetricFamily(
            "nova_pmt_host_alive", "Whether a host's agent is heard", labels=("host",)
        )
        maintenance = GaugeMetricFamily(
            "nova_pmt_host_maintenance", "Whether a host is in maintenance", labels=("host",)
        )
        for host in hosts:
            alive.add_metric((host.name,), float(host.alive))
            maintenance.add_metric((host.name,), float(host.maintenance))
        yield alive
        yield maintenance
