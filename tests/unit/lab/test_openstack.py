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
"""The lab's cloud, as far as it can be tested without one."""

from __future__ import annotations

import json
import stat
import sys
import threading
import types
from pathlib import Path
from typing import Any, cast

import pytest
from keystoneauth1.exceptions import ConnectFailure

from nova_pmt.exception import LabError
from nova_pmt.lab.openstack import demo, leftovers, settings
from nova_pmt.lab.openstack.cloud import Cloud, kernel_arguments
from nova_pmt.lab.openstack.control import wait_for
from nova_pmt.lab.openstack.demo import Moment, draw
from nova_pmt.lab.openstack.talker import Talker
from nova_pmt.lab.transactions import Exchange


def test_settings_are_written_for_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "nova.conf"
    settings.write(path, {"DEFAULT": {"debug": True, "filters": ("a", "b")}, "x": {"n": 1}})
    assert path.read_text() == "[DEFAULT]\ndebug = true\nfilters = a\nfilters = b\n[x]\nn = 1\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_last_that_names_an_option_decides() -> None:
    merged = settings.merged({"a": {"x": 1, "y": 1}}, {"a": {"x": 2}, "b": {}})
    assert merged == {"a": {"x": 2, "y": 1}, "b": {}}


def test_an_account_does_not_show_its_password() -> None:
    account = settings.Account("demo", "secret")
    assert "secret" not in repr(account)
    assert account.options()["password"] == "secret"
    assert account.options()["project_name"] == "demo"


def test_nova_keeps_the_whole_command_line() -> None:
    assert len(kernel_arguments()) <= 255
    assert "guest_ip=dhcp" in kernel_arguments()


def test_waiting_ends_with_what_is_waited_for() -> None:
    with pytest.raises(LabError, match="it has ended"):
        wait_for(lambda: False, "it", lambda: False)
    with pytest.raises(LabError, match="not ready"):
        wait_for(lambda: False, "it", timeout=0)
    wait_for(lambda: True, "it", lambda: False)


class _SDKException(Exception):
    """Of openstacksdk, which is not installed where these tests run."""


class _NotFoundException(_SDKException):
    pass


class _Busy:
    """A cloud of which questions fail before they are answered."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def server(self, _uuid: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_question_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = types.ModuleType("openstack.exceptions")
    vars(errors).update(SDKException=_SDKException, NotFoundException=_NotFoundException)
    monkeypatch.setitem(sys.modules, "openstack", types.ModuleType("openstack"))
    monkeypatch.setitem(sys.modules, "openstack.exceptions", errors)

    def ask(timeout: float, *answers: Any) -> Any:
        return Cloud.ask_server(cast(Any, _Busy(*answers)), "u", timeout)

    assert ask(30, _SDKException(), ConnectFailure(), "server") == "server"
    with pytest.raises(LabError, match="cannot be looked at: busy"):
        ask(0, _SDKException("busy"))
    with pytest.raises(_NotFoundException):
        ask(30, _NotFoundException(), "server")
    with pytest.raises(ValueError, match="ours"):
        ask(30, ValueError("ours"), "server")


def test_leftovers_that_cannot_be_looked_at_are_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [OSError("busy"), ["port"], []]

    def find(_cloud: Any, _uuids: Any) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    monkeypatch.setattr(leftovers, "find", find)
    monkeypatch.setattr(leftovers.time, "sleep", lambda _s: None)
    assert leftovers.wait_none(cast(Any, None), timeout=30) == []
    assert answers == []
    answers.append(OSError("busy"))
    left = leftovers.wait_none(cast(Any, None), timeout=0)
    assert left == ["cannot be looked at: OSError: busy"]


def test_the_summary_says_what_ended_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_options: Any) -> Any:
        raise RuntimeError("[/oh]")  # no markup of ours

    monkeypatch.setattr(demo, "Lab", broken)
    assert demo.main(tmp_path) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "RuntimeError: [/oh]")


class _Client:
    """Answers the given requests, then breaks."""

    def __init__(self, exchanges: list[Exchange], problem: Exception | None = None) -> None:
        self.exchanges = exchanges
        self.problem = problem

    def request(self) -> int:
        if self.problem is not None:
            raise self.problem
        return 1

    def close(self) -> None:
        pass


class _Guest:
    def __init__(self, client: _Client) -> None:
        self._client = client

    def transactions(self, number: int, timeout: float) -> _Client:
        return self._client


def _talker(client: _Client) -> Talker:
    return Talker(cast(Any, _Guest(client)))


def test_the_gap_is_the_longest_wait() -> None:
    answered = [
        Exchange(1, n, at, n, at + took) for n, at, took in ((1, 1, 5), (2, 7, 2), (3, 9, 1))
    ]
    talker = _talker(_Client([*answered, Exchange(1, 4, 10.0)]))
    assert talker.gap() == (1, 5)
    assert talker.gap(6.5) == (7, 2)
    assert talker.wait_answer(8).request == 3


def test_a_broken_connection_is_told() -> None:
    talker = _talker(_Client([], ConnectionResetError("gone")))
    with talker:
        pass
    assert "gone" in talker.problem
    with pytest.raises(LabError, match="gone"):
        talker.wait_answer(0)
    assert not any(t.name == "talker" for t in threading.enumerate())


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw([Moment(2.0, "off")], [(1.0, 0.01), (2.0, 3.0), (5.5, 0.01)], tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
