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

"""Running things inside the namespaces of a lab host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nova_pmt.exception import LabError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000


def enter(pid: int, argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` in all namespaces of the host whose PID 1 is ``pid``."""
    return ["nsenter", "-t", str(pid), "-m", "-u", "-i", "-n", "-p", "--", *argv]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of processes in hosts: the caller's, with this interpreter's programs in PATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "TMP"))}
    programs = str(Path(sys.executable).parent)
    env["PATH"] = f"{programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env.update(extra or {})
    return env


def only_child(pid: int) -> int:
    """The first child of a process of ours with one thread; 0 if it has none."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return int(children[0]) if children else 0


def run(
    pid: int,
    argv: Sequence[str],
    *,
    check: bool = True,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> subprocess.CompletedProcess[str]:
    """Run ``argv`` inside the host to its end and return its output as text.

    :param timeout: seconds; then the whole process group is killed.
    :raises LabError: not found, non-zero exit (with ``check``), or too slow.
    """
    with subprocess.Popen(
        enter(pid, argv),
        stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(env),
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException as e:
            # nsenter's child is in its process group; killing nsenter alone would leave it running.
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(e, subprocess.TimeoutExpired):
                raise LabError(f"{' '.join(argv)}: no end within {timeout:g} s") from None
            raise
    if check and process.returncode:
        raise LabError(
            f"{' '.join(argv)}: exit status {process.returncode}: {(err or out).strip()[-2000:]}"
        )
    return subprocess.CompletedProcess(list(argv), process.returncode, out, err)


class LabProcess:
    """A long-running process inside a host.

    ``pid`` is its process id as seen from the root namespace, ``log`` the file with its output.
    A program that does not exist ends at once, with status 127.
    """

    def __init__(
        self, name: str, nsenter: subprocess.Popen[bytes], log: Path, log_start: int
    ) -> None:
        self.name = name
        self.log = log
        self._log_start = log_start
        self._searched: dict[str, int] = {}  # text to how far the log was looked through for it
        self._nsenter = nsenter
        self.pid, self._pidfd = self._find_child()

    def _find_child(self) -> tuple[int, int]:
        """Its pid and a descriptor for it; (0, -1) if it has ended already."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._nsenter.poll() is None:
            # A pid namespace is entered by a fork: the process is nsenter's only child.
            pid = only_child(self._nsenter.pid)
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    return pid, os.pidfd_open(pid)
            time.sleep(0.001)
        if self._nsenter.poll() is None:
            self._nsenter.kill()
            raise LabError(f"{self.name} did not start: {self.tail()}")
        return 0, -1

    def alive(self) -> bool:
        """False as soon as it has ended, whether or not anyone has reaped it."""
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]

    def signal(self, number: int) -> None:
        """Send a signal; never to a process that happens to have inherited the pid."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    def go_on(self) -> None:
        """SIGCONT, also to nsenter, which stops itself when its child is stopped."""
        self.signal(signal.SIGCONT)
        if self._nsenter.poll() is None:
            self._nsenter.send_signal(signal.SIGCONT)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Returns the exit status, or minus the signal's number.

        :raises LabError: it still runs after ``timeout`` seconds.
        """
        if self._pidfd >= 0 and not select.select([self._pidfd], [], [], timeout)[0]:
            raise LabError(f"{self.name} (pid {self.pid}) still runs after {timeout:g} s")
        return self._reap()

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, and SIGKILL if that did not end it within ``timeout`` seconds."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(timeout)
        except LabError:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        return self.wait(30)

    def said(self, text: str) -> bool:
        """Whether it has written this to its log, however long ago."""
        wanted = text.encode()
        start = self._searched.get(text, self._log_start)
        try:
            with self.log.open("rb") as log:
                log.seek(start)
                written = log.read()
        except OSError:
            return False
        at = written.find(wanted)
        if at < 0:
            at = max(0, len(written) - len(wanted))  # its last part may be the begin of it
        self._searched[text] = start + at
        return written.startswith(wanted, at)

    def tail(self, size: int = 2000) -> str:
        """The end of what it wrote to its log; nothing of an earlier process of the same name."""
        try:
            written = self.log.read_bytes()[self._log_start :]
        except OSError:
            return "(no log)"
        return written[-size:].decode(errors="replace").strip()

    def _reap(self) -> int:
        # nsenter stops itself when its child is stopped; left so it would never reap the child,
        # and the kernel would wait for that zombie for ever when the host is powered off.
        # On a busy machine it may do so only after the first SIGCONT.
        while self._nsenter.poll() is None:
            self._nsenter.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nsenter.wait(0.2)
        status = self._nsenter.returncode
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return status


def spawn(
    pid: int,
    name: str,
    argv: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
) -> LabProcess:
    """Start ``argv`` inside the host in the background; its output is appended to ``log``."""
    with open(log, "ab") as out:
        start = out.tell()
        nsenter = subprocess.Popen(
            enter(pid, argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(env),
            start_new_session=True,
        )
    return LabProcess(name, nsenter, log, start)


def in_network(pid: int, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread that is in the network namespace of process ``pid``.

    Sockets that it opens stay in that namespace and may be used from anywhere afterwards.
    """
    result: list[Any] = []

    def body() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                # os.setns is new in Python 3.12.
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns failed")
            finally:
                os.close(fd)
            result.extend((True, function()))
        except BaseException as e:  # noqa: BLE001 - raised again in the caller's thread
            result.extend((False, e))

    thread = threading.Thread(target=body, name="in_network")
    thread.start()
    thread.join()
    if not result[0]:
        raise result[1]
    value: T = result[1]
    return value
