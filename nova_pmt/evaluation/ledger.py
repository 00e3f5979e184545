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

"""What clients know, against what the guest has in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nova_pmt.lab.transactions import Exchange, Record

#: Client and request.
Numbers = tuple[int, int]


@dataclass(frozen=True)
class Audit:
    """What is wrong; nothing when all lists are empty.

    :param lost: answered, and not in its place.
    :param repeated: a request that is there twice, or an answer that was given twice.
    :param strangers: is there, and nobody sent it, or it was answered otherwise.
    """

    lost: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        return not (self.lost or self.repeated or self.strangers)


class Ledger:
    """What one guest must have in memory, and on its disks.

    What memory was once seen to have it must have from then on: that, too, has left the guest.
    """

    def __init__(self) -> None:
        self._settled: dict[int, Numbers] = {}
        self._answered: list[Exchange] = []
        self._open: dict[Numbers, Exchange] = {}

    def take(self, exchanges: Iterable[Exchange]) -> int:
        """Take note of requests that are over, each once; returns how many were answered."""
        answered = 0
        for exchange in exchanges:
            if exchange.seq is None:
                self._open[exchange.client, exchange.request] = exchange
            else:
                self._answered.append(exchange)
                answered += 1
        return answered

    def audit(self, table: Sequence[Record]) -> Audit:
        """Compare the guest's table with what is known; changes nothing."""
        found = Audit()
        there = {entry.slot: (entry.client, entry.request) for entry in table}
        for entry in table:
            if not entry.good:
                found.strangers.append(f"place {entry.slot} says that it is {entry.seq}")
        expected = dict(self._settled)
        for seq, numbers in self._settled.items():
            if there.get(seq) != numbers:
                found.lost.append(_lost(seq, numbers, there.get(seq)))
        for exchange in self._answered:
            assert exchange.seq is not None
            seq, numbers = exchange.seq, (exchange.client, exchange.request)
            if expected.setdefault(seq, numbers) != numbers:
                found.repeated.append(f"answer {seq} was given to {expected[seq]} and {numbers}")
            if there.get(seq) != numbers:
                found.lost.append(_lost(seq, numbers, there.get(seq)))
        places: dict[Numbers, int] = {}
        for seq, numbers in there.items():
            if numbers in places:
                found.repeated.append(f"{numbers} is in places {places[numbers]} and {seq}")
            places.setdefault(numbers, seq)
            if expected.get(seq) != numbers and numbers not in self._open:
                found.strangers.append(f"place {seq}: {numbers}, which was not answered so")
        return found

    def settle(self, table: Sequence[Record]) -> None:
        """What is there now is what must be there from now on."""
        self._settled = {entry.slot: (entry.client, entry.request) for entry in table}
        self._answered.clear()
        for numbers in self._settled.values():
            self._open.pop(numbers, None)

    @property
    def records(self) -> int:
        """How many records the guest had when it was settled last."""
        return len(self._settled)

    def expected(self) -> list[Exchange]:
        """What must be on the disks, as :func:`nova_pmt.lab.transactions.check` wants it."""
        return [
            Exchange(client, request, 0.0, seq) for seq, (client, request) in self._settled.items()
        ]

    def possible(self) -> list[Exchange]:
        """What may be on the disks: it was sent, and never answered."""
        return list(self._open.values())


def _lost(seq: int, numbers: Numbers, instead: Numbers | None) -> str:
    there = "nothing" if instead is None else str(instead)
    return f"{numbers} was answered {seq}; there is {there}"
