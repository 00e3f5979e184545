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

"""Kemari: output starts a round, and the guest stays paused until the standby has all of it.

The yardstick of PMT-Checkpointing (Tamura, Sato, Kihara, Moriai: "Kemari: Virtual Machine
Synchronization for Fault Tolerance", USENIX 2008 poster). The event is the epoch's first held
packet, or its first write to a disk; nothing is copied ahead of it, since nobody knows when it
comes. Without output nothing is sent but heartbeats, up to ``epoch_limit_ms``, which bounds how
much of its work a failover may take back from a guest.
"""

from __future__ import annotations

from typing import ClassVar

from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.checkpoint.strategies.base import Strategy


class KemariStrategy(Strategy):
    """See the module's text. Of the options only ``epoch_limit_ms`` counts."""

    synchronous: ClassVar[bool] = True
    disks_are_output: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        return 0

    @property
    def interval_s(self) -> float:
        return self.options.epoch_limit_ms / 1e3

    @property
    def output_wait_s(self) -> float | None:
        return 0.0

    def observe(self, record: RoundRecord) -> None:
        """It has nothing to learn."""
