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


from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.agent import presence
from nova_pmt.agent.presence import Announcer, Presence
from tests.unit.agent.rig import eventually

UUID = "5d6c0c3e-5a1b-4c7d-9a53-0123456789ab"
SEEN = Presence(os.getpid(), 100.0, "1.0", "a", "EPYC", ("pc", "q35"), 1 << 30, 1, 10_000, True,
                {UUID: "standby"})  # fmt: skip


def test_what_is_written_is_read_by_everybody(tmp_path: Path) -> None:
    file = presence.path(str(tmp_path))
    presence.write(file, SEEN)
    assert presence.read(file) == SEEN
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o644
    assert os.listdir(tmp_path) == ["agent.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', '{"pid": "x", "at": 1}'])
def test_what_cannot_be_read_is_as_if_there_was_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "agent.json"
    assert presence.read(str(file)) is None
    file.write_text(text)
    assert presence.read(str(file)) is None


def test_what_a_newer_agent_tells_more_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text('{"pid": 7, "at": 1.5, "mood": "good"}')
    assert presence.read(str(tmp_path / "agent.json")) == Presence(7, 1.5)


def test_an_agent_is_alive_while_its_process_is_there_and_writes() -> None:
    assert SEEN.alive(109.0)
    assert not SEEN.alive(111.0)
    assert not SEEN.alive(99.0)  # from before the machine started anew
    dead = subprocess.Popen(["true"])
    dead.wait()
    assert not dataclasses.replace(SEEN, pid=dead.pid).alive(100.0)


class Abilities:
    def __init__(self) -> None:
        self.failures: list[Exception] = []

    def __call__(self) -> dict[str, Any]:
        if self.failures:
            raise self.failures.pop()
        return {"cpu_model": "EPYC", "machine_types": ["pc"], "plug": True}


def announcer(
    tmp_path: Path, abilities: Callable[[], Any], pairs: list[tuple[str, str]]
) -> Announcer:
    return Announcer(
        "a", str(tmp_path / "run"), "/dev/shm/x", "127.0.0.1", abilities, lambda: pairs
    )


def test_a_change_is_told_at_once_and_the_end_takes_the_file_away(tmp_path: Path) -> None:
    pairs: list[tuple[str, str]] = []
    file = presence.path(str(tmp_path / "run"))
    running = announcer(tmp_path, Abilities(), pairs)
    try:
        first = eventually(lambda: (seen := presence.read(file)) and seen.cpu_model and seen)
        assert (first.host, first.machine_types, first.plug) == ("a", ("pc",), True)
        assert first.backing_free_bytes > 0
        assert first.alive(presence.boot_time())
        pairs.append((UUID, "standby"))
        running.changed()
        seen = eventually(lambda: (seen := presence.read(file)) and seen.pairs and seen)
        assert (seen.pairs, seen.standbys) == ({UUID: "standby"}, 1)
    finally:
        running.close(5)
    assert not os.path.exists(file)


def test_an_agent_whose_libvirt_does_not_answer_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "EVERY_S", 0.05)
    abilities = Abilities()
    abilities.failures = [exception.GuestError("away"), ValueError("a bug")]
    running = announcer(tmp_path, abilities, [])
    file = presence.path(str(tmp_path / "run"))
    try:
        eventually(lambda: presence.read(file))
        eventually(lambda: (seen := presence.read(file)) and seen.cpu_model == "EPYC")
    finally:
        running.close(5)


def test_a_directory_that_cannot_be_made_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    running = announcer(tmp_path, Abilities(), [])
    running.changed()
    running.close(5)


def test_an_interface_that_is_not_there_has_no_known_speed() -> None:
    assert presence.speed_mbit("192.0.2.77") == 0
    assert presence.speed_mbit("127.0.0.1") >= 0
