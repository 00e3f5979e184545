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

"""Notifications never harm what they tell of."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from nova_pmt import outbox
from nova_pmt.agent.notifications import Notifications
from tests.unit.agent.rig import Recorder, eventually


def test_levels_follow_how_much_a_state_matters() -> None:
    recorder = Recorder()
    outlet = Notifications(recorder)
    for state in ("protected", "primary_alone", "error"):
        outlet.put(state, {})
    outlet.close(5)
    assert [(level, kind) for level, kind, _ in recorder.events] == [
        ("info", "nova_pmt.pair.protected"),
        ("warn", "nova_pmt.pair.primary_alone"),
        ("error", "nova_pmt.pair.error"),
    ]


def test_a_failing_bus_is_logged_once_and_sending_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Recorder):
        broken = True

        def info(self, *arguments: Any) -> None:
            if self.broken:
                raise RuntimeError("no route to the broker")
            super().info(*arguments)

    failing = Failing()
    outlet = Notifications(failing)
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            outlet.put("protected", {})
        eventually(lambda: "RuntimeError" in caplog.text)
        failing.broken = False
        eventually(lambda: outlet.put("protected", {}) or failing.events)
        outlet.close(5)
    assert caplog.text.count("RuntimeError") == 1
    assert "no route" not in caplog.text  # it may have the password


def test_a_bus_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_MAX_WAITING", 2)
    release = threading.Event()

    class Hanging(Recorder):
        def info(self, *_: Any) -> None:
            release.wait(10)

    outlet = Notifications(Hanging())
    for _ in range(50):
        outlet.put("protected", {})
    outlet.close(0.01)
    release.set()


def test_without_a_notifier_nothing_is_sent() -> None:
    outlet = Notifications(None)
    outlet.put("protected", {})
    outlet.close(5)
