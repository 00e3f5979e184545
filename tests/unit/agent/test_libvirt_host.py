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

"""What the agent concludes from what libvirt and QEMU say; both are played."""

from __future__ import annotations

import contextlib
import pathlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.standby import domainxml
from tests.unit.agent.rig import NAME, UUID

libvirt = pytest.importorskip("libvirt")
libvirt_host = pytest.importorskip("nova_pmt.agent.libvirt_host")

PLAIN = "<domain><name>web1</name><memory>1</memory></domain>"
MARKED = domainxml.with_mark(PLAIN, domainxml.Mark(7, "a", True))


class Handle:
    """A domain of libvirt's."""

    def __init__(self) -> None:
        self.xml = MARKED
        self.active = True
        self.starts_by_itself = False
        self.away = False

    def UUIDString(self) -> str:  # noqa: N802
        return UUID

    def name(self) -> str:
        return NAME

    def destroy(self) -> None:
        self.active = False

    def isActive(self) -> bool:  # noqa: N802
        return self.active

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        return self.xml

    def autostart(self) -> int:
        return int(self._answer(self.starts_by_itself))

    def state(self) -> list[int]:
        return list(self._answer([libvirt.VIR_DOMAIN_RUNNING, 0]))

    def _answer(self, value: Any) -> Any:
        if self.away:
            raise libvirt.libvirtError("client socket is closed")
        return value


class PlayedHost(libvirt_host.LibvirtHost):  # type: ignore[misc, name-defined]
    """With one domain, whose QEMU is in a state."""

    def __init__(self) -> None:
        self.handle = Handle()
        self.status = "paused"

    def _find(self, name: str) -> Any:
        return libvirt_host.Domain(None, self.handle)

    @contextlib.contextmanager
    def _monitor(self, domain: Any) -> Iterator[Any]:
        yield SimpleNamespace(execute=lambda command: {"status": self.status})


@pytest.fixture
def host() -> PlayedHost:
    return PlayedHost()


@pytest.mark.parametrize("status", ["paused", "prelaunch", "running"])
def test_a_standby_that_is_past_its_incoming_migration_holds_a_state(
    host: PlayedHost, status: str
) -> None:
    host.status = status
    assert host.holds_state(UUID, 7)


@pytest.mark.parametrize("status", ["inmigrate", "finish-migrate"])
def test_a_standby_that_waits_or_loads_holds_none(host: PlayedHost, status: str) -> None:
    host.status = status
    assert not host.holds_state(UUID, 7)


def test_only_our_standby_of_that_generation_counts(host: PlayedHost) -> None:
    assert not host.holds_state(UUID, 8)
    host.handle.xml = PLAIN
    assert not host.holds_state(UUID, 7)


def test_a_domain_that_is_gone_holds_no_state(
    host: PlayedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.handle.active = False
    assert not host.holds_state(UUID, 7)

    def unknown(name: str) -> Any:
        raise exception.UnknownDomain("none")

    monkeypatch.setattr(host, "_find", unknown)
    assert not host.holds_state(UUID, 7)


def autostart(host: PlayedHost) -> list[exception.Refusal]:
    return list(host._autostart_problems(host._find(UUID)))


def test_a_domain_that_libvirt_starts_by_itself_is_refused_with_the_cure(host: PlayedHost) -> None:
    assert autostart(host) == []
    host.handle.starts_by_itself = True
    (refusal,) = autostart(host)
    assert refusal.code == "AUTOSTART"
    assert refusal.cure == "virsh autostart --disable web1"
    assert "second copy" in refusal.message


def test_both_sides_look_for_it(host: PlayedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host._conf = SimpleNamespace(guest=SimpleNamespace(memory_backing_dir="/dev/shm"))
    host.handle.starts_by_itself = True
    for name, found in (("_tracker_problems", []), ("_qemu_problems", [])):
        monkeypatch.setattr(host, name, lambda *_, found=found: found)
    monkeypatch.setattr(libvirt_host.checks, "standby_memory", lambda *_: [])
    assert [one.code for one in host.check_standby(UUID, 1, [])] == ["AUTOSTART"]
    host.handle.xml = PLAIN
    for name in ("refusals", "disk_problems", "warnings"):
        monkeypatch.setattr(libvirt_host.checks, name, lambda _: [])
    assert [one.code for one in host.check(UUID)[0]] == ["AUTOSTART"]


def test_a_libvirtd_that_is_away_is_an_error_of_ours(host: PlayedHost) -> None:
    host.handle.away = True
    with pytest.raises(exception.GuestError):
        autostart(host)
    with pytest.raises(exception.GuestError):
        host._let_run(host._find(UUID))


@pytest.fixture
def killed(
    host: PlayedHost, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[pathlib.Path, pathlib.Path]:
    """What a QEMU that was killed leaves: its monitor's socket, and the log of a disk."""
    host._conf = SimpleNamespace(disk=SimpleNamespace(log_directory=str(tmp_path / "logs")))
    monkeypatch.setattr(libvirt_host.guest_domain, "qmp_path", lambda conf: str(tmp_path))
    monitor = tmp_path / f"{UUID}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(monitor))
    log = tmp_path / "logs" / UUID / "vda.log"
    log.parent.mkdir(parents=True)
    log.touch()
    return monitor, log


@pytest.mark.parametrize("after", ["a death", "a lost pair", "a standby"])
def test_nothing_is_left_of_a_qemu_that_was_killed(
    host: PlayedHost, killed: tuple[pathlib.Path, pathlib.Path], after: str
) -> None:
    host.handle.active = False
    for _ in range(2):
        if after == "a death":
            host.tidy(UUID)
        elif after == "a lost pair":
            host.destroy(UUID)
        else:
            host.cleanup_standby(UUID, 7)
        assert not any(path.exists() for path in killed)


def test_a_domain_that_nobody_knows_any_more_leaves_nothing_either(
    host: PlayedHost,
    killed: tuple[pathlib.Path, pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(name: str) -> Any:
        raise exception.UnknownDomain("none")

    monkeypatch.setattr(host, "_find", unknown)
    host.cleanup_standby(UUID, 7)
    assert not any(path.exists() for path in killed)


def test_an_active_domain_keeps_its_monitor_and_its_logs(
    host: PlayedHost, killed: tuple[pathlib.Path, pathlib.Path]
) -> None:
    host.tidy(UUID)
    host.cleanup_standby(UUID, 6)  # of a newer generation
    assert all(path.exists() for path in killed)


def test_a_directory_that_cannot_be_written_keeps_no_standby_from_being_cleaned_up(
    host: PlayedHost,
    killed: tuple[pathlib.Path, pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(path: str, **_options: Any) -> None:
        raise OSError("read-only file system")

    host.handle.active = False
    monkeypatch.setattr(libvirt_host.os, "unlink", failing)
    host.cleanup_standby(UUID, 7)
