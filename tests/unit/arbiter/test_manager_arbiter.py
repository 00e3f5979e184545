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

"""The managers as arbiter, asked over the message bus: real endpoint, real database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oslo_config import cfg
from oslo_messaging._drivers import impl_fake

from nova_pmt import exception, rpc
from nova_pmt.arbiter.base import Arrangement
from nova_pmt.arbiter.manager import ManagerArbiter
from nova_pmt.manager import rpcapi
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.endpoint import Endpoint
from nova_pmt.manager.rpcapi import ManagerAPI
from nova_pmt.manager.service import ManagerService
from nova_pmt.messaging import oslo_messaging
from tests.unit.manager.connect import connect

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
FIRST = Arrangement(UUID, "web1", 1, "a", "b", "pmt", {"interval_ms": 25})


@pytest.fixture
def transport() -> Any:
    impl_fake.FakeExchangeManager.cleanup()
    cfg.CONF([], default_config_files=[], default_config_dirs=[])
    return oslo_messaging.get_rpc_transport(cfg.CONF, url="fake://")


@pytest.fixture
def arbiter(transport: Any, monkeypatch: pytest.MonkeyPatch) -> ManagerArbiter:
    monkeypatch.setattr(oslo_messaging, "get_rpc_transport", lambda _conf: transport)
    return ManagerArbiter(SimpleNamespace(manager=SimpleNamespace(call_timeout_s=5)))


Serve = Callable[[Any], None]


@pytest.fixture
def serve(transport: Any) -> Iterator[Serve]:
    servers: list[Any] = []

    def start(endpoint: Any) -> None:
        servers.append(rpc.server(transport, rpcapi.TOPIC, "manager", endpoint))
        servers[-1].start()

    yield start
    for server in servers:
        server.stop()
        # Its pool takes a second to end; nothing here depends on that.
        threading.Thread(target=server.wait, daemon=True).start()


@pytest.fixture
def manager(serve: Serve, tmp_path: Path) -> Iterator[Path]:
    """A manager that serves; the file of its database."""
    file = tmp_path / "manager.sqlite"
    engine = connect(f"sqlite:///{file}", sqlite_synchronous=False)
    engine.ask(migration.upgrade)
    serve(Endpoint(ManagerService(Database(engine))))
    yield file
    engine.close()


def test_the_first_side_that_asks_wins_for_ever(arbiter: ManagerArbiter, manager: Path) -> None:
    arbiter.begin(FIRST)
    assert arbiter.winner(UUID, 1) is None
    assert arbiter.claim(UUID, 1, "standby", reason="the link is cut", other_stopped=True) is True
    for _ in range(2):
        assert arbiter.claim(UUID, 1, "primary") is False
        assert arbiter.claim(UUID, 1, "standby", other_stopped=True) is True
    assert arbiter.winner(UUID, 1) == "standby"


def test_a_token_is_seen_by_whoever_asks_the_same_managers(
    arbiter: ManagerArbiter, manager: Path
) -> None:
    token = arbiter.challenge(UUID)
    assert arbiter.answer(UUID, token) is True
    assert arbiter.answer(UUID, token + "x") is False


def test_what_a_manager_refuses_keeps_its_class_and_cure(
    arbiter: ManagerArbiter, manager: Path
) -> None:
    with pytest.raises(exception.ArbiterUnavailable, match="know nothing") as unknown:
        arbiter.claim(UUID, 1, "primary")
    assert "restored" in unknown.value.cure
    arbiter.begin(FIRST)
    with pytest.raises(exception.PairMismatch, match="runs on a"):
        arbiter.begin(Arrangement(UUID, "web1", 2, "c", "b"))
    with pytest.raises(exception.InvalidInput, match="not a UUID"):
        arbiter.claim("web1", 1, "primary")


def test_a_database_that_is_away_decides_nothing(arbiter: ManagerArbiter, manager: Path) -> None:
    arbiter.begin(FIRST)
    away = manager.with_suffix(".away")
    manager.rename(away)
    manager.mkdir()
    with pytest.raises(exception.DatabaseUnavailable):
        arbiter.claim(UUID, 1, "primary")
    manager.rmdir()
    away.rename(manager)
    assert arbiter.claim(UUID, 1, "standby", other_stopped=True) is True


def test_without_a_manager_nothing_is_decided_and_that_soon(arbiter: ManagerArbiter) -> None:
    began = time.monotonic()
    with pytest.raises(exception.ArbiterUnavailable, match="no manager") as caught:
        arbiter.claim(UUID, 1, "standby")
    assert time.monotonic() - began < 5 + 3 + 10  # call_timeout_s, its grace, a slow machine
    assert "nova-pmt-manager runs" in caught.value.cure


def test_an_arbiter_without_managers_is_warmed_without_harm(arbiter: ManagerArbiter) -> None:
    arbiter.warm()


class Strange:
    """A manager of some other release, or none at all."""

    target = oslo_messaging.Target(version=rpc.VERSION)

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def claim(self, ctxt: Any, **_arguments: Any) -> Any:
        return self._answer

    answer = winner = claim


@pytest.mark.parametrize("result", ["lost", 1, [False], {"won": False}, None, "", 0])
def test_nothing_but_true_is_a_permission(
    arbiter: ManagerArbiter, serve: Serve, result: Any
) -> None:
    serve(Strange({"result": result}))
    assert arbiter.claim(UUID, 1, "primary") is False
    assert arbiter.answer(UUID, "token") is False
    assert arbiter.winner(UUID, 1) is None


@pytest.mark.parametrize(
    "answer", [None, True, "true", [], {}, {"error": "x"}, {"error": {"code": "NEW_CODE"}}]
)
def test_what_is_no_answer_decides_nothing(
    arbiter: ManagerArbiter, serve: Serve, answer: Any
) -> None:
    serve(Strange(answer))
    with pytest.raises(exception.ArbiterUnavailable):
        arbiter.claim(UUID, 1, "primary")


def test_arguments_that_do_not_fit_are_the_callers_fault(transport: Any, manager: Path) -> None:
    caller = rpc.Caller(transport, rpcapi.TOPIC, "nova-pmt-manager")
    for arguments in ({}, {"uuid": UUID, "generation": 1, "side": "primary", "more": 1}):
        with pytest.raises(exception.InvalidInput, match="claim"):
            caller.call(None, "claim", 5, arguments)


def test_operators_ask_the_same_managers(transport: Any, manager: Path) -> None:
    api = ManagerAPI(transport, 5)
    assert api.begin(
        {**vars(FIRST), "options": {}}
    )["state"] == "checking"  # fmt: skip
    assert api.beat("b", {"memory_free_bytes": 1}, [])["alive"] is True
    api.maintain("b", True)
    assert [host["maintenance"] for host in api.hosts()] == [True]
    assert api.pair("web1")["uuid"] == UUID
    assert [pair["name"] for pair in api.pairs("a", "checking")] == ["web1"]
    assert [event["new"] for event in api.events("web1")] == ["checking"]
    with pytest.raises(exception.NotProtected):
        api.pair("web2")
    with pytest.raises(exception.UnknownHost):
        api.maintain("c", True)
