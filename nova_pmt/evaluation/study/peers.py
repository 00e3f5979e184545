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

"""What others stop the same guest for, under the same load; and the limit, copying the pages.

* ``memcpy``: as many pages as a checkpoint of ``pmt`` had, copied in memory.
* ``live-migration``: QEMU's switchover, after as much pre-copy as it likes, with the longest pause
  that it plans for at its default of 300 ms; to a socket here whose reader throws all away, so that
  neither a network nor a destination is in it.
* ``snapshot``: the stop part of libvirt's live snapshot of memory, to tmpfs.
* ``stop-and-copy``: all memory, to such a socket, while the guest stands.

None of them does this again and again: a guest is not protected by any.
"""

from __future__ import annotations

from typing import Any

from nova_pmt.bench.child import Child
from nova_pmt.bench.rows import quantiles
from nova_pmt.evaluation.study.cell import Place
from nova_pmt.lab import LabGuest

#: The "strategy" of a place where the peers are measured, and those of its rows.
PEERS = "peers"
NAMES = ("memcpy", "live-migration", "snapshot", "stop-and-copy")
_TIMES = 3
_MODULE = "nova_pmt.evaluation.study.peers_inside"


def measure(
    place: Place, guest: LabGuest, seconds: float, pages: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each peer, and what could not be measured, with its reason (``why``).

    :param seconds: for so long the scenario is driven each time.
    :param pages: of a checkpoint of ``pmt``; None: not known.
    :raises nova_pmt.exception.PmtError: the lab failed.
    """
    rows, failures = [], []
    with Child(guest.host, _MODULE, {"domain": guest.uuid}) as child:
        for name in NAMES:
            if name == "memcpy" and not pages:
                continue
            request = {"peer": name, "times": _TIMES, "pages": pages}
            with place.scenario.driven(guest, seconds):
                answer = child.ask(request)
            facts, pauses = {**place.facts(), "strategy": name}, answer["pauses_ms"]
            if not pauses:
                failures.append({**facts, "why": answer["why"]})
                continue
            times = quantiles(pauses)
            rows.append({**facts, "pause_p50_ms": times["p50"], "pause_max_ms": times["max"]})
    return rows, failures
