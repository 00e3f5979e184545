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

"""Activation hands QEMU one stream and waits until it says that it has it."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.vmstate import activation_tail
from nova_pmt.standby import activation
from tests.unit.fakes.guest import device_state


class Qemu(Monitor):
    """Listens where it is told, and reads.

    :param statuses: what ``query-migrate`` says, one after the other; the last for ever.
    """

    def __init__(self, statuses: list[str | None], *, listen: bool = True) -> None:
        self.statuses = statuses
        self.listens = listen
        self.received = b""
        self.thread: threading.Thread | None = None

    def execute(self, command: str, **arguments: Any) -> Any:
        if command == "migrate-incoming":
            path = arguments["uri"].removeprefix("unix:")
            listener = socket.socket(socket.AF_UNIX)
            if self.listens:
                listener.bind(path)
                listener.listen(1)
            self.thread = threading.Thread(target=self._read, args=(listener,))
            self.thread.start()
            return {}
        assert command == "query-migrate"
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return {} if status is None else {"status": status}

    def _read(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                while part := peer.recv(65536):
                    self.received += part

    def wait_event(self, name: str, timeout_s: float, **match: Any) -> dict[str, Any]:
        raise NotImplementedError

    def saw_event(self, name: str) -> bool:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_the_whole_stream_is_written_before_the_guest_may_run(tmp_path: Path) -> None:
    qemu = Qemu([None, "active", "active", "completed"])
    side = {"vga.vram": bytes(4096) + b"x" * 4096}
    (tmp_path / "incoming.sock").write_bytes(b"left by one that died")
    activation.load(qemu, str(tmp_path), b"head", side, device_state(5))
    assert qemu.thread is not None
    qemu.thread.join(5)
    assert qemu.received == b"head" + activation_tail(side, device_state(5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", ["failed", "active"])
def test_a_state_that_qemu_does_not_take_is_told(tmp_path: Path, status: str) -> None:
    qemu = Qemu([status])
    with pytest.raises(exception.GuestError, match=status) as caught:
        activation.load(qemu, str(tmp_path), b"head", {}, device_state(5), timeout_s=0.05)
    assert caught.value.code == "ACTIVATION_FAILED"
    assert list(tmp_path.iterdir()) == []
    assert qemu.thread is not None
    qemu.thread.join(5)


def test_a_qemu_that_does_not_listen_is_told(tmp_path: Path) -> None:
    qemu = Qemu(["setup"], listen=False)
    with pytest.raises(exception.GuestError) as caught:
        activation.load(qemu, str(tmp_path), b"head", {}, device_state(5), timeout_s=0.5)
    assert caught.value.code == "ACTIVATION_FAILED"
    assert qemu.thread is not None
    qemu.thread.join(5)


def test_a_device_state_that_is_none_is_refused_before_qemu_hears_of_it(tmp_path: Path) -> None:
    qemu = Qemu(["completed"])
    with pytest.raises(exception.VmstateError):
        activation.load(qemu, str(tmp_path), b"head", {}, b"garbage")
    assert qemu.thread is None
