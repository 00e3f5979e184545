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

"""Which host a standby goes to: a pure function of what the managers know of the hosts.

The agents of both hosts look closer and may refuse; then the next one is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nova_pmt.manager.db.api import HostRow, PairRow


@dataclass(frozen=True)
class Choice:
    """The best host first; and why each other one was left out."""

    hosts: tuple[str, ...]
    left_out: dict[str, str]


def candidates(pair: PairRow, hosts: Iterable[HostRow], load: Mapping[str, int]) -> Choice:
    """Hosts for a new standby of a guest that runs on ``pair.active_host``.

    First those that hold images of its disks, which then need only what has changed; then those
    with the fewest guests that are in a pair, so that one host's death hits few; then those with
    the most free memory.

    :param load: guests that are in a pair, on either side, by host.
    """
    known = {host.name: host for host in hosts}
    active = known.get(pair.active_host)
    model = _fact(active, "cpu_model")
    found, left_out = [], {}
    for host in known.values():
        if host.name == pair.active_host:
            left_out[host.name] = "the guest runs there"
        elif not host.alive:
            left_out[host.name] = "its agent is silent"
        elif host.maintenance:
            left_out[host.name] = "it is in maintenance"
        elif model and _fact(host, "cpu_model") and _fact(host, "cpu_model") != model:
            left_out[host.name] = f"its CPU is another one than {pair.active_host}'s"
        else:
            found.append(host)
    holds_images = {pair.primary_host, pair.standby_host}
    found.sort(
        key=lambda host: (
            host.name not in holds_images,
            load.get(host.name, 0),
            -_number(host, "memory_free_bytes"),
            host.name,
        )
    )
    return Choice(tuple(host.name for host in found), left_out)


def _fact(host: HostRow | None, name: str) -> Any:
    return host.facts.get(name) if host is not None else None


def _number(host: HostRow, name: str) -> float:
    value = _fact(host, name)
    # (An integer may be greater than any float.)
    return float(min(value, 1 << 62)) if isinstance(value, (int, float)) else 0.0
