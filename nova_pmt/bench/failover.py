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

"""``nova-pmt-bench failover``: from the SIGKILL of the primary's QEMU until the standby runs.

Whole pairs with agents; the guest goes back and forth between the two hosts, killed each time.
Both hosts are on this machine, so that one clock (CLOCK_MONOTONIC) tells both times.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from nova_pmt.bench.report import Report
from nova_pmt.bench.rows import quantiles
from nova_pmt.lab import GuestSpec, Lab, Workload, deployment

WORKLOAD = Workload(console_every=0, dirty_pages=600, dirty_ms=20)
#: Rounds go on for so long before the kill.
PROTECTED_S = 1.0


def run(*, runs: int, report: Report) -> list[dict[str, Any]]:
    """Measure. Returns one row with the quantiles over all runs.

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    total, detection, activation = [], [], []
    with Lab(computes=2) as lab:
        report.note("two hosts with agents, a guest of 128 MiB")
        deployment.deploy(lab)
        here, there = lab.computes
        guest = here.boot(GuestSpec("bench-failover", workload=WORKLOAD))
        guest.wait_ready(120)
        for done in range(runs):
            deployment.operate(lab, "protect", guest.name, "--standby", there.name)
            time.sleep(PROTECTED_S)
            pid = guest.pid
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            event = deployment.takeover(lab, there, since=killed)
            total.append((event["running_at"] - killed) * 1e3)
            detection.append((event["detected_at"] - killed) * 1e3)
            activation.append(event["failover_ms"])
            guest = guest.on(there)
            here, there = there, here
            report.progress("failovers", done + 1, runs)
    return [
        {
            "runs": runs,
            "failover_ms": quantiles(total),
            "detection_ms": quantiles(detection),
            "activation_ms": quantiles(activation),
        }
    ]
