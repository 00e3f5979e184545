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

"""What a compute host tells the scheduler: written by the driver, read by filter and weigher.

It travels in ``ComputeNode.stats``, where everything is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PREFIX = "pmt_"
UP = "up"
#: Keys that the filter reads itself: making an object of each of 1,000 hosts would take it longer
#: than all the rest.
AGENT, CPU_MODEL = f"{_PREFIX}agent", f"{_PREFIX}cpu_model"
MACHINE_TYPES, BACKING_FREE_MIB = f"{_PREFIX}machine_types", f"{_PREFIX}backing_free_mib"


@dataclass(frozen=True)
class HostStats:
    """One host.

    :param agent: its agent is alive.
    :param backing_free_mib: room for the memory of standbys.
    :param standbys: how many it has.
    :param replication_mbit: of the network of the checkpoints; 0: not known.
    """

    agent: bool = False
    release: str = ""
    cpu_model: str = ""
    machine_types: frozenset[str] = frozenset()
    backing_free_mib: int = 0
    standbys: int = 0
    replication_mbit: int = 0

    @classmethod
    def read(cls, stats: Mapping[str, Any] | None) -> HostStats:
        """From a host's stats; what is not there, or is no number, is as if there was none."""
        found = stats or {}

        def text(name: str) -> str:
            return str(found.get(_PREFIX + name, ""))

        def number(name: str) -> int:
            return int(text(name)) if text(name).isdecimal() else 0

        return cls(
            agent=text("agent") == UP,
            release=text("release"),
            cpu_model=text("cpu_model"),
            machine_types=frozenset(filter(None, text("machine_types").split(","))),
            backing_free_mib=number("backing_free_mib"),
            standbys=number("standbys"),
            replication_mbit=number("replication_mbit"),
        )

    def write(self) -> dict[str, str]:
        """For ``ComputeNode.stats``."""
        return {
            f"{_PREFIX}agent": UP if self.agent else "down",
            f"{_PREFIX}release": self.release,
            f"{_PREFIX}cpu_model": self.cpu_model,
            f"{_PREFIX}machine_types": ",".join(sorted(self.machine_types)),
            f"{_PREFIX}backing_free_mib": str(self.backing_free_mib),
            f"{_PREFIX}standbys": str(self.standbys),
            f"{_PREFIX}replication_mbit": str(self.replication_mbit),
        }
