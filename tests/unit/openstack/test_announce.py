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

"""What operators are told of servers of Nova."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from nova_pmt.openstack.announce import Announcements

UUID = "5a2f3c1e-0000-4000-8000-0000000000aa"


class Recorder:
    """A notifier."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, dict[str, Any]]] = []
        self.broken = False

    def info(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None:
        self._take("info", event_type, payload)

    def warn(self, ctxt: dict[str, Any], event_type: str, payload: dict[str, Any]) -> None:
        self._take("warn", event_type, payload)

    def _take(self, level: str, event_type: str, payload: dict[str, Any]) -> None:
        if self.broken:
            raise RuntimeError("amqp://nova:hunter2@bus refused")
        self.sent.append((level, event_type, payload))


def test_levels_follow_how_much_it_matters() -> None:
    recorder = Recorder()
    announce = Announcements(recorder, now=lambda: 0.25)
    for what in ("unprotected", "refused", "failing_over", "failed_over"):
        announce(what, UUID, "because")
    announce.close(30)
    assert [(level, kind) for level, kind, _ in recorder.sent] == [
        ("info", "nova_pmt.server.unprotected"),
        ("warn", "nova_pmt.server.refused"),
        ("warn", "nova_pmt.server.failing_over"),
        ("info", "nova_pmt.server.failed_over"),
    ]
    assert recorder.sent[0][2] == {
        "nova_pmt_object.name": "ServerPayload",
        "nova_pmt_object.namespace": "nova_pmt",
        "nova_pmt_object.version": "1.0",
        "nova_pmt_object.data": {
            "uuid": UUID,
            "reason": "because",
            "at": "1970-01-01T00:00:00.250Z",
        },
    }


def test_a_bus_that_fails_is_logged_once_and_without_its_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder()
    recorder.broken = True
    announce = Announcements(recorder)
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            announce("refused", UUID, "because")
        announce.close(30)
    assert len(caplog.records) == 1
    assert "RuntimeError" in caplog.text and "hunter2" not in caplog.text


def test_a_bus_that_hangs_holds_nobody_up() -> None:
    hangs = threading.Event()

    class Hanging(Recorder):
        def _take(self, level: str, event_type: str, payload: dict[str, Any]) -> None:
            hangs.wait(60)

    announce = Announcements(Hanging())
    for _ in range(3000):
        announce("refused", UUID, "because")
    hangs.set()
