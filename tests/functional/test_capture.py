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

"""No packet of an epoch leaves before its commit, seen on the far side of the guest's tap."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nova_pmt.bench import capture
from nova_pmt.bench.report import Report
from nova_pmt.bench.violations import capture_passed
from nova_pmt.lab import Disk, LabHost, network
from tests.functional.conftest import Boot

SECONDS = 8.0
_IMAGES = "/var/lib/libvirt/images"


@pytest.mark.timeout(180)
def test_no_packet_leaves_before_its_commit(one: LabHost, two: LabHost, boot: Boot) -> None:
    disks = (Disk(f"{_IMAGES}/seen.qcow2", 96), Disk(f"{_IMAGES}/seen.raw", 96, format="raw"))
    guest = boot(one, mtu=network.JUMBO, disks=disks)
    with Report(Console(file=io.StringIO())) as quiet:
        row = capture.measure(guest, two, seconds=SECONDS, interval_ms=20, report=quiet)
    assert row["violations"] == 0, row
    # Every packet has its place in the stream, so none was given to a wrong epoch.
    assert (row["lost_captures"], row["unmatched_ends"], row["dropped_packets"]) == (0, 0, 0), row
    assert row["header_bytes"] == 12
    # Early ones would have been found.
    assert row["control_violations"] > row["packets"] / 4, row
    assert capture_passed(row)
    # There was load of all kinds, and there were epochs.
    assert row["packets"] > 500, row
    assert row["epochs"] > 20, row
    assert row["smallest"] <= 80, row
    assert row["largest"] >= 8900, row
    assert row["disk_bytes"] > 1 << 20, row
