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

"""What a campaign kills, and when: everything that is random, from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

T = TypeVar("T")
Kind = Literal["qemu", "worker", "both", "host"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: How long requests run before the kill, in seconds.
EARLIEST_S, LATEST_S = 0.2, 1.5


@dataclass(frozen=True)
class Plan:
    """One trial.

    :param kind: what is killed: the primary's ``qemu``; its ``worker``; ``both`` worker and agent;
        its ``host``.
    :param moment_s: how long requests run, protected, before.
    :param silent: ``host``: the network goes first, so that its peer hears nothing at all.
    """

    number: int
    kind: str
    moment_s: float
    silent: bool = False


def plans(seed: int, kinds: Sequence[str]) -> Iterator[Plan]:
    """Trials without end. The same arguments give the same trials, however many are taken.

    The kinds come in shuffled blocks, so that each comes equally often.
    """
    random_ = random.Random(seed)
    for number, kind in enumerate(shuffled(random_, kinds), 1):
        moment_s = round(random_.uniform(EARLIEST_S, LATEST_S), 6)
        silent = random_.random() < 0.5
        yield Plan(number, kind, moment_s, silent and kind == "host")


def shuffled(random_: random.Random, things: Sequence[T]) -> Iterator[T]:
    """All of them in some order, and again in another, without end."""
    while True:
        block = list(things)
        random_.shuffle(block)
        yield from block
