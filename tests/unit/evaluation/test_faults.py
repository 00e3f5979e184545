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

"""Plans of a fault campaign: everything follows from the seed, and everything comes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from nova_pmt import faultpoint
from nova_pmt.evaluation.faults import (
    CLUSTER,
    FAULTS,
    KINDS,
    LONGEST_S,
    SHORTEST_S,
    STEPS_OF,
    Fault,
    FaultPlan,
    fault_plans,
)
from nova_pmt.evaluation.plan import EARLIEST_S, LATEST_S


def take(seed: int, count: int, kinds: tuple[str, ...] = KINDS) -> list[FaultPlan]:
    return list(itertools.islice(fault_plans(seed, kinds), count))


def test_a_seed_gives_the_same_trials_again_however_many_are_taken() -> None:
    assert take(7, 40) == take(7, 500)[:40]
    assert take(7, 40) != take(8, 40)


def test_all_kinds_sides_and_steps_are_drawn() -> None:
    plans = take(3, 400)
    assert {plan.kind for plan in plans} == set(KINDS)
    single = {(fault.kind, fault.side) for plan in plans for fault in plan.faults}
    assert single >= {(kind, side) for kind, sides in FAULTS.items() for side in sides}
    assert {fault.step for plan in plans for fault in plan.faults} - {""} == set(
        faultpoint.WORKER_STEPS
    )


def test_each_kind_comes_equally_often_and_steps_and_pairs_more() -> None:
    counts = Counter(plan.kind for plan in take(5, 35 * 10))
    assert set(counts.values()) == {10, 50}
    assert counts["step"] == counts["two"] == 50


def test_moments_and_durations_are_all_over_their_ranges() -> None:
    plans = take(5, 400)
    moments = [plan.moment_s for plan in plans]
    assert EARLIEST_S <= min(moments) < max(moments) <= LATEST_S
    lasting = [fault.seconds for plan in plans if plan.kind != "step" for fault in plan.faults]
    assert SHORTEST_S <= min(lasting) < 0.5
    assert 6.0 < max(lasting) <= LONGEST_S
    assert {fault.patient for plan in plans for fault in plan.faults} == {True, False}
    assert {fault.way for plan in plans for fault in plan.faults} == {"", "in", "out"}
    assert {fault.number for plan in plans for fault in plan.faults} == {0, 1, 2}


def test_two_faults_never_end_both_qemus_and_are_never_the_same() -> None:
    for plan in take(9, 200, ("two",)):
        one, other = plan.faults
        assert (one.kind, one.side) != (other.kind, other.side)
        ends = {fault.side for fault in plan.faults if fault.kind in ("qemu-kill", "host-kill")}
        assert len(ends) < 2


def test_two_faults_are_of_the_kinds_that_were_asked_for() -> None:
    plans = take(9, 50, ("qemu-kill", "database-lock", "two"))
    drawn = {fault.kind for plan in plans for fault in plan.faults}
    assert drawn == {"qemu-kill", "database-lock"}


@pytest.mark.parametrize(
    ("one", "other", "lost"),
    [
        (("qemu-kill", "primary"), ("worker-kill", "standby"), True),
        (("agent-kill", "standby"), ("host-kill", "primary"), True),
        (("qemu-kill", "standby"), ("worker-kill", "primary"), False),
        (("qemu-kill", "primary"), ("worker-stop", "standby"), False),
        (("qemu-kill", "primary"), ("rabbit-kill", ""), False),
    ],
)
def test_a_pair_may_be_lost_only_when_guest_and_standby_end(
    one: tuple[str, str], other: tuple[str, str], lost: bool
) -> None:
    assert FaultPlan(1, "two", 0.5, (Fault(*one), Fault(*other))).may_lose is lost
    assert not FaultPlan(1, one[0], 0.5, (Fault(*one),)).may_lose


def test_every_step_of_the_product_belongs_to_a_side() -> None:
    assert {step.partition(".")[0] for step in faultpoint.WORKER_STEPS} <= set(STEPS_OF)


def test_a_standby_that_dies_after_it_won_has_one_to_take_over_from() -> None:
    steps = {plan.faults[0].step: plan.faults[0] for plan in take(1, 100, ("step",))}
    assert steps["failover.claimed"].trigger == "qemu-kill"
    assert steps["failover.detected"].trigger == "repl-cut"  # its primary lives: nobody is lost
    assert steps["switchover.paused"].trigger == "switchover"
    assert steps["round.paused"].side == "primary"
    assert steps["standby.applied"].side == "standby"


def test_faults_tell_in_words_what_they_are() -> None:
    plan = FaultPlan(
        1,
        "two",
        0.5,
        (Fault("host-kill", "primary", silent=True), Fault("repl-one-way", "standby", way="in")),
    )
    assert plan.name == "host-kill primary silent + repl-one-way standby in"
    assert plan.silent


def test_a_failover_among_three_managers_is_left_to_one_of_them() -> None:
    plans = take(3, 60, ("failover",))
    for plan in plans:
        assert {fault.kind for fault in plan.faults} == {"qemu-kill", "managers-most-kill"}
        most = next(fault for fault in plan.faults if fault.kind == "managers-most-kill")
        assert most.patient, "the others come back only when it is decided"
        first, second = (fault.after_s for fault in plan.faults)
        assert 0.0 <= first <= second <= 0.5
    assert {fault.number for plan in plans for fault in plan.faults} == {0, 1, 2, 3}
    assert {plan.faults[0].kind for plan in plans} == {"qemu-kill", "managers-most-kill"}


def test_a_database_server_is_away_for_a_minute() -> None:
    plans = take(3, 40, ("failover", "database-kill", "database-stop"))
    away = [plan for plan in plans if plan.kind.startswith("database-")]
    assert {plan.faults[0].seconds for plan in away} == {60.0}
    assert len([plan for plan in take(3, 34, tuple(CLUSTER)) if plan.kind == "failover"]) == 30
