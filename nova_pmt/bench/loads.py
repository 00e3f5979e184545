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

"""What a guest does while it is measured, seen from outside: a client in ctl.

All is timed out here: a guest's own clock stands still in every pause.
"""

from __future__ import annotations

import array
import fcntl
import socket
import termios
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from nova_pmt.exception import LabError
from nova_pmt.lab import CONTROL_PORT, LabGuest
from nova_pmt.lab.traffic import SINK_PORT, SOURCE_PORT

ECHO_BYTES = 64
MB = 1e6
#: A stream has found its speed when so many steps were no more than this faster than as many before
#: them, or after this time.
STREAM_STEP_S, STREAM_STEPS, STREAM_GROWTH, STREAM_WARM_UP_S = 0.5, 4, 0.05, 30.0
_IO_BYTES = 1 << 20
_TIMEOUT_S = 60.0
#: Most blocks of one command: its answer must come in time.
_MAX_BLOCKS = 1 << 20


def echo(guest: LabGuest, seconds: float, every_s: float = 0.0) -> list[float]:
    """Milliseconds from each request of 64 bytes until its answer; one connection, one by one.

    :param every_s: from request to request at least; 0: the next one follows on the answer.
    """
    found = []
    with guest.connect(timeout=_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        exchange(connection)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            exchange(connection)
            taken = time.perf_counter() - start
            found.append(taken * 1e3)
            if taken < every_s:
                time.sleep(every_s - taken)
    return found


def exchange(connection: socket.socket) -> None:
    """Have the guest echo 64 bytes.

    :raises OSError: it does not answer; also LabError: it hung up.
    """
    data = bytes(range(ECHO_BYTES))
    connection.sendall(data)
    left = len(data)
    while left:
        part = connection.recv(left)
        if not part:
            raise LabError("the guest closed the connection")
        left -= len(part)


def transactions(guest: LabGuest, seconds: float, number: int = 1) -> list[float]:
    """Milliseconds of each request to the transactional server, durable on every disk.

    :param number: the client's; those that ask at the same time have different ones.
    """
    found = []
    with guest.transactions(number, _TIMEOUT_S) as client:
        client.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.request()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            client.request()
            found.append((time.perf_counter() - start) * 1e3)
    return found


class DiskWriter:
    """Has the guest write blocks; about as long as wanted, as fast as it goes.

    :param order: ``seq`` or ``rand``, of what cannot be compressed; ``text``: one after the other,
        lines of a log.
    :param disks: the guest's names of them; written to in turn.
    """

    def __init__(self, guest: LabGuest, order: str, block_kib: int, disks: tuple[str, ...]) -> None:
        self._guest = guest
        self._order, self._block_kib, self._disks = order, block_kib, disks
        self._guess = max(1, 4096 // block_kib)

    def write(self, seconds: float) -> float:
        """MB/s; of one command for each disk, whose lengths follow from a short one before it."""
        with self._guest.connect(CONTROL_PORT, _TIMEOUT_S) as connection:
            lines = connection.makefile("rb")
            taken = self._command(connection, lines, self._disks[0], self._guess)
            # A short command under protection mostly waits for its answer: one step is not enough.
            while taken < seconds / 8:
                self._guess = self._scaled(seconds / 4 / taken)
                taken = self._command(connection, lines, self._disks[0], self._guess)
            blocks = self._scaled(seconds / len(self._disks) / taken)
            start = time.perf_counter()
            for disk in self._disks:
                self._command(connection, lines, disk, blocks)
            elapsed = time.perf_counter() - start
        return blocks * len(self._disks) * self._block_kib * 1024 / MB / elapsed

    def _scaled(self, factor: float) -> int:
        return max(1, min(_MAX_BLOCKS, round(self._guess * min(factor, 16.0))))

    def _command(self, connection: socket.socket, lines: Any, disk: str, blocks: int) -> float:
        text = f"disk write {self._order} {self._block_kib} {blocks} {disk}"
        start = time.perf_counter()
        connection.sendall(text.encode() + b"\n")
        answer = lines.readline().decode()
        if not answer.startswith("ok"):
            raise LabError(f"{self._guest!r}: {text}: {answer.strip() or 'connection closed'}")
        return time.perf_counter() - start


def stream_from(guest: LabGuest, seconds: float) -> float:
    """MB/s of TCP from the guest, as its client gets it, once it gets no faster."""
    buffer = bytearray(_IO_BYTES)
    count = 0
    with guest.connect(SOURCE_PORT, _TIMEOUT_S) as connection:

        def receive(until: float) -> int:
            nonlocal count
            while time.perf_counter() < until:
                part = connection.recv_into(buffer)
                if not part:
                    raise LabError("the guest closed the connection")
                count += part
            return count

        return _settled_rate(receive, seconds)


def stream_to(guest: LabGuest, seconds: float) -> float:
    """MB/s of TCP to the guest: what it acknowledges, once it gets no faster."""
    data = memoryview(bytes(_IO_BYTES))
    sent = 0
    with guest.connect(SINK_PORT, _TIMEOUT_S) as connection:

        def send(until: float) -> int:
            nonlocal sent
            while time.perf_counter() < until:
                sent += connection.send(data)
            waiting = array.array("i", [0])
            fcntl.ioctl(connection, termios.TIOCOUTQ, waiting, True)
            return sent - waiting[0]

        return _settled_rate(send, seconds)


def _settled_rate(move: Callable[[float], int], seconds: float) -> float:
    """MB/s, after a warm-up.

    Every acknowledgement of a protected guest takes tens of milliseconds, and so a connection needs
    many seconds to find the window for that. What a long transfer gets is what counts here.

    :param move: moves bytes until then (perf_counter), and returns how many there were in all.
    """
    counts = [move(0.0)]
    start = end = time.perf_counter()
    while True:
        end += STREAM_STEP_S
        counts.append(move(end))
        if is_settled(counts) or end - start >= STREAM_WARM_UP_S:
            break
    begin, before = time.perf_counter(), counts[-1]
    after = move(begin + seconds)
    return (after - before) / MB / (time.perf_counter() - begin)


def is_settled(counts: Sequence[int]) -> bool:
    """Whether a stream gets no faster.

    :param counts: bytes in all, after each of some equal steps.
    """
    if len(counts) <= 2 * STREAM_STEPS:
        return False
    now = counts[-1] - counts[-1 - STREAM_STEPS]
    before = counts[-1 - STREAM_STEPS] - counts[-1 - 2 * STREAM_STEPS]
    return now <= before * (1 + STREAM_GROWTH)


class Background:
    """Runs something again and again in a thread until the block's end; errors are raised there."""

    def __init__(self, name: str, action: Callable[[threading.Event], None]) -> None:
        self._end = threading.Event()
        self._action = action
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                self._action(self._end)
        except Exception as error:  # noqa: BLE001 - raised again by close()
            self._errors.append(error)

    def start(self) -> Background:
        self._thread.start()
        return self

    def close(self) -> None:
        """End it.

        :raises LabError: it failed before.
        """
        self._end.set()
        self._thread.join(_TIMEOUT_S)
        if self._errors:
            raise LabError(f"{self._thread.name}: {self._errors[0]}") from self._errors[0]
