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

"""``nova-pmt-bench qmp``: the qemu.qmp library against our own monitor, on one guest.

QEMU 7.2 cannot be given a second monitor at run time, and one monitor serves one client at a
time: so the clients take turns on the same socket, in blocks of some rounds.
"""

from __future__ import annotations

from typing import Any, Literal

from nova_pmt.bench.child import Child
from nova_pmt.bench.report import Report
from nova_pmt.bench.rows import qmp_row
from nova_pmt.lab import GuestSpec, Lab, Workload


def run(
    *,
    memory_mib: int,
    machine: Literal["q35", "pc"],
    vcpus: int,
    rounds: int,
    block: int,
    progress: Report,
) -> tuple[dict[str, Any], str]:
    """Boot a guest and measure. Returns the row and QEMU's version.

    :raises nova_pmt.exception.PmtError: the lab, the guest or the measuring failed.
    """
    with Lab(computes=1, rabbit=False) as lab:
        progress.note(f"booting a guest of {memory_mib} MiB")
        guest = lab.computes[0].boot(
            GuestSpec(
                "bench-qmp",
                memory_mib=memory_mib,
                vcpus=vcpus,
                machine=machine,
                workload=Workload(console_every=0, dirty_pages=200, dirty_ms=10),
            )
        )
        guest.wait_ready(120)
        with Child(guest.host, "nova_pmt.bench.measure_qmp", {"domain": guest.uuid}) as child:
            result = child.ask(
                {"rounds": rounds, "block": block, "interval_ms": 20},
                lambda done, total: progress.progress("clients in turn", done, total),
            )
            row = qmp_row(
                result["samples"], memory_mib=memory_mib, machine=machine, vcpus=vcpus, block=block
            )
            return row, str(child.started["qemu"])
