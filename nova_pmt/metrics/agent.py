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

"""The figures of an agent: its pairs, and the rounds of those that have their primary here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

_LABELS = ("uuid", "name")
_HISTOGRAMS = {
    "pause_seconds": "Time for which the guest stood still in a round",
    "commit_seconds": "From the end of a pause (Kemari: of its save) until the standby had it",
    "output_delay_seconds": "How long the oldest packet of a checkpoint was held",
    "pages": "Pages of a checkpoint",
}
_COUNTERS = {
    "rounds": ("rounds", "Checkpoints that were committed"),
    "output_rounds": ("output_rounds", "Rounds that began because there was output"),
    "throttled_rounds": ("throttled_rounds", "Rounds that were held back by link or cache"),
    "deferred": ("deferred_rounds", "Pauses that found too little cache"),
    "sent_bytes": ("sent_bytes", "Bytes that were sent to the standby"),
    "log_bytes_total": ("disk_log_bytes", "Bytes of the disks' write logs that were sent"),
}
_GAUGES = {
    "in_flight": ("checkpoints_in_flight", "Checkpoints that are under way to the standby", 1.0),
    "interval_ms": ("interval_seconds", "Time from pause to pause that is aimed at", 1e-3),
    "last_commit_age_ms": ("last_commit_age_seconds", "Time since the last commit", 1e-3),
}


class PairsCollector(Collector):
    """Reads the pairs' views when it is asked.

    :param views: what :meth:`nova_pmt.agent.pairs.Entry.view` brings, of every pair.
    """

    def __init__(self, host: str, views: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self._host = host
        self._views = views

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        views = list(self._views())
        state = GaugeMetricFamily(
            "nova_pmt_pair_state",
            "1 for the state that a pair is in on this host",
            labels=(*_LABELS, "role", "state", "primary_host", "standby_host"),
        )
        for view in views:
            state.add_metric(
                (*_names(view), view["role"], view["state"], view["primary_host"],
                 view["standby_host"]), 1,
            )  # fmt: skip
        yield state
        measured = [(view, view["stats"]) for view in views if view["stats"]]
        for key, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(f"nova_pmt_{name}", text, labels=_LABELS)
            for view, stats in measured:
                if key in stats:
                    counter.add_metric(_names(view), stats[key])
            yield counter
        for key, (name, text, scale) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"nova_pmt_{name}", text, labels=_LABELS)
            for view, stats in measured:
                if key in stats:
                    gauge.add_metric(_names(view), stats[key] * scale)
            yield gauge
        yield self._cache(measured)
        for key, text in _HISTOGRAMS.items():
            yield self._histogram(key, text, measured)

    @staticmethod
    def _cache(measured: list[tuple[dict[str, Any], dict[str, Any]]]) -> Metric:
        cache = GaugeMetricFamily(
            "nova_pmt_cache_bytes", "The guest's cache of checkpoints", labels=(*_LABELS, "kind")
        )
        for view, stats in measured:
            for kind in ("used", "backed", "peak", "limit"):
                size = stats.get("cache", {}).get(f"{kind}_mib")
                if size is not None:
                    cache.add_metric((*_names(view), kind), size * (1 << 20))
        return cache

    @staticmethod
    def _histogram(
        key: str, text: str, measured: list[tuple[dict[str, Any], dict[str, Any]]]
    ) -> Metric:
        family = HistogramMetricFamily(f"nova_pmt_round_{key}", text, labels=_LABELS)
        for view, stats in measured:
            found = stats.get("histograms", {}).get(key)
            if found is None:
                continue
            buckets, so_far = [], 0
            ends = (*map(str, found["bounds"]), "+Inf")
            for end, count in zip(ends, found["counts"], strict=True):
                so_far += count
                buckets.append((end, so_far))
            family.add_metric(_names(view), buckets, found["sum"])
        return family


def _names(view: dict[str, Any]) -> tuple[str, str]:
    return view["uuid"], view["name"]
