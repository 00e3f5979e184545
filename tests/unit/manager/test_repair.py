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

"""Where standbys go, and how often it is tried."""

from __future__ import annotations

import itertools
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.arbiter.base import Arrangement
from nova_pmt.manager import choice
from nova_pmt.manager.db.api import Database, PairRow
from nova_pmt.manager.repair import Repairs

UUID = "5a2f3c1e-0000-4000-8000-0000000000cc"
BACKOFF_S = 10.0


class AtOnce(Executor):
    """Does it in the caller's thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Cloud:
    """Agents that begin what they are told to, on the database, or refuse."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.orders: list[tuple[str, str, str]] = []
        self.refuse: dict[str, exception.PmtError] = {}
        self.now = 0.0

    def protect(
        self,
        host: str,
        domain: str,
        standby_host: str,
        strategy: str | None = None,
        options: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        self.orders.append(("protect", host, standby_host))
        self._begin(host, domain, standby_host)
        return {}

    def move_standby(self, host: str, domain: str, standby_host: str) -> dict[str, Any]:
        self.orders.append(("move_standby", host, standby_host))
        self._begin(host, domain, standby_host)
        return {}

    def _begin(self, host: str, domain: str, standby_host: str) -> None:
        for name in (host, standby_host):
            if name in self.refuse:
                raise self.refuse[name]
        pair = self.database.pair(domain)
        assert pair is not None
        generation = pair.generation + 1
        self.database.begin(Arrangement(domain, pair.name, generation, host, standby_host))
        self.database.transition(domain, generation, "protected", host=host)

    def repairs(self) -> Repairs:
        """Of one more manager."""
        return Repairs(self.database, self, AtOnce(), backoff_s=BACKOFF_S, clock=lambda: self.now)

    def placed(self) -> list[str]:
        """Where a standby was tried to be made."""
        return [order[2] for order in self.orders]


@pytest.fixture
def cloud(database: Database) -> Cloud:
    """Hosts a to f; a pair on a and b."""
    for name in "abcdef":
        database.beat(name, {"cpu_model": "x", "memory_free_bytes": 1 << 30})
    database.begin(Arrangement(UUID, "web1", 1, "a", "b", "pmt", {"interval_ms": 20}))
    database.transition(UUID, 1, "protected", host="a")
    return Cloud(database)


def row(cloud: Cloud) -> PairRow:
    found = cloud.database.pair(UUID)
    assert found is not None
    return found


def failed_over(cloud: Cloud) -> None:
    cloud.database.claim(UUID, 1, "standby")
    cloud.database.transition(UUID, 1, "standby_active", host="b")


def candidates(cloud: Cloud) -> choice.Choice:
    return choice.candidates(row(cloud), cloud.database.hosts(), cloud.database.load())


def test_a_guest_that_went_on_is_protected_again_with_what_holds_its_images(cloud: Cloud) -> None:
    failed_over(cloud)
    cloud.repairs().sweep()
    assert cloud.orders == [("protect", "b", "a")]
    assert (row(cloud).state, row(cloud).primary_host, row(cloud).standby_host) == (
        "protected", "b", "a",
    )  # fmt: skip


def test_a_guest_whose_standbys_host_lives_is_left_to_its_agent(cloud: Cloud) -> None:
    cloud.database.claim(UUID, 1, "primary")
    repairs = cloud.repairs()
    while row(cloud).attempts < 3:
        repairs.sweep()
        cloud.now += 1.0
        assert not cloud.orders
    for _ in range(2):
        repairs.sweep()
        cloud.now += 1000.0
    assert cloud.orders == [("move_standby", "a", "f")], "in vain three times: it goes elsewhere"


def test_a_standby_whose_host_is_dead_is_made_elsewhere(cloud: Cloud) -> None:
    cloud.database.claim(UUID, 1, "primary")
    (beats,) = [host.beats for host in cloud.database.hosts() if host.name == "b"]
    cloud.database.judge("b", beats, False, "silent")
    cloud.repairs().sweep()
    assert cloud.orders == [("move_standby", "a", "c")]
    assert row(cloud).state == "protected"


def test_an_agent_that_has_let_go_of_it_is_told_to_protect_it(cloud: Cloud) -> None:
    cloud.database.claim(UUID, 1, "primary")
    cloud.database.maintain("b", True)

    def refuse(*_: object) -> None:
        raise exception.NotProtected("a has no pair")

    cloud.move_standby = refuse  # type: ignore[assignment, method-assign]
    cloud.repairs().sweep()
    assert cloud.orders == [("protect", "a", "c")]


def test_hosts_that_refuse_are_passed_over_and_others_come_first_the_next_time(
    cloud: Cloud,
) -> None:
    failed_over(cloud)
    for name in "acd":
        cloud.refuse[name] = exception.TooLittleMemory(f"{name} is full")
    cloud.refuse["c"] = exception.WorkerDied("c: no worker")  # no refusal, but no end either
    repairs = cloud.repairs()
    repairs.sweep()
    assert cloud.placed() == ["a", "c", "d"]
    assert row(cloud).state == "standby_active"
    repairs.sweep()
    assert len(cloud.orders) == 3, "not at once again"
    cloud.now += BACKOFF_S
    repairs.sweep()
    assert cloud.placed()[3] == "e"
    assert row(cloud).state == "protected"


def test_a_host_of_the_guest_that_does_not_answer_ends_the_turn(cloud: Cloud) -> None:
    failed_over(cloud)
    cloud.refuse["b"] = exception.HostUnreachable("b: no answer", host="b")
    cloud.repairs().sweep()
    assert cloud.placed() == ["a"]


@pytest.mark.parametrize("gone", [exception.NotRunning, exception.UnknownDomain])
def test_a_guest_that_was_shut_down_is_let_go_of(
    cloud: Cloud, gone: type[exception.PmtError]
) -> None:
    failed_over(cloud)
    cloud.refuse["b"] = gone("web1 does not run on b")
    cloud.repairs().sweep()
    assert (row(cloud).state, row(cloud).wanted) == ("unprotected", False)


def test_two_managers_try_once_together(cloud: Cloud) -> None:
    failed_over(cloud)
    for name in "acdef":
        cloud.refuse[name] = exception.TooLittleMemory(f"{name} is full")
    one, two = cloud.repairs(), cloud.repairs()
    for manager in (one, two, one, two):
        manager.sweep()
    assert len(cloud.orders) == 3
    assert row(cloud).attempts == 1


def test_the_wait_doubles(cloud: Cloud) -> None:
    failed_over(cloud)
    for name in "acdef":
        cloud.refuse[name] = exception.TooLittleMemory(f"{name} is full")
    repairs = cloud.repairs()
    at = []
    for _ in range(200):
        before = row(cloud).attempts
        repairs.sweep()
        if row(cloud).attempts > before:
            at.append(cloud.now)
        cloud.now += 1.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert gaps[:3] == [pytest.approx(BACKOFF_S * 2**n, abs=2.0) for n in range(3)]


def test_what_is_not_wanted_is_not_repaired(cloud: Cloud) -> None:
    failed_over(cloud)
    cloud.database.want(UUID, False)
    cloud.repairs().sweep()
    assert not cloud.orders


def test_hosts_that_cannot_have_it_are_left_out_with_the_reason(cloud: Cloud) -> None:
    database = cloud.database
    database.beat("c", {"cpu_model": "another"})
    database.maintain("d", True)
    (beats,) = [host.beats for host in database.hosts() if host.name == "e"]
    database.judge("e", beats, False, "silent")
    found = candidates(cloud)
    assert found.hosts == ("b", "f")
    assert {name: reason.split()[0] for name, reason in found.left_out.items()} == {
        "a": "the", "c": "its", "d": "it", "e": "its",
    }  # fmt: skip


def test_the_host_with_the_fewest_guests_comes_first(cloud: Cloud) -> None:
    for number, (primary, standby) in enumerate([("c", "d"), ("c", "e")]):
        uuid = UUID[:-1] + str(number)
        cloud.database.begin(Arrangement(uuid, f"other{number}", 1, primary, standby))
    cloud.database.beat("d", {"cpu_model": "x", "memory_free_bytes": 9 << 30})
    assert candidates(cloud).hosts == ("b", "f", "d", "e", "c")


def test_standbys_that_are_placed_in_one_turn_are_spread(cloud: Cloud) -> None:
    database = cloud.database
    failed_over(cloud)
    database.maintain("a", True)
    for number in range(3):
        uuid = UUID[:-1] + str(number)
        database.begin(Arrangement(uuid, f"other{number}", 1, "a", "b"))
        database.claim(uuid, 1, "standby")
        database.transition(uuid, 1, "standby_active", host="b")
    cloud.repairs().sweep()
    assert sorted(cloud.placed()) == ["c", "d", "e", "f"]


def test_no_host_at_all_is_said_with_every_reason(
    cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    failed_over(cloud)
    for name in "acdef":
        cloud.database.maintain(name, True)
    cloud.repairs().sweep()
    assert "NO_STANDBY_HOST" in caplog.text
    assert "d: it is in maintenance" in caplog.text


def test_what_somebody_else_repairs_is_left_to_them(cloud: Cloud) -> None:
    failed_over(cloud)
    others = {UUID}
    repairs = Repairs(
        cloud.database,
        cloud,
        AtOnce(),
        backoff_s=BACKOFF_S,
        clock=lambda: cloud.now,
        others=lambda: frozenset(others),
    )
    repairs.sweep()
    assert (cloud.orders, row(cloud).attempts) == ([], 0)
    others.clear()
    repairs.sweep()
    assert cloud.orders == [("protect", "b", "a")]
