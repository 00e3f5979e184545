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

"""The contract of a strategy (plug-ins ``nova_pmt.strategies``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from nova_pmt.checkpoint.statistics import RoundRecord


@dataclass(frozen=True)
class StrategyOptions:
    """What a strategy may be told.

    :param interval_ms: from the start of one pause to the start of the next.
    :param max_pause_ms: wanted length of the pause; 0 for none.
    :param passes: pre-copy passes before each pause.
    :param epoch_limit_ms: the same as interval_ms where rounds begin with output: the longest.
    """

    interval_ms: float = 50.0
    max_pause_ms: float = 0.0
    passes: int = 2
    epoch_limit_ms: float = 10_000.0


class Strategy(ABC):
    """Says when a round starts. A pure function of what it was shown: no clock of its own."""

    #: The guest stays paused until the standby has committed the checkpoint.
    synchronous: ClassVar[bool] = False
    #: Writes to disks are output that begins a round.
    disks_are_output: ClassVar[bool] = False

    def __init__(self, options: StrategyOptions) -> None:
        self.options = options

    @property
    def output_wait_s(self) -> float | None:
        """A round starts this many seconds after an epoch's first output; None: output starts none.

        Whether it is None stays as it is for a strategy's life.
        """
        return None

    @property
    def passes(self) -> int:
        """Pre-copy passes before the next pause."""
        return self.options.passes

    @property
    @abstractmethod
    def interval_s(self) -> float:
        """Seconds from the start of the last pause to the start of the next."""

    @abstractmethod
    def observe(self, record: RoundRecord) -> None:
        """A round was committed; the strategy may learn from it."""
