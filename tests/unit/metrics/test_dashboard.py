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

"""The dashboard asks for what is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client import Metric

from nova_pmt.manager.db.api import Database
from nova_pmt.manager.service import ManagerService
from nova_pmt.metrics.agent import PairsCollector
from nova_pmt.metrics.manager import ManagerCollector
from tests.unit.metrics.test_metrics import UUID, rounds, view

DASHBOARD = Path(__file__).parents[3] / "etc/grafana/nova-pmt.json"


class OneHost(Database):
    """A database that has one of each; what it answers is what counts here."""

    def __init__(self) -> None:
        pass

    counts = staticmethod(lambda: {"protected": 1})  # type: ignore[assignment]
    hosts = staticmethod(list)  # type: ignore[assignment]
    claim = staticmethod(lambda *_: True)  # type: ignore[assignment]


def _names(metric: Metric) -> set[str]:
    if metric.type == "histogram":
        return {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    return {f"{metric.name}_total" if metric.type == "counter" else metric.name}


def told() -> set[str]:
    """Names of all figures."""
    service = ManagerService(OneHost())
    assert service.claim(UUID, 1, "standby")
    collectors = (
        PairsCollector("a", lambda: [view(stats=rounds(1000.0))]),
        ManagerCollector(OneHost(), service),
    )
    return {name for each in collectors for metric in each.collect() for name in _names(metric)}


def test_each_figure_of_the_dashboard_is_told() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"nova_pmt_\w+", target["expr"])
    }
    assert len(asked) > 10
    assert asked <= told()


def test_panels_do_not_lie_on_each_other() -> None:
    places = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in places, panel["title"]
                places.add((x, y))
        assert place["x"] + place["w"] <= 24
