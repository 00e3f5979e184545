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

"""Clients that send requests back to back, each on its own connection and in its own thread."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import threading
from collections.abc import Callable

from nova_pmt.exception import LabError
from nova_pmt.lab.transactions import Client, Exchange

#: Makes the client with this number; what it raises goes through.
Connect = Callable[[int], Client]


class _Lane:
    """One connection and its thread's share of the state."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.busy = False
        self.failure = ""
        self.gone = False
        self.taken = 0
        self.ends = _ends(client.connection)


def _ends(connection: socket.socket) -> tuple[object, object, int]:
    """What tells a connection from every other one."""
    return connection.getsockname(), connection.getpeername(), connection.fileno()


class Traffic:
    """``count`` clients; silent until :meth:`go`. Close it.

    :param connect: makes a client; its connection's timeout holds for each answer.
    :param first: number of the first client.
    """

    def __init__(self, connect: Connect, count: int, *, seed: int, first: int = 1) -> None:
        self._connect = connect
        self._seed = seed
        self._next = first
        self._changed = threading.Condition()
        self._running = False
        self._over = threading.Event()
        self._think_s = 0.0
        self._lanes: list[_Lane] = []
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        client = self._connect(self._next)
        self._next += 1
        lane = _Lane(client)
        self._lanes.append(lane)
        threading.Thread(
            target=self._serve, args=(lane,), name=f"client-{client.client}", daemon=True
        ).start()

    def _serve(self, lane: _Lane) -> None:
        random_ = random.Random(f"{self._seed}-{lane.client.client}")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or lane.gone or self._over.is_set())
                if lane.gone or self._over.is_set():
                    return
                lane.busy = True
                think_s = random_.uniform(0.0, 2.0 * self._think_s)
            failure = ""
            try:
                lane.client.request()
            except (OSError, LabError, ValueError) as error:
                failure = f"client {lane.client.client}: {type(error).__name__}: {error}"
            with self._changed:
                lane.busy, lane.failure = False, failure
                self._changed.notify_all()
            if failure:
                return
            self._over.wait(think_s)

    def go(self, think_s: float) -> None:
        """Send requests from now on, or at another pace.

        :param think_s: mean of the time between an answer and the next request.
        """
        with self._changed:
            self._running, self._think_s = True, think_s
            self._changed.notify_all()

    def quiesce(self) -> list[str]:
        """Send no more, and wait until each client has its answer, or its timeout.

        :returns: what broke since the connection was made, a line for each that is broken now.
        """
        with self._changed:
            self._running = False
            self._changed.wait_for(lambda: not any(lane.busy for lane in self._lanes))
            for lane in self._lanes:
                if not lane.failure and _ends(lane.client.connection) != lane.ends:
                    lane.failure = f"client {lane.client.client}: not the same connection"
            return [lane.failure for lane in self._lanes if lane.failure]

    def latest(self) -> float:
        """When the last answer came, CLOCK_MONOTONIC; 0: there was none."""
        times = (
            exchange.answered_at or 0.0
            for lane in self._lanes
            for exchange in lane.client.exchanges[-2:]
        )
        return max(times, default=0.0)

    def take(self) -> list[Exchange]:
        """Requests that are over and were not taken before; only when quiet."""
        found = []
        for lane in self._lanes:
            found += lane.client.exchanges[lane.taken :]
            lane.taken = len(lane.client.exchanges)
        return found

    def reconnect(self, *, everybody: bool = False) -> None:
        """New clients, with new numbers, in place of those that are broken; only when quiet.

        :param everybody: in place of all.
        :raises OSError: the guest does not answer.
        """
        for lane in list(self._lanes):
            if everybody or lane.failure:
                self._lanes.remove(lane)
                with self._changed:
                    lane.gone = True
                    self._changed.notify_all()
                lane.client.close()
                self._add()

    def close(self) -> None:
        """Hang up; an answer that is waited for is given up."""
        self._over.set()
        with self._changed:
            self._changed.notify_all()
        for lane in self._lanes:
            with contextlib.suppress(OSError):  # wakes a thread that waits for an answer
                lane.client.connection.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                lane.client.connection.close()


def silence_s(exchanges: list[Exchange], killed: float) -> float | None:
    """The longest time without any answer that began or ended after the kill; None: unknown."""
    times = sorted(one.answered_at for one in exchanges if one.answered_at is not None)
    gaps = [after - before for before, after in itertools.pairwise(times) if after > killed]
    return max(gaps, default=None)
