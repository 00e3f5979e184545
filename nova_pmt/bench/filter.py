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

"""``nova-pmt-bench filter``: what the filter adds to the scheduling of one request.

Nova's own filter loop with three of its filters, with ours and without it, on hosts as the
scheduler holds them. Ours asks the database, as it does in a scheduler; here it is SQLite in
memory, so that the way to a real one has to be added: one statement for each request.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass
from typing import Any

from nova_pmt import exception
from nova_pmt.bench.report import Report
from nova_pmt.bench.rows import quantiles

KINDS = ("unprotected", "protected", "standby")
#: At p50, with 1,000 hosts and 100 pairs.
GOAL_MS = 2.0
_WARM_UP = 10


@dataclass(frozen=True)
class Options:
    """How large the cloud is, and how many requests of each kind are measured."""

    hosts: int = 1000
    pairs: int = 100
    rounds: int = 300


def run(options: Options, progress: Report) -> list[dict[str, Any]]:
    """Measure; a row for each kind of request.

    :raises nova_pmt.exception.NovaMissing: Nova is not installed here.
    """
    if importlib.util.find_spec("nova") is None:
        raise exception.NovaMissing("the benchmark runs Nova's scheduler, which is not here")
    # Else Nova's modules load eventlet, which wants to be first.
    os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nova_pmt.openstack.nova import bench

        bench.prepare()
    progress.note(f"making {options.hosts} hosts, {options.pairs} pairs")
    cloud = bench.Cloud(options.hosts, options.pairs)
    rows = []
    for kind in KINDS:
        for number in range(_WARM_UP):
            cloud.measure(kind, number)
        samples = []
        for number in range(options.rounds):
            samples.append(cloud.measure(kind, number))
            progress.progress(kind, number + 1, options.rounds)
        added = quantiles([sample.added_ms for sample in samples])
        rows.append(
            {
                "request": kind,
                "hosts": options.hosts,
                "pairs": options.pairs,
                "rounds": options.rounds,
                "passing": samples[0].passing,
                "without_ms": quantiles([sample.without_ms for sample in samples]),
                "added_ms": added,
                "added_cpu_ms": quantiles([sample.added_cpu_ms for sample in samples]),
                "goal_ms": GOAL_MS,
                "met": added["p50"] <= GOAL_MS,
            }
        )
    return rows
