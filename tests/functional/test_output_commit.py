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

"""Nothing that a client was answered is ever lost; and the test that says so can fail."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_pmt.evaluation import images
from nova_pmt.evaluation.campaign import CONFIG, Campaign, Options
from nova_pmt.lab import Lab, deployment
from tests.functional.conftest import PEER_TIMEOUT_MS

TRIALS, SEED = 20, 20_261


@pytest.fixture(scope="module")
def configured(lab: Lab) -> Iterator[Lab]:
    """The lab of all tests, with a campaign's configuration for as long as it takes."""
    deployment.configure(lab, extra=CONFIG)
    yield lab
    deployment.configure(lab, peer_timeout_ms=PEER_TIMEOUT_MS)


def run(lab: Lab, options: Options, directory: Path) -> Campaign:
    campaign = Campaign(lab, options, directory)
    campaign.run()
    return campaign


@pytest.mark.timeout(600)
def test_no_answered_request_is_lost_whatever_is_killed(configured: Lab, tmp_path: Path) -> None:
    campaign = run(configured, Options(trials=TRIALS, seed=SEED), tmp_path)
    summary = campaign.write({})
    assert [result.problems for result in campaign.results if result.problems] == []
    assert all(result.clean for result in campaign.results)
    wrong = ("lost", "repeated", "broken_connections", "image_mismatches", "image_check_errors")
    assert {key: summary[key] for key in wrong} == dict.fromkeys(wrong, 0)
    assert summary["trials"] + len(campaign.voids) == TRIALS
    assert summary["failovers"] >= 10
    assert summary["answered"] > 500
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == summary["trials"]


@pytest.mark.timeout(600)
def test_answers_are_lost_when_packets_are_not_held(configured: Lab, tmp_path: Path) -> None:
    options = Options(trials=30, seed=SEED, kinds=("qemu",), negative=True, until_loss=True)
    campaign = run(configured, options, tmp_path)
    assert campaign.succeeded
    assert campaign.write({})["lost"] > 0


def test_a_corrupt_image_is_found(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 1M", path], check=True, capture_output=True)
    assert images.check(str(path), "qcow2") == (0, 0)
    with path.open("r+b") as image:
        image.seek(2 << 16)  # the first block of reference counts
        image.write(bytes(16))
    errors, _ = images.check(str(path), "qcow2")
    assert errors > 0
    assert images.check(str(path), "raw") == (0, 0)
