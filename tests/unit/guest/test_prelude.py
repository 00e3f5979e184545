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
        self.blocked: list[str] = []
        self._sock: socket.socket | None = None
        self._changed = threading.Condition()

    def execute(self, command: str, **arguments: Any) -> Any:
        if command == self.fail_on:
            raise QmpCommandError(command, {"class": "GenericError", "desc": "no"})
        return getattr(self, command.replace("-", "_"))(**arguments)

    def query_status(self) -> Any:
        return {"running": self.running}

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
            self._become("pre-switchover")
            self.running = False

    def migrate(self, uri: str) -> Any:
        self.capabilities_used = dict(self.capabilities)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(uri.removeprefix("unix:"))
        self._become("active")
        threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        assert self._sock is not None
        self._sock.sendall(self.data)
        if self.then == "close":
            self._become("failed")
            self._sock.close()

    def migrate_cancel(self) -> Any:
        if self.status in ("active", "pre-switchover"):
            self._become("cancelled")
            self.running = True
            assert self._sock is not None
            self._sock.close()

    def cont(self) -> Any:
        self.running = True

    def _become(self, status: str) -> None:
        with self._changed:
            self.status = status
            self.events.append(status)
            self._changed.notify_all()

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        with self._changed:
            if not self._changed.wait_for(lambda: match["status"] in self.events, timeout_s):
                raise exception.GuestError(f"no event {match}")
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
    real = qemu.migrate_cancel

    def cancel() -> None:
        real()
        qemu.running = False

    qemu.migrate_cancel = cancel  # type: ignore[method-assign]
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
