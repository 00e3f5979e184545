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

"""What a fault campaign does to a pair, and when: everything that is random, from one seed.

A trial has one fault, or two at once, or a worker that dies at a named step. A fault is put right
after some time: a process that was stopped goes on, a cable is plugged in again, what was killed is
started again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from nova_pmt import faultpoint
from nova_pmt.evaluation.plan import EARLIEST_S, LATEST_S, shuffled

#: What each fault can be done to: a side of the pair, or neither.
SIDES = ("primary", "standby")
_NOBODY = ("",)
#: Every single fault.
FAULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # SIGKILL, and SIGSTOP until it is put right
        "qemu-kill": SIDES,
        "qemu-stop": SIDES,
        "worker-kill": SIDES,
        "worker-stop": SIDES,
        "agent-kill": SIDES,
        "agent-stop": SIDES,
        "manager-kill": _NOBODY,
        "manager-stop": _NOBODY,
        "managers-kill": _NOBODY,
        "managers-stop": _NOBODY,
        "rabbit-kill": _NOBODY,
        "rabbit-stop": _NOBODY,
        "database-lock": _NOBODY,
        # the whole host: its power cut, or all its processes stopped
        "host-kill": SIDES,
        "host-stop": SIDES,
        # cables of a host
        "repl-cut": SIDES,
        "mgmt-cut": SIDES,
        "both-cut": SIDES,
        "data-cut": SIDES,
        "repl-one-way": SIDES,
        "mgmt-one-way": SIDES,
        "repl-loss": SIDES,
        "repl-slow": SIDES,
        "repl-delay": SIDES,
        "repl-corrupt": SIDES,
    }
)
#: What needs three managers over a database server of their own.
CLUSTER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # the primary's QEMU dies, and within half a second all managers but one
        "failover": ("primary",),
        # it is away for a minute
        "database-kill": _NOBODY,
        "database-stop": _NOBODY,
    }
)
STEP, TWO = "step", "two"
#: What a trial can be.
KINDS: tuple[str, ...] = (*FAULTS, STEP, TWO)
#: There are many of these, so they come that often in a block in which the others come once.
_WEIGHTS = {STEP: 5, TWO: 5, "failover": 15}
#: Faults that end the guest's QEMU on their side.
_ENDS_QEMU = frozenset({"qemu-kill", "host-kill"})
#: Faults of the standby's side after which there is no standby that could go on.
_ENDS_STANDBY = frozenset({"qemu-kill", "host-kill", "worker-kill", "agent-kill"})
#: A fault that lasts is put right after so long, in seconds; drawn on a logarithmic scale.
SHORTEST_S, LONGEST_S = 0.3, 8.0
#: The second of two faults comes after at most so long, in seconds.
_APART_S = 0.5
#: A database server is away for so long, in seconds.
DATABASE_AWAY_S = 60.0
#: Of them one survives a ``failover``.
_CLUSTER_MANAGERS = 3
#: A worker dies when it comes to its step for the time that is drawn up to this one.
_LATEST_ROUND = 60
_WAYS = ("in", "out")
#: Whose worker dies at steps of this name, and what brings it there after it was begun.
STEPS_OF: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "sync": ("primary", ""),
        "round": ("primary", ""),
        "standby": ("standby", ""),
        "switchover": ("primary", "switchover"),
        "failover": ("standby", "repl-cut"),
    }
)
#: A standby that dies after it has won has to be one that wins: its primary's guest is dead.
_AFTER_CLAIM = frozenset({"failover.claimed", "failover.resumed"})


@dataclass(frozen=True)
class Fault:
    """One fault.

    :param kind: of :data:`FAULTS`, or ``step``.
    :param side: whose; by the parts as they are when the trial begins.
    :param seconds: how long it lasts, if it lasts.
    :param patient: and longer, until it is decided who goes on (within reason).
    :param after_s: how long after the trial's moment it comes.
    :param way: of ``one-way``: packets ``in`` to the host, or ``out`` of it, are lost.
    :param silent: of ``host-kill``: the network goes first, so that its peers hear nothing.
    :param number: of the manager, from 1.
    :param amount: of ``repl-loss``: a part of 1; of ``repl-slow``: Mbit/s; of ``repl-delay``: ms.
    :param step: of ``step``: its name.
    :param nth: of ``step``: it is the one after so many.
    :param trigger: of ``step``: what makes the worker come there.
    """

    kind: str
    side: str = ""
    seconds: float = 0.0
    patient: bool = False
    after_s: float = 0.0
    way: str = ""
    silent: bool = False
    number: int = 0
    amount: float = 0.0
    step: str = ""
    nth: int = 1
    trigger: str = ""

    @property
    def name(self) -> str:
        """In few words."""
        words = [self.kind, self.side, self.way, self.step, "silent" if self.silent else ""]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class FaultPlan:
    """One trial.

    :param kind: of :data:`KINDS`.
    :param moment_s: how long requests run, protected, before.
    """

    number: int
    kind: str
    moment_s: float
    faults: tuple[Fault, ...]

    @property
    def silent(self) -> bool:
        """A host falls silent."""
        return any(fault.silent for fault in self.faults)

    @property
    def name(self) -> str:
        """In few words."""
        return " + ".join(fault.name for fault in self.faults)

    @property
    def may_lose(self) -> bool:
        """Two faults at once that nobody could survive: the guest's QEMU dies, and its standby."""
        return len(self.faults) > 1 and _lethal(self.faults)


