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

"""Everything random in a campaign follows from its seed."""

from __future__ import annotations

import itertools
from collections import Counter

from nova_pmt.evaluation.plan import EARLIEST_S, KINDS, LATEST_S, Kind, Plan, plans


def take(seed: int, count: int, kinds: tuple[Kind, ...] = KINDS) -> list[Plan]:
    return list(itertools.islice(plans(seed, kinds), count))


def test_a_seed_gives_the_same_trials_again_however_many_are_taken() -> None:
    assert take(7, 20) == take(7, 500)[:20]
    assert take(7, 20) != take(8, 20)


def test_trials_are_numbered_from_one() -> None:
    assert [plan.number for plan in take(1, 9)] == list(range(1, 10))


def test_each_kind_comes_equally_often() -> None:
    assert set(Counter(plan.kind for plan in take(3, 400)).values()) == {100}
    assert {plan.kind for plan in take(3, 10, ("host",))} == {"host"}


def test_moments_are_all_over_the_range() -> None:
    moments = [plan.moment_s for plan in take(5, 400)]
    assert EARLIEST_S <= min(moments) < EARLIEST_S + 0.1
    assert LATEST_S - 0.1 < max(moments) <= LATEST_S


def test_only_hosts_fall_silent_and_not_all_of_them() -> None:
    silent = Counter((plan.kind, plan.silent) for plan in take(5, 400))
    assert {kind for kind, quiet in silent if quiet} == {"host"}
    assert silent["host", True] > 20
    assert silent["host", False] > 20
