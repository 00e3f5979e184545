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

"""A qemu-storage-daemon that has a standby's images open, and the connections to it.

A plain process of QEMU's user, with a session of its own. It never outlives this one: the kernel
kills it when the thread that started it ends (``PR_SET_PDEATHSIG``), so that has to be a thread
that lives as long as the images are in use.

Nobody else can reach the images: the listening socket is handed down to the daemon, and its path
is gone as soon as we are connected.

Its nodes have ``cache.no-flush``: nothing ever waits for the disk below, which makes both the
writing and the end quick. Whoever opens the images on this host next sees the same page cache;
:meth:`StorageDaemon.stop` has written QEMU's own caches (of a qcow2's tables) into it. What must
survive a power cut is for the caller to fsync.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence

from nova_pmt import exception
from nova_pmt.guest import nbd
from nova_pmt.guest.disk.spec import DiskSpec

PROGRAM = "qemu-storage-daemon"
_SOCKET = "nbd.sock"
#: Of what the daemon said before it ended, for the message.
_WORDS_BYTES = 2000
#: Ends at once when our process has died before the kernel knew that it shall be killed then.
_UNLESS_ORPHAN = '[ "$PPID" = "$1" ] || exit 1; shift; exec "$@"'


@contextlib.contextmanager
def _short(directory: str) -> Iterator[str]:
    """A path for a socket there that is short enough for one, for this process."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{_SOCKET}"
    finally:
        os.close(descriptor)


class StorageDaemon:
    """Starts with the object; see the module's text.

    :param directory: for its socket; made, and gone again when this returns.
    :param owner: user and group ids that it runs as.
    :param timeout_s: most that it may take for anything.
    :raises nova_pmt.exception.DiskImageError: it does not start, or cannot open the images.
    """

    def __init__(
        self,
        disks: Sequence[DiskSpec],
        directory: str,
        owner: tuple[int, int],
        timeout_s: float,
    ) -> None:
        self._timeout_s = timeout_s
        self.exports: list[nbd.Export] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._words = os.memfd_create("storage-daemon", os.MFD_CLOEXEC)
        try:
            shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed
            os.makedirs(directory, mode=0o700)
            with _short(directory) as path, socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen(len(disks))
                self._start(disks, listener, owner)
                listener.close()  # or a daemon that ends at once would keep us waiting
                self._connect(disks, path)
        except (OSError, nbd.NbdError) as error:
            self._end(signal.SIGKILL)
            words = self.last_words() or str(error)
            self._close()
            raise exception.DiskImageError(
                f"the standby's images cannot be opened: {words}"
            ) from error
        except BaseException:
            self.kill()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _start(
        self, disks: Sequence[DiskSpec], listener: socket.socket, owner: tuple[int, int]
    ) -> None:
        command = ["setpriv", "--pdeathsig=KILL", "--no-new-privs"]
        if os.geteuid() == 0:
            command += [f"--reuid={owner[0]}", f"--regid={owner[1]}", "--clear-groups"]
        command += ["--", "sh", "-c", _UNLESS_ORPHAN, "sh", str(os.getpid()), PROGRAM]
        common = {"cache": {"no-flush": True}, "discard": "unmap"}
        for index, disk in enumerate(disks):
            below = {"driver": "file", "node-name": f"file{index}", "filename": disk.path}
            node = {"driver": disk.format, "node-name": f"disk{index}", "file": f"file{index}"}
            command += ["--blockdev", json.dumps({**below, **common})]
            command += ["--blockdev", json.dumps({**node, **common})]
        command += ["--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"]
        for index, disk in enumerate(disks):
            export = {"type": "nbd", "id": f"export{index}", "node-name": f"disk{index}"}
            command += ["--export", json.dumps({**export, "name": disk.name, "writable": True})]
        self._process = subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._words,
            stderr=self._words,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            start_new_session=True,
        )

    def _connect(self, disks: Sequence[DiskSpec], path: str) -> None:
        for disk in disks:
            export = nbd.Export(path, disk.name, timeout_s=self._timeout_s)
            self.exports.append(export)
            if export.size != disk.size:
                raise exception.DiskImageError(
                    f"the image of disk {disk.name}, {disk.path}, has {export.size} bytes, "
                    f"not {disk.size}"
                )

    @property
    def pid(self) -> int:
        """Of the daemon; 0 when it has ended."""
        return self._process.pid if self._process is not None else 0

    def last_words(self) -> str:
        """What the daemon said; errors, as a rule why it ended."""
        if self._words < 0:
            return ""
        size = os.fstat(self._words).st_size
        data = os.pread(self._words, _WORDS_BYTES, max(0, size - _WORDS_BYTES))
        return data.decode(errors="replace").strip()

    def stop(self) -> None:
        """Have everything written into the images, and end it.

        :raises nova_pmt.exception.DiskImageError: it could not be written; the daemon is gone
            nevertheless.
        """
        try:
            for export in self.exports:
                export.flush()
        except nbd.NbdError as error:
            self.kill()
            raise exception.DiskImageError(
                f"a standby's image cannot be written: {error.message}"
            ) from error
        status = self._end(signal.SIGTERM)
        words = self.last_words()
        self._close()
        if status:
            raise exception.DiskImageError(
                f"the storage daemon of the standby's images ended with status {status}: {words}"
            )

    def kill(self) -> None:
        """End it at once: what it had not written into the images is lost."""
        self._end(signal.SIGKILL)
        self._close()

    def _end(self, number: signal.Signals) -> int:
        """Its exit status; negative when it took a signal."""
        for export in self.exports:
            export.close()
        self.exports = []
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(process.pid)
            try:
                if not select.select([descriptor], [], [], self._timeout_s)[0]:
                    process.kill()
            finally:
                os.close(descriptor)
        return process.wait()

    def _close(self) -> None:
        if self._words >= 0:
            os.close(self._words)
            self._words = -1
