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

"""Workers are started, heard, told, and noticed when they die."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.agent import supervisor
from nova_pmt.agent.control import Pair, PrimarySpec
from nova_pmt.agent.supervisor import Outcome, Supervisor, Worker
from tests.unit.agent.rig import UUID, eventually

SPEC = PrimarySpec(Pair(UUID, "web1", 7, "a", "b"), "127.0.0.1", 1)
HEAD = """
import json, os, socket, sys, time
agent = socket.socket(fileno=int(sys.argv[sys.argv.index("--control-fd") + 1]))
stream = agent.makefile("rw")
spec = json.loads(stream.readline())["spec"]
def say(**message):
    stream.write(json.dumps(message) + "\\n")
    stream.flush()
"""

Start = Callable[..., tuple[Worker, list[dict[str, Any]], list[Outcome]]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a worker with that body; gives it, its events and its outcome."""

    def begin(body: str, silence_s: float = 30.0) -> Any:
        script = tmp_path / "worker.py"
        script.write_text(HEAD + textwrap.dedent(body))
        events: list[dict[str, Any]] = []
        ends: list[Outcome] = []
        made = Supervisor([sys.executable, str(script)], str(tmp_path), silence_s)
        return made.start(SPEC, events.append, ends.append), events, ends

    return begin


def test_a_worker_gets_its_specification_and_its_events_come_in_order(start: Start) -> None:
    worker, events, ends = start("""
        say(event="state", state="syncing", reason=spec["pair"]["name"])
        say(event="state", state="protected")
        say(event="state", state="unprotected", reason="told", details={"rounds": 7})
    """)
    outcome = worker.wait(10)
    assert outcome == Outcome("unprotected", "told", {"rounds": 7}, None, 0)
    assert [event["state"] for event in events] == ["syncing", "protected", "unprotected"]
    assert events[0]["reason"] == "web1"
    assert ends == [outcome]


def test_a_worker_that_exits_without_a_final_state_has_died(start: Start) -> None:
    worker, _, _ = start('say(event="state", state="protected"); os._exit(3)')
    outcome = worker.wait(10)
    assert outcome is not None
    assert (outcome.state, outcome.returncode) == (None, 3)
    assert isinstance(outcome.error, exception.WorkerDied)
    assert "exit status 3" in outcome.reason


def test_a_worker_that_is_killed_has_died_and_its_signal_is_told(start: Start) -> None:
    worker, events, _ = start('say(event="state", state="protected"); time.sleep(60)')
    eventually(lambda: events)
    os.kill(worker.pid, 9)
    outcome = worker.wait(10)
    assert outcome is not None
    assert "signal 9" in outcome.reason


def test_its_own_error_says_more_than_its_death(start: Start) -> None:
    worker, _, _ = start("""
        say(event="error", error={"code": "CERTIFICATE_REFUSED", "message": "m", "cure": "c"})
        os._exit(1)
    """)
    outcome = worker.wait(10)
    assert outcome is not None
    assert isinstance(outcome.error, exception.CertificateError)


def test_a_worker_that_closes_its_socket_but_lives_on_is_killed(start: Start) -> None:
    worker, _, _ = start("stream.close(); agent.close(); time.sleep(60)")
    outcome = worker.wait(10)
    assert outcome is not None
    assert outcome.returncode == -9


def test_commands_reach_the_worker_until_it_is_gone(start: Start) -> None:
    worker, _, _ = start("""
        command = json.loads(stream.readline())["command"]
        say(event="state", state="unprotected", reason=command)
    """)
    worker.command("unprotect")
    outcome = worker.wait(10)
    assert outcome is not None
    assert outcome.reason == "unprotect"
    with pytest.raises(exception.WorkerDied):
        worker.command("unprotect")


def test_stop_lets_a_worker_end_in_order_and_hears_its_last_words(start: Start) -> None:
    worker, events, _ = start("""
        say(event="state", state="protected")
        assert stream.readline() == ""
        say(event="state", state="primary_alone", reason="the agent is gone")
    """)
    eventually(lambda: events)
    outcome = worker.stop(10)
    assert outcome is not None
    assert (outcome.state, outcome.returncode) == ("primary_alone", 0)


def test_stop_kills_a_worker_that_does_not_end(start: Start) -> None:
    worker, _, _ = start("time.sleep(60)")
    outcome = worker.stop(0.2)
    assert outcome is not None
    assert outcome.returncode == -9


@pytest.mark.parametrize("last", ['event="stats", epoch=1', 'event="state", state="syncing"'])
def test_a_worker_that_stops_without_a_word_is_killed(
    start: Start, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    monkeypatch.setattr(supervisor, "_POLL_MS", 20)
    worker, _, _ = start(f"say({last}); time.sleep(60)", silence_s=0.1)
    outcome = worker.wait(10)
    assert outcome is not None
    assert outcome.returncode == -9


@pytest.mark.parametrize(
    "noise", ["agent.sendall(b'not json\\n')", "agent.sendall(b'[' * (9 << 20))"]
)
def test_a_worker_that_breaks_the_protocol_is_ended(start: Start, noise: str) -> None:
    worker, _, _ = start(f"{noise}; time.sleep(60)")
    outcome = worker.wait(20)
    assert outcome is not None
    assert outcome.state is None


def test_an_event_that_fails_its_listener_does_not_end_the_listening(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(HEAD + 'say(event="x"); say(event="state", state="ended")')

    def fail(_: dict[str, Any]) -> None:
        raise KeyError("event")

    worker = Supervisor([sys.executable, str(script)]).start(SPEC, fail, lambda _: None)
    outcome = worker.wait(10)
    assert outcome is not None
    assert outcome.state == "ended"


def test_output_of_a_worker_goes_to_its_log(start: Start, tmp_path: Path) -> None:
    worker, _, _ = start('print("to stdout"); print("to stderr", file=sys.stderr)')
    worker.wait(10)
    text = (tmp_path / f"worker-{UUID}.log").read_text()
    assert "to stdout" in text
    assert "to stderr" in text


def test_a_worker_that_cannot_be_started_is_a_typed_error() -> None:
    with pytest.raises(exception.WorkerDied, match="cannot be started"):
        Supervisor(["/no/such/program"]).start(SPEC, lambda _: None, lambda _: None)


def test_a_worker_that_cannot_be_listened_to_does_not_stay(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Worker] = []

    def no_thread(worker: Worker) -> None:
        made.append(worker)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Worker, "start", no_thread)
    with pytest.raises(exception.WorkerDied, match="can't start new thread"):
        start("time.sleep(60)")
    with pytest.raises(ProcessLookupError):
        os.kill(made[0].pid, 0)


def test_stop_all_ends_all_of_them_in_order(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(HEAD + 'say(event="x"); stream.readline(); say(event="state", state="ended")')
    made = Supervisor([sys.executable, str(script)])
    events: list[dict[str, Any]] = []
    workers = [made.start(SPEC, events.append, lambda _: None) for _ in range(3)]
    eventually(lambda: len(events) == 3)
    made.stop_all(10)
    assert [w.outcome.state for w in workers if w.outcome] == ["ended"] * 3
