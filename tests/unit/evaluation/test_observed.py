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

"""What is put into agents and workers of a campaign, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nova_pmt.evaluation import observed

UUID = "6d1b6f0e-0000-4000-8000-000000000001"
PAIR = {
    "uuid": UUID,
    "name": "guest",
    "generation": 7,
    "primary_host": "one",
    "standby_host": "two",
}
PRIMARY = {"pair": PAIR, "address": "10.0.0.1", "port": 1, "role": "primary"}
STANDBY = {"pair": PAIR, "domain_xml": "", "layout": [], "role": "standby"}

_WORKER = """
import json, sys
from nova_pmt.agent import control
spec = control.parse_spec({"spec": json.loads(sys.argv[1])})
"""
_PRIMARY = """
from nova_pmt import faultpoint
from nova_pmt.worker.outputs import Outputs
from nova_pmt.worker.trace import Trace
Trace.from_environment().line(event="release", epoch=3, nic="net0", end=5)
outputs = Outputs.__new__(Outputs)
for call in (lambda: outputs.arm(), lambda: outputs.open(None, keep=False)):
    try:
        call()
    except AttributeError:
        pass  # it is no real one
faultpoint.reach("round.paused")
faultpoint.reach("round.sent")
faultpoint.reach("round.paused")
print("alive")
"""
_STANDBY = """
from types import SimpleNamespace
from nova_pmt.arbiter.manager import ManagerArbiter
from nova_pmt.worker.standby import Standby
arbiter = ManagerArbiter.__new__(ManagerArbiter)
arbiter._api = SimpleNamespace(claim=lambda *_, **__: True)
arbiter.claim("uuid", 7, "standby", reason="x")
standby = Standby.__new__(Standby)
standby._receiver = SimpleNamespace(committed=9)
for call in (lambda: standby._acknowledge(9, 1), lambda: standby._resume()):
    try:
        call()
    except (AttributeError, AssertionError):
        pass  # it is no real one
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def armed(tmp_path: Path) -> Path:
    return tmp_path / "armed"


def play(
    trace: Path, armed: Path, spec: dict[str, Any], text: str
) -> subprocess.CompletedProcess[str]:
    """A process that takes itself for a worker."""
    env = {**os.environ, **observed.environment(str(trace), str(armed))}
    argv = [sys.executable, "-c", _WORKER + text, json.dumps(spec), "nova_pmt.cmd.worker"]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)


def lines(trace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trace.read_text().splitlines()]


def test_a_primary_tells_what_it_lets_out_and_of_which_generation(trace: Path, armed: Path) -> None:
    done = play(trace, armed, PRIMARY, _PRIMARY)
    assert done.stdout == "alive\n", done.stderr
    found = lines(trace)
    assert [line["event"] for line in found] == ["release", "armed", "alone"]
    assert {(line["host"], line["uuid"], line["generation"]) for line in found} == {
        ("one", UUID, 7)
    }
    assert found[0]["epoch"] == 3


def test_a_standby_tells_of_each_commit_before_its_answer(trace: Path, armed: Path) -> None:
    done = play(trace, armed, STANDBY, _STANDBY)
    assert done.returncode == 0, done.stderr
    found = [(line["event"], line.get("epoch"), line["host"]) for line in lines(trace)]
    assert found == [("claim", None, "two"), ("commit", 9, "two"), ("run", 9, "two")]


def test_a_worker_takes_the_step_that_is_meant_for_its_side_and_dies_there(
    trace: Path, armed: Path
) -> None:
    observed.arm(armed, "primary", "round.paused:kill:2")
    assert play(trace, armed, STANDBY, _STANDBY).returncode == 0
    assert armed.exists()
    done = play(trace, armed, PRIMARY, _PRIMARY)
    assert done.returncode == -signal.SIGKILL
    assert not armed.exists()
    assert [line["event"] for line in lines(trace)][-1] == "fault"
    assert lines(trace)[-1]["step"] == "round.paused"
    assert play(trace, armed, PRIMARY, _PRIMARY).stdout == "alive\n"
    assert observed.disarm(armed) is False


def test_a_fault_that_nobody_took_is_taken_back(armed: Path) -> None:
    observed.arm(armed, "standby", "standby.applied:kill:1")
    assert observed.disarm(armed) is True


def test_other_programs_are_left_alone(trace: Path, armed: Path) -> None:
    env = {**os.environ, **observed.environment(str(trace), str(armed))}
    text = "import sys; print('nova_pmt.evaluation.observed' in sys.modules)"
    argv = [sys.executable, "-c", text]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
