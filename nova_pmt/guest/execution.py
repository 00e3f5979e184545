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
    def prepare(self) -> None:
        """The next command is :meth:`pause`, in a moment; what can be done ahead of it is done."""

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
        running = bool(self._monitor.execute("query-status")["running"])
        if running:
            # A guest that was reset (virsh reboot, on_poweroff = restart) has told of a SHUTDOWN
            # as well: its QEMU's next end is not on purpose for that.
            self._monitor.forget_events({"SHUTDOWN"})
        return running

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
    """Over a QMP socket of our own: ``stop`` and the save go out in one write.

    QEMU reads a monitor byte by byte, with some six system calls for each: 6 us, measured. So it
    gets all of ``stop`` but the last byte before the pause, and all of ``cont`` but the last byte
    while it saves. (Out-of-band execution, with which it reads the save while it stops, gained
    no more than this, and made ``stop`` late at times.)
    """

    _monitor: DirectMonitor

    def __init__(self, monitor: DirectMonitor, directory: str) -> None:
        super().__init__(monitor, directory)
        self._stands_for_others = False
        self._stop, self._cont = encode("stop", {}, "stop"), encode("cont", {}, "cont")
        self._pause_request = self._stop + encode(
            SAVE, {"filename": self._path, "live": False}, "save"
        )

    def prepare(self) -> None:
        self._monitor.send(begin=self._stop)

    def pause(self) -> None:
        self._monitor.forget_events({"STOP", "RESUME"})
        self._stands_for_others = False
        self._monitor.send(self._pause_request, begin=self._cont)
        self._monitor.reply("stop", "stop")
        # No STOP: somebody has paused it since we looked. It is not for us to let it run on.
        self._stands_for_others = not self._monitor.has_event("STOP")

    def saved(self) -> None:
        self._monitor.reply(SAVE, "save")
        # Somebody's ``cont`` (virsh resume) in our pause: what was copied since is of two moments.
        if self._monitor.saw_event("RESUME"):
            raise exception.GuestError(
                "somebody resumed the guest in the pause of a checkpoint, which is thrown away",
                code="RESUMED_IN_PAUSE",
                cure="Nothing: protection resumes by itself. Resume only what was suspended.",
            )

    def hold(self) -> None:
        self._stands_for_others = False
        super().hold()

    def resume(self) -> None:
        if self._stands_for_others:
            self._stands_for_others = False
            return
        self._monitor.send(self._cont)
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

    def prepare(self) -> None:
        """Through libvirt nothing can be done ahead."""

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
