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

"""One survivor, by itself, whatever fails: some trials of the fault campaign."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from nova_pmt.evaluation.campaign import Options
from nova_pmt.evaluation.faultcampaign import FaultCampaign, fault_lab
from nova_pmt.lab import Lab, LabHost, network

#: One of each, on the sides that this seed draws.
TRIALS, SEED = 8, 20_301
KINDS = (
    *("qemu-kill", "worker-kill", "worker-stop", "host-kill"),
    *("both-cut", "rabbit-stop", "managers-kill", "database-lock"),
)
PORT = 5999


@pytest.fixture(scope="module")
def cloud() -> Iterator[Lab]:
    with fault_lab() as (lab, _):
        yield lab


def arrive(source: LabHost, target: LabHost, count: int = 20) -> int:
    """How many datagrams get from one host to another over the replication network."""

    def bound(host: LabHost) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host.repl_ip, PORT))
        sock.settimeout(0.5)
        return sock

    found = 0
    with (
        source.in_network(lambda: bound(source)) as sender,
        target.in_network(lambda: bound(target)) as receiver,
        contextlib.suppress(TimeoutError),
    ):
        for _ in range(count):
            sender.sendto(b"x", (target.repl_ip, PORT))
            time.sleep(0.001)  # not faster than a queue can take them
        while receiver.recv(16):
            found += 1
    return found


@pytest.mark.parametrize(("way", "to", "back"), [("in", 20, 0), ("out", 0, 20)])
def test_a_cable_can_lose_one_way_only(
    cloud: Lab, way: Literal["in", "out"], to: int, back: int
) -> None:
    one, two, _ = cloud.computes
    link = one.link("repl")
    if network.missing("block", cloud.ctl.init_pid):
        pytest.skip("no ebtables")
    assert (arrive(one, two), arrive(two, one)) == (20, 20)
    link.block(way)
    try:
        assert (arrive(one, two), arrive(two, one)) == (to, back)
    finally:
        link.unblock()
    assert (arrive(one, two), arrive(two, one)) == (20, 20)


def test_a_cable_can_lose_some_at_random(cloud: Lab) -> None:
    one, two, _ = cloud.computes
    if network.missing("lose", cloud.ctl.init_pid):
        pytest.skip("no iptables with 'statistic'")
    one.link("repl").lose(0.5)
    try:
        assert 0 < arrive(two, one, 100) < 100
    finally:
        one.link("repl").keep()
    assert arrive(two, one, 100) == 100


@pytest.mark.timeout(600)
def test_whatever_fails_one_survivor_is_protected_again_by_itself(
    cloud: Lab, tmp_path: Path
) -> None:
    campaign = FaultCampaign(cloud, Options(trials=TRIALS, seed=SEED, kinds=KINDS), tmp_path)
    campaign.run()
    summary = campaign.write({})
    assert [result.problems for result in campaign.results if result.problems] == []
    wrong = (
        *("lost", "repeated", "broken_connections", "image_mismatches", "image_check_errors"),
        *("split_brain", "early_releases", "leftovers", "unrecovered"),
    )
    assert {key: summary[key] for key in wrong} == dict.fromkeys(wrong, 0)
    assert summary["trials"] + len(campaign.voids) == TRIALS
    assert sum(summary["faults"]["kinds"].values()) >= TRIALS - len(campaign.voids)
    assert summary["gap_ms"]["max"] > 0
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == summary["trials"]
