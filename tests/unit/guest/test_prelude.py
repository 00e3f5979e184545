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

"""The prelude: one short migration, cancelled; whatever happens, QEMU is set as it was before."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.guest import prelude
from nova_pmt.guest.layout import PAGE_SIZE, Layout, TrackedBlock
from nova_pmt.guest.monitor import Monitor, QmpCommandError
from tests.unit.guest.test_vmstate import BLOCKS, MAGIC, ROM, configuration, stream

LAYOUT = Layout((TrackedBlock("pc.ram", BLOCKS["pc.ram"], 0, 0, True),))
CAPABILITIES = {
    "events": False,
    "x-ignore-shared": False,
    "pause-before-switchover": True,
    "xbzrle": True,
    "auto-converge": False,
}
PARAMETERS = {"max-bandwidth": 134217728, "downtime-limit": 300, "multifd-channels": 2}


class Qemu(Monitor):
    """Migrates the stream that it is given to the socket that it is told.

    :param data: all that is sent before the switchover.
    :param then: ``wait``, until it is cancelled; ``close`` the stream early; ``full`` goes on
        into the device state.
    """

    def __init__(self, data: bytes, then: str = "wait") -> None:
        self.data, self.then = data, then
        self.capabilities = dict(CAPABILITIES)
        self.parameters = dict(PARAMETERS)
        self.capabilities_used: dict[str, bool] = {}
        self.status = "none"
        self.running = True
        self.fail_on = ""
        self.events: list[str] = []
        self.unread: list[str] = []
        self.blocked: list[str] = []
        self.run_state = "paused"
        self._was_running = True
        self.commands: list[str] = []
        self._sock: socket.socket | None = None
        self._changed = threading.Condition()

    @property
    def under_way(self) -> bool:
        return self.status not in ("none", "cancelled", "failed", "completed")

    def execute(self, command: str, **arguments: Any) -> Any:
        self.commands.append(command)
        changes = command in ("migrate", "migrate-set-capabilities")
        if command == self.fail_on or (changes and self.under_way):
            raise QmpCommandError(command, {"class": "GenericError", "desc": "no"})
        return getattr(self, command.replace("-", "_"))(**arguments)

    def query_status(self) -> Any:
        return {"running": self.running, "status": "running" if self.running else self.run_state}

    def query_migrate(self) -> Any:
        found: dict[str, Any] = {} if self.status == "none" else {"status": self.status}
        return {**found, "blocked-reasons": self.blocked} if self.blocked else found

    def query_migrate_capabilities(self) -> Any:
        return [{"capability": name, "state": on} for name, on in self.capabilities.items()]

    def migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> Any:
        for entry in capabilities:
            self.capabilities[entry["capability"]] = entry["state"]

    def query_migrate_parameters(self) -> Any:
        return dict(self.parameters)

    def migrate_set_parameters(self, **arguments: Any) -> Any:
        self.parameters.update(arguments)
        if self.status == "active" and arguments.get("downtime-limit", 0) > 1000:
            self.run_state = "finish-migrate"
            self._was_running, self.running = self.running, False
            self._become("pre-switchover")

    def migrate(self, uri: str) -> Any:
        self.capabilities_used = dict(self.capabilities)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(uri.removeprefix("unix:"))
        self._was_running = self.running
        self._become("active")
        threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        assert self._sock is not None
        with contextlib.suppress(OSError):  # the worker may be gone
            self._sock.sendall(self.data)
        if self.then == "close":
            self._become("failed")
            self._sock.close()

    def migrate_cancel(self) -> Any:
        if self.under_way:
            self.running = self.running or self._was_running
            held = not self.running and self.status == "pre-switchover"
            self.run_state = "postmigrate" if held else "paused"
            self._become("cancelled")
            if self._sock is not None:
                self._sock.close()

    def cont(self) -> Any:
        self.running = True

    def _become(self, status: str) -> None:
        with self._changed:
            self.status = status
            self.events.append(status)
            self.unread.append(status)
            self._changed.notify_all()

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        with self._changed:
            status = match.get("status")
            if not self._changed.wait_for(
                lambda: status in self.unread if status else self.unread, timeout_s
            ):
                raise exception.GuestError(f"no event {match}")
            self.unread.remove(status or self.unread[0])
        return {}

    def saw_event(self, name: str) -> bool:
        return False

    def close(self) -> None:
        """Nothing is open."""


def as_before(qemu: Qemu, directory: Path) -> bool:
    """Whether nothing shows that there was a prelude."""
    return (
        qemu.capabilities == CAPABILITIES
        and qemu.parameters == PARAMETERS
        and qemu.running
        and list(directory.iterdir()) == []
    )


def until_devices() -> bytes:
    return stream()[: stream().rindex(b"\x04")]


def test_it_brings_the_machine_and_its_roms_and_leaves_no_trace(tmp_path: Path) -> None:
    qemu = Qemu(until_devices())
    taken = prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
    assert taken.blocks == BLOCKS
    assert taken.contents["pc.bios"] == {0: ROM, PAGE_SIZE: None}
    assert "pc.ram" not in taken.contents
    assert as_before(qemu, tmp_path)
    assert qemu.events == ["active", "pre-switchover", "cancelled"]


def test_it_runs_with_the_capabilities_that_it_needs_and_no_others(tmp_path: Path) -> None:
    qemu = Qemu(until_devices())
    prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
    assert {name for name, on in qemu.capabilities_used.items() if on} == {
        "events",
        "x-ignore-shared",
        "pause-before-switchover",
    }


def test_a_guest_that_was_paused_stays_paused(tmp_path: Path) -> None:
    qemu = Qemu(until_devices())
    qemu.running = False
    prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
    assert not qemu.running


def test_a_migration_that_ends_early_is_told_at_once(tmp_path: Path) -> None:
    qemu = Qemu(stream()[:6000], then="close")
    begin = time.monotonic()
    with pytest.raises(exception.GuestError, match="too early"):
        prelude.take(qemu, LAYOUT, str(tmp_path), 30.0)
    assert time.monotonic() - begin < 10
    assert as_before(qemu, tmp_path)


def test_a_stream_that_is_not_understood_is_told(tmp_path: Path) -> None:
    odd = b"\x01" + struct.pack(">I", 3) + b"\x05block" + struct.pack(">II", 0, 1)
    qemu = Qemu(MAGIC + configuration() + odd)
    with pytest.raises(exception.VmstateError, match="block"):
        prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
    assert as_before(qemu, tmp_path)


def test_a_migration_that_goes_nowhere_is_given_up(tmp_path: Path) -> None:
    qemu = Qemu(stream()[:6000])
    with pytest.raises(exception.GuestError, match="not complete after"):
        prelude.take(qemu, LAYOUT, str(tmp_path), 0.1)
    assert as_before(qemu, tmp_path)
    assert qemu.status == "cancelled"


@pytest.mark.parametrize("command", ["migrate", "migrate-set-capabilities"])
def test_what_qemu_refuses_is_told(tmp_path: Path, command: str) -> None:
    qemu = Qemu(until_devices())
    qemu.fail_on = command
    with pytest.raises(QmpCommandError):
        prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
    assert as_before(qemu, tmp_path)


def test_what_was_left_by_one_that_died_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "prelude.sock").write_bytes(b"")
    qemu = Qemu(until_devices())
    prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
    assert as_before(qemu, tmp_path)


# -- its process is killed --------------------------------------------------------------


class Killed(BaseException):
    """Nothing that is written down for an error is done any more."""


class Worker(Qemu):
    """What a worker sees of a QEMU, until it is killed behind one of its commands."""

    def __init__(self, qemu: Qemu, lives: int) -> None:
        self.qemu, self.lives = qemu, lives

    def execute(self, command: str, **arguments: Any) -> Any:
        if self.lives < 0:
            raise Killed
        answer = self.qemu.execute(command, **arguments)
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        return answer

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        if self.lives < 0:
            raise Killed
        return self.qemu.wait_event(name, timeout_s, **match)


def killed_at(directory: Path, number: int, qemu: Qemu | None = None) -> Qemu | None:
    """A QEMU whose prelude was killed behind that command; none when it has fewer."""
    found = Qemu(until_devices()) if qemu is None else qemu
    try:
        prelude.take(Worker(found, number), LAYOUT, str(directory), 5.0)
    except Killed:
        (directory / "prelude.sock").touch()
        return found
    return None


def test_whenever_it_is_killed_all_is_put_back(tmp_path: Path) -> None:
    states = set()
    number = 0
    while (qemu := killed_at(tmp_path, number)) is not None:
        states.add(qemu.status)
        prelude.recover(qemu, str(tmp_path))
        (tmp_path / "prelude.sock").unlink()
        assert as_before(qemu, tmp_path), qemu.commands[number]
        assert not qemu.under_way
        prelude.check(qemu)
        prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
        assert as_before(qemu, tmp_path), qemu.commands[number]
        number += 1
    assert number > 12
    assert states >= {"none", "active", "pre-switchover", "cancelled"}


def test_the_next_prelude_does_it_where_nobody_else_did(tmp_path: Path) -> None:
    number = 0
    while (qemu := killed_at(tmp_path, number)) is not None:
        assert prelude.take(qemu, LAYOUT, str(tmp_path), 5.0).blocks == BLOCKS
        assert as_before(qemu, tmp_path), qemu.commands[number]
        number += 1


def test_whoever_puts_back_may_be_killed_too(tmp_path: Path) -> None:
    lives = 0
    while True:
        qemu = killed_in(tmp_path, "pre-switchover")
        try:
            prelude.recover(Worker(qemu, lives), str(tmp_path))
            break
        except Killed:
            lives += 1
        prelude.recover(qemu, str(tmp_path))
        (tmp_path / "prelude.sock").unlink()
        assert as_before(qemu, tmp_path)
    assert lives > 5


def killed_in(directory: Path, status: str) -> Qemu:
    for number in range(30):
        qemu = killed_at(directory, number)
        assert qemu is not None
        if qemu.status == status:
            return qemu
        prelude.recover(qemu, str(directory))
    raise AssertionError(status)


def test_the_file_is_there_before_anything_changes_and_for_root_alone(tmp_path: Path) -> None:
    qemu = Qemu(until_devices())
    real = qemu.migrate_set_capabilities
    modes: list[int] = []

    def look(capabilities: list[dict[str, Any]]) -> None:
        modes.append((tmp_path / prelude.FILE).stat().st_mode & 0o777)
        real(capabilities)

    qemu.migrate_set_capabilities = look  # type: ignore[method-assign]
    prelude.take(qemu, LAYOUT, str(tmp_path), 5.0)
    assert modes == [0o600, 0o600]


@pytest.mark.parametrize("status", ["setup", "active", "pre-switchover", "device", "completed"])
def test_a_migration_of_somebody_elses_is_not_touched(tmp_path: Path, status: str) -> None:
    qemu = Qemu(b"")
    qemu.status = status
    prelude.recover(qemu, str(tmp_path))
    assert qemu.commands == []


def test_a_file_of_an_earlier_qemu_ends_no_migration_of_this_one(tmp_path: Path) -> None:
    killed_in(tmp_path, "pre-switchover")
    qemu = Qemu(b"")
    qemu.status = "active"
    prelude.recover(qemu, str(tmp_path))
    assert qemu.status == "active"
    assert not (tmp_path / prelude.FILE).exists()
    assert not {name for name in qemu.commands if not name.startswith("query-")}


def test_a_guest_that_an_operator_has_paused_meanwhile_stays_paused(tmp_path: Path) -> None:
    qemu = killed_in(tmp_path, "cancelled")
    qemu.running = False
    prelude.recover(qemu, str(tmp_path))
    assert not qemu.running
    assert qemu.capabilities == CAPABILITIES


def test_a_guest_that_is_held_by_a_migration_that_is_over_is_let_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prelude, "_END_S", 0.05)
    qemu = killed_in(tmp_path, "pre-switchover")
    qemu.status = "failed"
    prelude.recover(qemu, str(tmp_path))
    (tmp_path / "prelude.sock").unlink()
    assert as_before(qemu, tmp_path)


def test_a_migration_that_does_not_end_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prelude, "_END_S", 0.05)
    qemu = killed_in(tmp_path, "pre-switchover")
    qemu.fail_on = "migrate_cancel"
    with pytest.raises(exception.GuestError, match="stays in state 'pre-switchover'"):
        prelude.recover(qemu, str(tmp_path))
    qemu.fail_on = ""
    prelude.recover(qemu, str(tmp_path))
    (tmp_path / "prelude.sock").unlink()
    assert as_before(qemu, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"running": 1, "capabilities": {}, "parameters": {}}',
        '{"running": true, "capabilities": {"xbzrle": 1}, "parameters": {}}',
        '{"running": true, "capabilities": {}, "parameters": {"downtime-limit": "300"}}',
        '{"running": true, "capabilities": {}, "parameters": {"tls-creds": 1}}',
        '{"running": true, "capabilities": [], "parameters": {}}',
        '{"running": true, "capabilities": {}, "parameters": []}',
    ],
)
def test_a_file_that_is_not_understood_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / prelude.FILE).write_text(text)
    qemu = Qemu(b"")
    qemu.capabilities["x-ignore-shared"] = True
    with pytest.raises(exception.GuestError, match=r"prelude\.json"):
        prelude.recover(qemu, str(tmp_path))
    assert qemu.commands == ["query-migrate-capabilities"]
    qemu.capabilities["x-ignore-shared"] = False
    prelude.recover(qemu, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_no_link_is_followed_and_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    """QEMU's user may write in that directory."""
    elsewhere = tmp_path / "elsewhere"
    guest = tmp_path / "guest"
    guest.mkdir()
    (guest / (prelude.FILE + ".new")).symlink_to(elsewhere)
    prelude.take(Qemu(until_devices()), LAYOUT, str(guest), 5.0)
    assert list(guest.iterdir()) == []
    assert not elsewhere.exists()
    elsewhere.write_text(json.dumps({"running": True, "capabilities": {}, "parameters": {}}))
    qemu = Qemu(b"")
    qemu.capabilities["x-ignore-shared"] = True
    (guest / prelude.FILE).symlink_to(elsewhere)
    with pytest.raises(exception.GuestError):
        prelude.recover(qemu, str(guest))
    (guest / prelude.FILE).unlink()
    os.mkfifo(guest / prelude.FILE)
    with pytest.raises(exception.GuestError, match="no file"):
        prelude.recover(qemu, str(guest))


# -- can it be done? --------------------------------------------------------------------


def test_a_qemu_that_can_do_it_passes() -> None:
    prelude.check(Qemu(b""))


def test_missing_capabilities_are_named() -> None:
    qemu = Qemu(b"")
    del qemu.capabilities["x-ignore-shared"]
    with pytest.raises(exception.UnsupportedQemu, match="x-ignore-shared"):
        prelude.check(qemu)


def test_what_blocks_migration_blocks_protection() -> None:
    qemu = Qemu(b"")
    qemu.blocked = ["0000:00:05.0: VFIO device doesn't support migration"]
    with pytest.raises(exception.UnsupportedDevice, match="VFIO device"):
        prelude.check(qemu)


@pytest.mark.parametrize("status", ["setup", "active", "pre-switchover", "device", "cancelling"])
def test_a_migration_that_is_under_way_is_not_disturbed(status: str) -> None:
    qemu = Qemu(b"")
    qemu.status = status
    with pytest.raises(exception.Refusal, match=status) as caught:
        prelude.check(qemu)
    assert caught.value.code == "MIGRATING"
