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

"""What Prometheus gets to see, over HTTP."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nova_pmt import exception
from nova_pmt.checkpoint.statistics import RoundRecord, Statistics
from nova_pmt.metrics.agent import PairsCollector
from nova_pmt.metrics.server import MetricsServer

UUID = "0d4f5c2e-1111-4222-8333-444455556666"


def rounds(*pauses_us: float) -> dict[str, Any]:
    """Statistics as a primary's worker tells them."""
    statistics = Statistics()
    for epoch, pause_us in enumerate(pauses_us, 1):
        statistics.add(
            RoundRecord(
                epoch=epoch,
                started_s=float(epoch),
                pause_us=pause_us,
                stop_us=1.0,
                scan_us=1.0,
                copy_us=1.0,
                save_us=1.0,
                cont_us=1.0,
                pages=20,
                pause_pages=3,
                commit_us=4000.0,
                device_bytes=40_000,
            )
        )
    more = {"sent_bytes": 5000, "in_flight": 1, "cache": {"used_mib": 2, "limit_mib": 512}}
    return {**json.loads(json.dumps(statistics.summary())), **more}


def view(**changes: Any) -> dict[str, Any]:
    return {
        "uuid": UUID,
        "name": 'we"b1',
        "role": "primary",
        "state": "protected",
        "primary_host": "a",
        "standby_host": "b",
        "stats": None,
        **changes,
    }


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def served(port: int) -> Iterator[tuple[int, list[dict[str, Any]], list[str]]]:
    """A port, the views that it tells of, and what is wrong."""
    views: list[dict[str, Any]] = []
    problems: list[str] = []
    server = MetricsServer(
        "127.0.0.1", port, [PairsCollector("a", lambda: views)], lambda: problems
    )
    yield port, views, problems
    server.close()


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def samples(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(fetch(port, "/metrics")):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_each_pair_is_told_with_its_state(served: Any) -> None:
    port, views, _ = served
    views += [view(), view(uuid="other", name="db", role="standby", state="waiting")]
    told = [(labels["name"], labels["role"], labels["state"]) for labels, value in
            samples(port)["nova_pmt_pair_state"]]  # fmt: skip
    assert told == [('we"b1', "primary", "protected"), ("db", "standby", "waiting")]


def test_rounds_are_told_as_counters_and_histograms(served: Any) -> None:
    port, views, _ = served
    views.append(view(stats=rounds(900.0, 4000.0, 9_000_000.0)))
    found = samples(port)
    assert found["nova_pmt_rounds_total"][0][1] == 3
    assert found["nova_pmt_sent_bytes_total"][0][1] == 5000
    assert found["nova_pmt_checkpoints_in_flight"][0][1] == 1
    assert {labels["kind"]: value for labels, value in found["nova_pmt_cache_bytes"]} == {
        "used": 2 << 20,
        "limit": 512 << 20,
    }
    buckets = {
        labels["le"]: value for labels, value in found["nova_pmt_round_pause_seconds_bucket"]
    }
    assert buckets["0.0005"] == 0
    assert buckets["0.001"] == 1
    assert buckets["0.005"] == 2
    assert buckets["5.0"] == 2
    assert buckets["+Inf"] == 3
    assert found["nova_pmt_round_pause_seconds_count"][0][1] == 3
    assert found["nova_pmt_round_pause_seconds_sum"][0][1] == pytest.approx(9.0049)
    assert found["nova_pmt_round_output_delay_seconds_count"][0][1] == 0, "nothing was held"


def test_a_standby_and_a_worker_of_an_older_release_have_fewer_figures(served: Any) -> None:
    port, views, _ = served
    views.append(view(role="standby", stats={"committed": 7}))
    assert "nova_pmt_rounds_total" not in samples(port)


def test_health_is_told_with_what_is_wrong(served: Any) -> None:
    port, _, problems = served
    assert json.loads(fetch(port, "/healthz")) == {"healthy": True, "problems": []}
    problems.append("the message bus does not answer")
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(port, "/healthz")
    with caught.value as answer:
        assert answer.code == 503
        assert json.loads(answer.read())["problems"] == problems


@pytest.mark.parametrize(("path", "data", "code"), [("/", None, 404), ("/metrics", b"x", 405)])
def test_anything_else_is_refused(served: Any, path: str, data: bytes | None, code: int) -> None:
    port, _, _ = served
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=10)
    with caught.value as answer:
        assert answer.code == code


def test_a_port_that_is_taken_is_refused_with_its_cure(served: Any) -> None:
    port, _, _ = served
    with pytest.raises(exception.ConfigError, match=str(port)):
        MetricsServer("127.0.0.1", port, [], list)


def test_no_port_is_opened_by_default() -> None:
    MetricsServer("127.0.0.1", 0, [], list).close()
