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

"""Whatever is sent to a manager is refused or believed before the database hears of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.manager import service as module
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from nova_pmt.manager.db.nova import NovaNotes
from nova_pmt.manager.service import ManagerService
from tests.unit.manager.database_cases import OTHER, UUID, protected, state, story

GOOD: dict[str, Any] = {
    "uuid": UUID,
    "name": "web1",
    "generation": 1,
    "primary_host": "a",
    "standby_host": "b",
    "strategy": "pmt",
    "options": {"interval_ms": 25},
}


@pytest.fixture
def service(database: Database) -> ManagerService:
    return ManagerService(database)


def report(**changes: Any) -> dict[str, Any]:
    told = {"uuid": UUID, "generation": 1, "role": "primary", "state": "protected", "reason": ""}
    return {**told, **changes}


# -- bad input --------------------------------------------------------------------------

_UUIDS = (None, 7, "", "x", UUID + "\n", UUID[:-1], [UUID], {"uuid": UUID}, "a" * 100_000)
_GENERATIONS = (None, 0, -1, True, 1.0, "1", 1 << 60, [1])
_HOSTS = (None, "", "-a", "a/b", "a b", "a" * 300, 7, ["a"], "a\n")


@pytest.mark.parametrize("bad", _UUIDS)
def test_what_is_no_uuid_is_refused(service: ManagerService, bad: Any) -> None:
    for ask in (
        lambda: service.begin({**GOOD, "uuid": bad}),
        lambda: service.claim(bad, 1, "primary"),
        lambda: service.winner(bad, 1),
        lambda: service.challenge(bad),
        lambda: service.answer(bad, "token"),
    ):
        refused(ask)


@pytest.mark.parametrize("bad", _GENERATIONS)
def test_what_is_no_generation_is_refused(service: ManagerService, bad: Any) -> None:
    refused(lambda: service.begin({**GOOD, "generation": bad}))
    refused(lambda: service.claim(UUID, bad, "primary"))
    refused(lambda: service.winner(UUID, bad))


@pytest.mark.parametrize("bad", _HOSTS)
def test_what_is_no_host_is_refused(service: ManagerService, bad: Any) -> None:
    for ask in (
        lambda: service.begin({**GOOD, "primary_host": bad}),
        lambda: service.begin({**GOOD, "standby_host": bad}),
        lambda: service.beat(bad, {}, []),
        lambda: service.maintain(bad, True),
    ):
        refused(ask)
    if bad is not None:
        refused(lambda: service.pairs(host=bad))


@pytest.mark.parametrize("bad", [None, 1, "both", "", ["primary"], {"side": 1}, "PRIMARY"])
def test_what_is_no_side_is_refused(service: ManagerService, bad: Any) -> None:
    refused(lambda: service.claim(UUID, 1, bad))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "web1",
        {},
        {**GOOD, "winner": "primary"},
        {key: value for key, value in GOOD.items() if key != "generation"},
        {**GOOD, "name": "a/b"},
        {**GOOD, "name": "x" * 256},
        {**GOOD, "name": None},
        {**GOOD, "strategy": "No Such"},
        {**GOOD, "strategy": "x" * 65},
        {**GOOD, "options": {"interval_ms": float("nan")}},
        {**GOOD, "options": {"unknown": 1}},
        {**GOOD, "options": [1]},
    ],
)
def test_what_is_no_arrangement_is_refused(
    service: ManagerService, database: Database, bad: Any
) -> None:
    refused(lambda: service.begin(bad))
    assert database.pairs() == []


def test_both_sides_on_one_host_are_refused(service: ManagerService) -> None:
    with pytest.raises(exception.SameHost):
        service.begin({**GOOD, "standby_host": "a"})


@pytest.mark.parametrize(
    "facts",
    [
        None,
        [],
        "x",
        {"x": "y" * 20_000},
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": {1, 2}},
        {"x": {"y": 1}},
        {(1, 2): 3},
    ],
)
def test_facts_that_are_not_small_and_flat_are_refused(
    service: ManagerService, database: Database, facts: Any
) -> None:
    refused(lambda: service.beat("a", facts, []))
    assert database.hosts() == []


def test_facts_without_bottom_are_refused(service: ManagerService) -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    refused(lambda: service.beat("a", {"x": deep}, []))


@pytest.mark.parametrize("pairs", [None, {}, "x", [{}] * (module.MAX_PAIRS + 1)])
def test_what_is_no_list_of_pairs_is_refused(service: ManagerService, pairs: Any) -> None:
    refused(lambda: service.beat("a", {}, pairs))


@pytest.mark.parametrize("bad", [-1, True, "1", 1.5, None, 1 << 63])
def test_events_are_asked_for_with_whole_numbers(service: ManagerService, bad: Any) -> None:
    refused(lambda: service.events(after=bad))
    refused(lambda: service.events(limit=bad))
    refused(lambda: service.events(limit=module.MAX_EVENTS + 1))


@pytest.mark.parametrize("bad", [0, 1, "yes", None])
def test_maintenance_is_on_or_off(service: ManagerService, bad: Any) -> None:
    refused(lambda: service.maintain("a", bad))


def test_a_state_that_is_none_is_refused_with_those_that_are(service: ManagerService) -> None:
    with pytest.raises(exception.InvalidInput) as caught:
        service.pairs(state="alive")
    assert "primary_alone" in caught.value.cure


@pytest.mark.parametrize("token", [None, "", "a b", "x" * 200, "\N{SNOWMAN}", 7])
def test_what_is_no_token_is_refused(service: ManagerService, token: Any) -> None:
    refused(lambda: service.answer(UUID, token))


def refused(ask: Callable[[], Any]) -> None:
    with pytest.raises(exception.InvalidInput) as caught:
        ask()
    assert len(caught.value.message) < 1000


# -- the arbiter ------------------------------------------------------------------------


def test_a_generation_is_begun_claimed_and_asked_about(service: ManagerService) -> None:
    view = service.begin(GOOD)
    assert (view["state"], view["active_host"]) == ("checking", "a")
    assert service.winner(UUID.upper(), 1) is None
    assert service.claim(UUID.upper(), 1, "standby") is True
    assert service.claim(UUID, 1, "primary") is False
    assert service.winner(UUID, 1) == "standby"
    assert service.pair("web1")["active_host"] == "b"


def test_a_token_is_answered_for_only_where_it_was_left(service: ManagerService) -> None:
    token = service.challenge(UUID)
    assert service.answer(UUID, token) is True
    assert service.answer(UUID, token + "x") is False
    assert service.answer(OTHER, token) is False
    assert service.challenge(UUID) != token
    assert service.answer(UUID, token) is False


@pytest.mark.parametrize(
    "text", ["\ud800", "a\0b", "x" * 100_000, "\N{SNOWMAN}" * 5000, None, 7, {}]
)
def test_a_reason_may_be_any_text(service: ManagerService, text: Any) -> None:
    service.begin(GOOD)
    service.beat("a", {}, [report(reason=text)])
    assert service.pair(UUID)["state"] == "protected"
    assert service.claim(UUID, 1, "primary", text) is True
    assert "\0" not in service.pair(UUID)["reason"]


def test_half_a_character_in_a_name_is_replaced(service: ManagerService) -> None:
    assert service.begin({**GOOD, "name": "web\ud800"})["name"] == "web?"


# -- what agents report -----------------------------------------------------------------


def test_a_heartbeat_tells_of_its_host_and_its_pairs(
    service: ManagerService, database: Database
) -> None:
    service.begin(GOOD)
    told = service.beat("a", {"memory_free_bytes": 5}, [report(reason="all is there")])
    assert told == {"alive": True, "maintenance": False}
    assert (service.pair(UUID)["state"], service.pair(UUID)["reason"]) == (
        "protected",
        "all is there",
    )
    database.maintain("a", True)
    assert service.beat("a", {}, [])["maintenance"] is True


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "x",
        [],
        {},
        report(uuid="x"),
        report(generation="1"),
        {"uuid": UUID},
        report(role=["primary"]),
        report(state={"x": 1}),
    ],
)
def test_a_report_that_is_bad_does_not_keep_others_from_being_heard(
    service: ManagerService, database: Database, bad: Any
) -> None:
    service.begin(GOOD)
    service.beat("a", {}, [bad, report(), bad])
    assert state(database) == "protected"
    assert database.hosts()[0].beats == 1


@pytest.mark.parametrize(
    ("host", "role"), [("b", "primary"), ("c", "primary"), ("a", "standby"), ("c", "standby")]
)
def test_only_the_host_of_a_side_is_believed(
    service: ManagerService, database: Database, host: str, role: str
) -> None:
    protected(database)
    for told in ("error", "unprotected", "ended", "primary_alone"):
        service.beat(host, {}, [report(role=role, state=told)])
    assert state(database) == "protected"


@pytest.mark.parametrize("told", ["primary_alone", "unprotected", "ended", "error", "protected"])
@pytest.mark.parametrize("goes_on", ["failing_over", "standby_active", "error"])
def test_a_primary_that_lost_is_not_believed_any_more(
    service: ManagerService, database: Database, goes_on: str, told: str
) -> None:
    """What became of the copy that was ended says nothing of the guest that runs."""
    protected(database)
    database.claim(UUID, 1, "standby")
    if goes_on != "failing_over":
        service.beat("b", {}, [report(role="standby", state=goes_on)])
    service.beat("a", {}, [report(state=told)])
    pair = database.pair(UUID)
    assert pair is not None
    assert (pair.state, pair.wanted, pair.winner) == (goes_on, True, "standby")


def test_a_standby_that_lost_is_not_believed_any_more(
    service: ManagerService, database: Database
) -> None:
    protected(database)
    database.claim(UUID, 1, "primary")
    for told in ("error", "failing_over", "standby_active"):
        service.beat("b", {}, [report(role="standby", state=told)])
    assert state(database) == "primary_alone"


def test_a_report_of_another_generation_is_late(
    service: ManagerService, database: Database
) -> None:
    protected(database)
    lines = story(database)
    service.beat("a", {}, [report(generation=2, state="ended"), report(uuid=OTHER)])
    assert story(database) == lines


# -- looking ----------------------------------------------------------------------------


def test_a_pair_is_found_by_uuid_or_by_a_name_that_is_the_only_one(
    service: ManagerService,
) -> None:
    service.begin(GOOD)
    for wanted in (UUID, UUID.upper(), "web1"):
        assert service.pair(wanted)["uuid"] == UUID
    for unknown in (OTHER, "web2", "x" * 36):
        with pytest.raises(exception.NotProtected):
            service.pair(unknown)
    service.begin({**GOOD, "uuid": OTHER})
    with pytest.raises(exception.InvalidInput, match="2 servers"):
        service.pair("web1")
    assert [event["pair_uuid"] for event in service.events(OTHER)] == [OTHER]


def test_hosts_are_told_with_the_pairs_that_they_are_in(service: ManagerService) -> None:
    for name in "abc":
        service.beat(name, {}, [])
    service.begin(GOOD)
    service.begin({**GOOD, "uuid": OTHER, "standby_host": "c"})
    service.claim(OTHER, 1, "standby")
    found = {host["name"]: (host["primaries"], host["standbys"]) for host in service.hosts()}
    assert found == {"a": (1, 0), "b": (0, 1), "c": (1, 0)}


def test_only_a_host_that_is_known_is_maintained(service: ManagerService) -> None:
    with pytest.raises(exception.UnknownHost):
        service.maintain("a", True)
    service.beat("a", {}, [])
    service.maintain("a", True)
    assert service.hosts()[0]["maintenance"] is True


# -- Nova -------------------------------------------------------------------------------


def test_who_follows_nova_is_told_of_standbys_that_won_and_of_no_other(database: Database) -> None:
    told: list[str] = []
    service = ManagerService(database, on_takeover=told.append)
    service.begin(GOOD)
    service.begin({**GOOD, "uuid": OTHER})
    assert service.claim(OTHER, 1, "primary")
    assert not service.claim(OTHER, 1, "standby")
    assert told == []
    assert service.claim(UUID, 1, "standby")
    assert told == [UUID]


def test_pairs_tell_what_nova_is_told_and_who_has_none(engine: Engine, database: Database) -> None:
    notes = NovaNotes(engine)
    service = ManagerService(database, notes=notes)
    service.begin(GOOD)
    for uuid, values in ((UUID, {"step": "evacuate"}), (OTHER, {"reason": "no room"})):
        notes.keep(uuid)
        assert notes.write(uuid, 0, **values)
    first, second = service.pairs()
    assert (first["state"], first["nova"]["step"]) == ("checking", "evacuate")
    assert (second["uuid"], second["state"]) == (OTHER, "unprotected")
    assert second["nova"]["reason"] == "no room"
    assert set(first) == set(second)
    assert [pair["uuid"] for pair in service.pairs(host="a")] == [UUID]
    assert service.pair(UUID)["nova"]["step"] == "evacuate"


def test_a_server_that_never_was_in_a_pair_has_a_story(engine: Engine, database: Database) -> None:
    notes = NovaNotes(engine)
    service = ManagerService(database, notes=notes)
    with pytest.raises(exception.NotProtected):
        service.events(OTHER)
    notes.keep(OTHER)
    notes.remark(OTHER, "refused", "no room")
    assert [event["reason"] for event in service.events(OTHER)] == ["no room"]
