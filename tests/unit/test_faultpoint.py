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

"""Faults are asked for by name, and there are none by default."""

from __future__ import annotations

import os
import signal

import pytest

from nova_pmt import exception, faultpoint


def test_nothing_happens_unless_it_was_asked_for() -> None:
    for step in faultpoint.STEPS:
        faultpoint.reach(step)


def test_a_step_fails_when_it_is_reached_for_that_time() -> None:
    fault = faultpoint._Fault("round.copied:fail:3")
    fault.reach("round.copied")
    fault.reach("round.paused")
    fault.reach("round.copied")
    with pytest.raises(exception.PmtError) as caught:
        fault.reach("round.copied")
    assert caught.value.code == "FAULT_INJECTED"
    fault.reach("round.copied")  # once


@pytest.mark.parametrize(("action", "sent"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_a_step_ends_or_stops_the_process(
    monkeypatch: pytest.MonkeyPatch, action: str, sent: signal.Signals
) -> None:
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    faultpoint._Fault(f"round.sent:{action}").reach("round.sent")
    assert killed == [(os.getpid(), sent)]


@pytest.mark.parametrize("text", ["x", "no.such.step:kill", "round.sent:explode", "a:b:c:d"])
def test_a_fault_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(exception.ConfigError, match="STEP:ACTION"):
        faultpoint._Fault(text)
