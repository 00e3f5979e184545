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

"""Pausing and resuming a guest, and saving its devices: the QMP part of a pause.

The device state is saved with ``xen-save-devices-state`` (no Xen involved), always
with ``live: false``: the default would release the image locks of the paused guest.
While QEMU saves, the caller scans and copies memory: saving reads guest RAM at most,
just as in QEMU's own migration, where RAM is completed before the devices are saved.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor

from nova_pmt import exception
from nova_pmt.guest.monitor import DirectMonitor, Monitor, encode

SAVE = "xen-save-devices-state"
#: Device state of the largest guests is a few MB (video RAM is not in it).
MAX_DEVICE_STATE_BYTES = 64 << 20


class Execution(ABC):
    """Implements :class:`nova_pmt.checkpoint.interfaces.GuestExecution`.

    :param directory: on tmpfs, where QEMU's user may write.
    """

    def __init__(self, monitor: Monitor, directory: str) -> None:
        self._monitor = monitor
        self._path = os.path.join(directory, "devices.state")

    @abstractmethod
    def pause(self) -> None:
        """Stop the guest and start to save its devices; returns when it has stopped."""

    @abstractmethod
    def saved(self) -> None:
        """Wait until the devices are saved."""

    def hold(self) -> None:
        """Stop the guest, and save nothing."""
        self._monitor.execute("stop")

    @abstractmethod
    def resume(self) -> None:
        """Let the guest run on; works in whatever state :meth:`pause` was left."""

    def running(self) -> bool:
        """Whether the guest runs (an operator may have paused it)."""
        return bool(self._monitor.execute("query-status")["running"])

    def device_state(self) -> bytes:
        """The state that was saved last. To be read before the next pause, not in it."""
        with open(self._path, "rb") as file:
            data = file.read(MAX_DEVICE_STATE_BYTES + 1)
        if len(data) > MAX_DEVICE_STATE_BYTES:
            raise exception.GuestError(f"device state is larger than {MAX_DEVICE_STATE_BYTES}")
        return data

    def close(self) -> None:
        """Remove the file."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


class DirectExecution(Execution):
    """Over a QMP socket of our own: ``stop`` and the save go out in one write."""

    _monitor: DirectMonitor

    def __init__(self, monitor: DirectMonitor, directory: str) -> None:
        super().__init__(monitor, directory)
        self._pause_request = encode("stop", {}, "stop") + encode(
            SAVE, {"filename": self._path, "live": False}, "save"
        )
        self._resume_request = encode("cont", {}, "cont")

    def pause(self) -> None:
        self._monitor.send(self._pause_request)
        self._monitor.reply("stop", "stop")

    def saved(self) -> None:
        self._monitor.reply(SAVE, "save")

    def resume(self) -> None:
        self._monitor.send(self._resume_request)
        self._monitor.reply("cont", "cont")

    def running(self) -> bool:
        self._monitor.forget_events({"STOP", "RESUME"})
        return super().running()


class LibvirtExecution(Execution):
    """Through libvirt's passthrough, for domains without a monitor of ours."""

    def __init__(self, monitor: Monitor, directory: str) -> None:
        super().__init__(monitor, directory)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save-devices")
        self._saving: Future[object] | None = None

    def pause(self) -> None:
        self._monitor.execute("stop")
        self._saving = self._thread.submit(
            self._monitor.execute, SAVE, filename=self._path, live=False
        )

    def saved(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def resume(self) -> None:
        with contextlib.suppress(exception.GuestError):
            self.saved()
        self._monitor.execute("cont")

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


def make_execution(monitor: Monitor, directory: str) -> Execution:
    """The execution that fits the monitor."""
    if isinstance(monitor, DirectMonitor):
        return DirectExecution(monitor, directory)
    return LibvirtExecution(monitor, directory)