def fault_plans(seed: int, kinds: Sequence[str] = KINDS) -> Iterator[FaultPlan]:
    """Trials without end. The same arguments give the same trials, however many are taken.

    Kinds come in shuffled blocks, sides and steps as well, so that each comes equally often. Two
    faults at once are of the single ones among the kinds; of all, if there are fewer than two.
    """
    random_ = random.Random(seed)
    block = [kind for kind in kinds for _ in range(_WEIGHTS.get(kind, 1))]
    single = [kind for kind in kinds if kind in FAULTS]
    pool = single if len(single) > 1 else list(FAULTS)
    sides = {kind: shuffled(random_, FAULTS[kind]) for kind in single}
    steps = shuffled(random_, faultpoint.WORKER_STEPS)
    for number, kind in enumerate(shuffled(random_, block), 1):
        moment_s = round(random_.uniform(EARLIEST_S, LATEST_S), 6)
        if kind == STEP:
            faults: tuple[Fault, ...] = (_step(random_, next(steps)),)
        elif kind == TWO:
            faults = _two(random_, pool)
        elif kind == "failover":
            faults = _failover(random_)
        elif kind in CLUSTER:
            faults = (Fault(kind, seconds=DATABASE_AWAY_S),)
        else:
            faults = (_fault(random_, kind, next(sides[kind])),)
        yield FaultPlan(number, kind, moment_s, faults)


def _fault(random_: random.Random, kind: str, side: str, after_s: float = 0.0) -> Fault:
    # Everything is drawn for every fault, so that a kind more does not change all that follows.
    seconds = round(SHORTEST_S * (LONGEST_S / SHORTEST_S) ** random_.random(), 3)
    patient, silent = random_.random() < 0.5, random_.random() < 0.5
    way, number, amount = random_.choice(_WAYS), random_.randint(1, 2), random_.random()
    return Fault(
        kind,
        side,
        seconds=seconds,
        patient=patient,
        after_s=after_s,
        way=way if kind.endswith("-one-way") else "",
        silent=silent and kind == "host-kill",
        number=number if kind.startswith("manager-") else 0,
        amount=_amount(kind, amount),
    )


def _amount(kind: str, part: float) -> float:
    """How much of it, of what there is."""
    ranges = {"repl-loss": (0.01, 0.3), "repl-corrupt": (0.001, 0.02)}
    ranges.update({"repl-slow": (50.0, 500.0), "repl-delay": (5.0, 100.0)})
    low, high = ranges.get(kind, (0.0, 0.0))
    return round(low + (high - low) * part, 4)


def _two(random_: random.Random, kinds: Sequence[str]) -> tuple[Fault, ...]:
    """Any two; but not such as end both QEMUs, nor the same thing twice."""
    while True:
        after_s = round(random_.uniform(0.0, _APART_S), 3)
        faults = tuple(
            _fault(random_, kind, random_.choice(FAULTS[kind]), apart)
            for kind, apart in zip(random_.choices(kinds, k=2), (0.0, after_s), strict=True)
        )
        ended = {fault.side for fault in faults if fault.kind in _ENDS_QEMU}
        if len(ended) < 2 and len({(fault.kind, fault.side) for fault in faults}) == 2:
            return faults


def _failover(random_: random.Random) -> tuple[Fault, ...]:
    """It must be decided by the manager that is left: the others stay away until then."""
    survivor = random_.randint(1, _CLUSTER_MANAGERS)
    after_s = (round(random_.uniform(0.0, _APART_S), 3) for _ in range(2))
    faults = (
        Fault("qemu-kill", "primary", after_s=next(after_s)),
        Fault(
            "managers-most-kill",
            seconds=SHORTEST_S,
            patient=True,
            after_s=next(after_s),
            number=survivor,
        ),
    )
    return tuple(sorted(faults, key=lambda fault: fault.after_s))


def _step(random_: random.Random, step: str) -> Fault:
    group = step.partition(".")[0]
    side, trigger = STEPS_OF[group]
    nth = random_.randint(1, _LATEST_ROUND)
    if step in _AFTER_CLAIM:
        trigger = "qemu-kill"
    return Fault(
        STEP,
        side,
        seconds=SHORTEST_S,
        patient=True,
        step=step,
        nth=nth if group in ("round", "standby") else 1,
        trigger=trigger,
    )


def _lethal(faults: Iterable[Fault]) -> bool:
    return any(
        one.side == "primary"
        and one.kind in _ENDS_QEMU
        and other.side == "standby"
        and other.kind in _ENDS_STANDBY
        for one, other in itertools.permutations(faults, 2)
    )
