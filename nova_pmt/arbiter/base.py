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

"""The contract of an arbiter (plug-ins ``nova_pmt.arbiters``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

Side = Literal["primary", "standby"]


@dataclass(frozen=True)
class Arrangement:
    """One generation of a pair, as the host on which the guest runs wants to begin it."""

    uuid: str
    name: str
    generation: int
    primary_host: str
    standby_host: str
    strategy: str = "pmt"
    options: dict[str, float] = field(default_factory=dict)


class Arbiter(ABC):
    """Decides, once for each generation of a pair, which side goes on.

    Made with the loaded configuration: ``arbiter(conf)``.
    """

    @abstractmethod
    def __init__(self, conf: Any) -> None: ...

    def warm(self) -> None:  # noqa: B027 - most have nothing to do
        """Be ready to be asked at once; never raises. May take long."""

    def begin(self, arrangement: Arrangement) -> None:  # noqa: B027 - some remember nothing
        """A generation begins. What was under way of this pair can be claimed by nobody any more.

        Called on the host that has the guest, before anything else of the generation exists. Can be
        asked again.

        :raises nova_pmt.exception.PairMismatch: another host has the guest.
        :raises nova_pmt.exception.ArbiterUnavailable: nobody could be asked.
        """

    @abstractmethod
    def claim(
        self,
        pair: str,
        generation: int,
        side: Side,
        *,
        reason: str = "",
        other_stopped: bool = False,
    ) -> bool:
        """Ask to go on. The first side that asks wins, for ever.

        Idempotent: an answer that got lost can be asked for again.

        :param pair: UUID of the server.
        :param reason: why, for the audit trail.
        :param other_stopped: the other side has said itself that its guest is gone or stands still:
            nobody has to make sure of it.
        :returns: whether this side is the one.
        :raises nova_pmt.exception.ArbiterUnavailable: nobody could be asked; the
            caller must neither run ahead nor release output.
        """

    @abstractmethod
    def winner(self, pair: str, generation: int) -> Side | None:
        """Which side won; None while nobody has claimed.

        :raises nova_pmt.exception.ArbiterUnavailable: nobody could be asked.
        """

    @abstractmethod
    def challenge(self, pair: str) -> str:
        """Leave a token that a peer which asks the same arbiter can see.

        To be called before a pair is made: an arbiter may refuse to decide about pairs of
        which nothing was left with it.
        """

    @abstractmethod
    def answer(self, pair: str, token: str) -> bool:
        """Whether the token that a peer left is seen here: is it the same arbiter?"""
