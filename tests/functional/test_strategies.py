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


"""Kemari and auto on real guests: when rounds start, what pauses have in them; nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_pmt.evaluation.campaign import CONFIG, Campaign, Options
from nova_pmt.lab import Disk, Lab, LabHost, Workload, deployment
from tests.functional.conftest import PEER_TIMEOUT_MS, Boot
from tests.functional.pairs import WorkerPair, protect
from tests.functional.test_failover import fail_over

#: It says nothing by itself, and writes little.
IDLE = Workload(tick_ms=100, console_every=0)
#: Longer than any test here.
LONG = {"epoch_limit_ms": 60_000}
QUIET_S = 3.0


def rounds(pair: WorkerPair) -> int:
    """Rounds as of now: statistics come twice a second."""
    time.sleep(1.2)
    return int(pair.primary.stats["rounds"])


def quiet_rounds(pair: WorkerPair) -> int:
    """How many there were while nobody asked the guest anything."""
    before = rounds(pair)
    time.sleep(QUIET_S)
    return rounds(pair) - before


def test_kemari_checkpoints_when_there_is_output_and_not_else(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one, workload=IDLE)
    with protect(guest, two, strategy="kemari", options=LONG) as pair:
        pair.protected()
        assert quiet_rounds(pair) <= 3  # somebody may ask for an address, or who has one
        before = pair.primary.stats["output_rounds"]
        guest.counter()  # a connection, a request, its answer
        pair.primary.wait_stats(lambda stats: stats["output_rounds"] >= before + 2)
        steps = pair.primary.stats["pause_steps_ms"]
        assert steps["wait"] > 0
        assert pair.primary.stats["in_flight"] == 0
        assert quiet_rounds(pair) <= 3


def test_kemari_checkpoints_when_the_guest_writes_to_a_disk(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    disk = Disk("/var/lib/libvirt/images/kemari.qcow2", 64)
    guest = boot(one, workload=IDLE, disks=(disk,))
    with protect(guest, two, strategy="kemari", options=LONG) as pair:
        pair.protected()
        guest.control("disk write seq 1024 16 vda", 60)
        pair.primary.wait_stats(lambda stats: stats["log_bytes_total"] >= 16 << 20)
        # Each block was a round's, or at least each command's part that QEMU got in one go.
        assert pair.primary.stats["output_rounds"] >= 4


@pytest.mark.parametrize("strategy", ["kemari", "auto"])
def test_the_standby_goes_on(one: LabHost, two: LabHost, boot: Boot, strategy: str) -> None:
    guest = boot(one)
    with protect(guest, two, strategy=strategy, options={"epoch_limit_ms": 500}) as pair:
        pair.protected().rounds(5)
        fail_over(guest, pair, two)


def test_auto_lets_epochs_grow_while_nobody_asks_and_answers_at_once(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one, workload=IDLE)
    with protect(guest, two, strategy="auto", options=LONG) as pair:
        pair.protected()
        pair.primary.wait_stats(lambda stats: stats["interval_ms"] >= 1600)
        before = pair.primary.stats["output_rounds"]
        guest.counter()
        pair.primary.wait_stats(lambda stats: stats["output_rounds"] > before)
        assert pair.primary.stats["pause_steps_ms"]["wait"] == 0


@pytest.fixture(params=["kemari", "auto"])
def configured(lab: Lab, request: pytest.FixtureRequest) -> Iterator[tuple[Lab, str]]:
    deployment.configure(lab, extra={**CONFIG, "checkpoint": {"strategy": request.param}})
    yield lab, request.param
    deployment.configure(lab, peer_timeout_ms=PEER_TIMEOUT_MS)


@pytest.mark.timeout(300)
def test_no_answered_request_is_lost(configured: tuple[Lab, str], tmp_path: Path) -> None:
    lab, strategy = configured
    campaign = Campaign(lab, Options(trials=3, seed=611, strategy=strategy), tmp_path)
    campaign.run()
    summary = campaign.write({})
    assert [result.problems for result in campaign.results if result.problems] == []
    wrong = ("lost", "repeated", "broken_connections", "image_mismatches", "image_check_errors")
    assert {key: summary[key] for key in wrong} == dict.fromkeys(wrong, 0)
    assert summary["failovers"] >= 1
