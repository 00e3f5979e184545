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

"""A loaded host is not a dead one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_pmt.replication.silence import MOST, SilenceLimit


def heard_every(limit: SilenceLimit, start: float, gap: float, count: int) -> float:
    for number in range(1, count + 1):
        limit.heard(start + number * gap)
    return start + count * gap


def test_regular_heartbeats_leave_the_limit_as_configured() -> None:
    limit = SilenceLimit(0.5)
    heard_every(limit, 0.0, 0.1, 100)
    assert limit.seconds == 0.5


def test_what_came_before_the_first_heartbeat_is_no_gap() -> None:
    limit = SilenceLimit(0.5)
    limit.heard(30.0)
    assert limit.seconds == 0.5


def test_late_heartbeats_make_the_limit_longer() -> None:
    limit = SilenceLimit(0.5)
    now = heard_every(limit, 0.0, 0.1, 10)
    limit.heard(now + 0.4)
    assert limit.seconds == pytest.approx(1.2)


def test_what_was_long_ago_does_not_count() -> None:
    limit = SilenceLimit(0.5)
    limit.heard(0.0)
    limit.heard(0.4)
    heard_every(limit, 0.4, 0.1, 1200)
    assert limit.seconds == 0.5


def test_a_burst_of_arrivals_makes_nothing_forgotten() -> None:
    limit = SilenceLimit(0.5)
    limit.heard(0.0)
    limit.heard(0.4)
    for _ in range(10_000):
        limit.heard(0.4)
    assert limit.seconds == pytest.approx(1.2)


@given(st.lists(st.floats(0, 100)))
def test_the_limit_stays_within_its_bounds(gaps: list[float]) -> None:
    limit, now = SilenceLimit(0.5), 0.0
    for gap in gaps:
        now += gap
        limit.heard(now)
        assert 0.5 <= limit.seconds <= MOST * 0.5
