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

"""What ``nova-pmt-status`` says of message bus, database, managers, agents and Nova."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from keystoneauth1 import exceptions, session
from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Code

from nova_pmt import exception
from nova_pmt.conf import opts
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.engine import Engine
from nova_pmt.messaging import oslo_messaging
from nova_pmt.status import services
from nova_pmt.status.finding import result


def configured(**groups: dict[str, Any]) -> Any:
    conf = cfg.ConfigOpts()
    opts.register(conf)
    conf([], project="nova_pmt", default_config_files=[])
    for group, values in groups.items():
        for name, value in values.items():
            conf.set_override(name, value, group)
    return conf


# -- message bus ------------------------------------------------------------------------------


def test_a_message_comes_back() -> None:
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, "fake://status")
    assert result(services.message_bus(transport)).code == Code.SUCCESS


def test_a_message_bus_that_is_away_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def start(self) -> None:
            threading.Event().wait()

    monkeypatch.setattr("nova_pmt.rpc.server", lambda *_: Stuck())
    found = result(services.message_bus(None, timeout_s=0.05))
    assert found.code == Code.FAILURE
    assert "transport_url" in str(found.details)


# -- database ---------------------------------------------------------------------------------


def test_a_host_without_managers_needs_no_database() -> None:
    assert result(services.database(configured())).code == Code.SUCCESS


def test_a_database_that_is_migrated(tmp_path: Path) -> None:
    conf = configured(database={"connection": f"sqlite:///{tmp_path}/manager.sqlite"})
    engine = Engine(conf)
    engine.ask(migration.upgrade)
    engine.close()
    assert result(services.database(conf)).details == f"revision {migration.head()}"


def test_a_database_that_is_not_migrated(tmp_path: Path) -> None:
    conf = configured(database={"connection": f"sqlite:///{tmp_path}/manager.sqlite"})
    found = result(services.database(conf))
    assert found.code == Code.FAILURE
    assert "nova-pmt-manage db sync" in str(found.details)


@pytest.mark.parametrize("url", ["sqlite:////absent/manager.sqlite", "nonsense://"])
def test_a_database_that_cannot_be_used(url: str) -> None:
    assert result(services.database(configured(database={"connection": url}))).code == Code.FAILURE


def test_the_databases_password_is_not_told() -> None:
    conf = configured(database={"connection": "nonsense://user:secret@db/nova_pmt"})
    assert "secret" not in str(result(services.database(conf)).details)


# -- managers and agents ----------------------------------------------------------------------


class Managers:
    def __init__(self, **alive: bool) -> None:
        self._hosts = [{"host": name, "alive": how} for name, how in alive.items()]

    def hosts(self) -> list[dict[str, Any]]:
        return self._hosts


WITH_MANAGERS = {"manager": {"enabled": True}}


@pytest.mark.parametrize(
    ("hosts", "here", "code", "says"),
    [
        ({"a": True, "b": True}, "a", Code.SUCCESS, "alive: a, b"),
        ({"a": True, "b": True}, None, Code.SUCCESS, ""),
        ({"a": True, "b": True, "c": False}, "a", Code.WARNING, "agents of c are silent"),
        ({"a": True, "b": True}, "c", Code.FAILURE, "of this host, c"),
        ({"a": True}, "a", Code.FAILURE, "a pair needs two"),
        ({}, None, Code.FAILURE, "none"),
    ],
)
def test_agents_are_heard(hosts: dict[str, bool], here: str | None, code: Code, says: str) -> None:
    found = result(services.agents(configured(**WITH_MANAGERS), Managers(**hosts), here))
    assert found.code == code
    assert says in str(found.details)


def test_managers_that_do_not_answer_are_told_of() -> None:
    class Silent:
        def hosts(self) -> list[dict[str, Any]]:
            raise exception.HostUnreachable("nova-pmt-manager: no answer within 10 s", host="")

    found = result(services.agents(configured(**WITH_MANAGERS), Silent(), None))
    assert found.code == Code.FAILURE
    assert "HOST_UNREACHABLE" in str(found.details)


def test_without_managers_nobody_is_asked() -> None:
    assert result(services.agents(configured(), Managers(), "a")).code == Code.SUCCESS


# -- Nova -------------------------------------------------------------------------------------


class Session(session.Session):
    """As far as keystoneauth's adapters use one; talks to nobody."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.roles = changes.get("roles", ["admin", "service", "reader"])
        self.compute = changes.get("compute", [{"host": "a", "state": "up", "forced_down": False}])
        self.providers = changes.get("providers", ["a", "b"])
        self.newest = changes.get("newest", (2, 104))
        self.neutron = changes.get("neutron", "http://neutron")
        self.auth = SimpleNamespace(get_access=self._access)

    def _access(self, asked: Any) -> Any:
        assert asked is self
        return SimpleNamespace(
            role_names=self.roles, username="nova_pmt", project_name="pmt", user_id="0123"
        )

    def get_endpoint_data(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(max_microversion=self.newest)

    def get_endpoint(self, *_: Any, **__: Any) -> str | None:
        return self.neutron

    def request(self, url: str, method: str, **how: Any) -> Any:
        assert method == "GET"
        if url.startswith("/os-services"):
            return SimpleNamespace(json=lambda: {"services": self.compute})
        assert url == "/resource_providers?required=CUSTOM_PMT"
        if self.providers is None:
            return SimpleNamespace(status_code=400)
        found = [{"name": name} for name in self.providers]
        return SimpleNamespace(status_code=200, json=lambda: {"resource_providers": found})


def look(found: Any, standby_user_id: tuple[str, ...] = ("0123",)) -> Any:
    conf = configured(
        nova={"enabled": True, "standby_user_id": list(standby_user_id)},
        database={"connection": "sqlite://"},
    )
    return result(services.nova(conf, lambda _: found))


def test_a_cloud_as_it_should_be() -> None:
    found = look(Session())
    assert found.code == Code.SUCCESS
    assert "CUSTOM_PMT: a, b" in str(found.details)


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"roles": ["admin"]}, Code.FAILURE, "role add --user nova_pmt --project pmt service"),
        ({"roles": []}, Code.FAILURE, "not the role admin and not the role service"),
        ({"newest": (2, 79)}, Code.FAILURE, "too old"),
        ({"providers": ["a"]}, Code.FAILURE, "A pair needs two"),
        ({"providers": None}, Code.FAILURE, "none"),
        ({"neutron": None}, Code.FAILURE, "no Neutron"),
        (
            {"compute": [{"host": "a", "state": "down", "forced_down": False}]},
            Code.WARNING,
            "nova-compute of a is down",
        ),
        (
            {"compute": [{"host": "a", "state": "down", "forced_down": True}]},
            Code.WARNING,
            "forced down",
        ),
    ],
)
def test_what_is_missing_in_the_cloud(changes: dict[str, Any], code: Code, says: str) -> None:
    found = look(Session(**changes))
    assert found.code == code
    assert says in str(found.details)


def test_compute_hosts_must_know_the_managers_user() -> None:
    found = look(Session(), standby_user_id=("another",))
    assert found.code == Code.FAILURE
    assert "standby_user_id lacks 0123" in str(found.details)


def test_credentials_that_are_refused() -> None:
    class Refused(Session):
        def _access(self, asked: Any) -> Any:
            raise exceptions.Unauthorized("The request you have made requires authentication.")

    found = look(Refused())
    assert found.code == Code.FAILURE
    assert "requires authentication" in str(found.details)


def test_credentials_that_are_not_there() -> None:
    from nova_pmt.conf import nova as nova_options

    conf = configured(nova={"enabled": True}, database={"connection": "sqlite://"})
    nova_options.register_auth(conf)
    found = result(services.nova(conf))
    assert found.code == Code.FAILURE
    assert "auth_type is not set" in str(found.details)


def test_who_does_not_follow_nova_needs_no_credentials() -> None:
    assert result(services.nova(configured())).code == Code.SUCCESS


def test_compute_hosts_need_no_credentials() -> None:
    assert result(services.nova(configured(nova={"enabled": True}))).code == Code.SUCCESS
