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

"""Clients send back to back, stop when they are told to, and notice what breaks."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nova_pmt.evaluation.traffic import Traffic, silence_s
from nova_pmt.lab.transactions import Client, Exchange


class Server:
    """Answers as the guest does, while it may."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.open = threading.Event()
        self.open.set()
        self.sockets: list[socket.socket] = []
        self.clients: list[int] = []

    def connect(self, client: int) -> Client:
        ours, theirs = socket.socketpair()
        ours.settimeout(60.0)
        self.sockets.append(theirs)
        self.clients.append(client)
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return Client(ours, client)

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            for _ in lines:
                self.open.wait(60.0)
                try:
                    connection.sendall(b"%d\n" % next(self.numbers))
                except OSError:
                    return


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.open.set()
    for connection in running.sockets:
        connection.close()


@pytest.fixture
def traffic(server: Server) -> Iterator[Traffic]:
    running = Traffic(server.connect, 3, seed=1)
    yield running
    running.close()


def wait_for(wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_asked(traffic: Traffic, times: int = 1) -> None:
    """Wait until every client has sent so many requests since they were taken."""
    wait_for(
        lambda: all(len(lane.client.exchanges) >= lane.taken + times for lane in traffic._lanes)
    )


def test_it_is_silent_until_it_is_told(traffic: Traffic) -> None:
    assert traffic.quiesce() == []
    assert traffic.take() == []


def test_all_clients_send_and_each_request_is_taken_once(traffic: Traffic, server: Server) -> None:
    traffic.go(0.0)
    wait_asked(traffic, 30)
    assert traffic.quiesce() == []
    first = traffic.take()
    assert {exchange.client for exchange in first} == {1, 2, 3}
    assert traffic.take() == []
    traffic.go(0.0)
    wait_asked(traffic)
    traffic.quiesce()
    second = traffic.take()
    numbers = [(one.client, one.request) for one in first + second]
    assert len(set(numbers)) == len(numbers)


def test_to_be_quiet_is_to_have_every_answer(traffic: Traffic, server: Server) -> None:
    server.open.clear()
    traffic.go(0.0)
    wait_for(lambda: all(lane.busy for lane in traffic._lanes))

    def answer() -> None:
        wait_for(lambda: not traffic._running)  # it has begun to wait for the answers
        time.sleep(0.05)
        server.open.set()

    threading.Thread(target=answer, daemon=True).start()
    assert traffic.quiesce() == []
    assert [one.seq is not None for one in traffic.take()] == [True] * 3


def test_a_connection_that_breaks_is_told_and_replaced(traffic: Traffic, server: Server) -> None:
    traffic.go(0.001)
    server.sockets[1].shutdown(socket.SHUT_RDWR)
    wait_for(lambda: any(lane.failure for lane in traffic._lanes))
    (broken,) = traffic.quiesce()
    assert broken.startswith("client 2: ")
    traffic.take()
    traffic.reconnect()
    assert server.clients == [1, 2, 3, 4]
    traffic.go(0.0)
    wait_asked(traffic)
    assert traffic.quiesce() == []
    assert {exchange.client for exchange in traffic.take()} == {1, 3, 4}


def test_everybody_can_be_replaced(traffic: Traffic, server: Server) -> None:
    traffic.reconnect(everybody=True)
    traffic.go(0.0)
    wait_asked(traffic)
    assert traffic.quiesce() == []
    assert {exchange.client for exchange in traffic.take()} == {4, 5, 6}


def test_an_error_is_no_answer(server: Server) -> None:
    server.numbers = itertools.repeat(0)  # type: ignore[assignment]

    def connect(client: int) -> Client:
        ours, theirs = socket.socketpair()
        server.sockets.append(theirs)
        theirs.sendall(b"error disk vda slot 1: Input/output error\n")
        return Client(ours, client)

    traffic = Traffic(connect, 1, seed=1)
    try:
        traffic.go(0.0)
        wait_for(lambda: bool(traffic._lanes[0].failure))
        assert "Input/output error" in traffic.quiesce()[0]
        assert [one.seq for one in traffic.take()] == [None]
    finally:
        traffic.close()


def test_it_ends_while_an_answer_is_waited_for(server: Server) -> None:
    server.open.clear()
    traffic = Traffic(server.connect, 2, seed=1)
    traffic.go(0.0)
    wait_for(lambda: all(lane.busy for lane in traffic._lanes))
    begun = time.monotonic()
    traffic.close()
    wait_for(lambda: not any(lane.busy for lane in traffic._lanes))
    assert time.monotonic() - begun < 20.0


def test_silence_is_the_longest_gap_that_ends_after_the_kill() -> None:
    def at(moment: float | None) -> Exchange:
        return Exchange(1, 1, 0.0, None if moment is None else 1, moment)

    answers = [at(t) for t in (0.0, 3.0, 3.1, 3.6, None, 3.7)]
    assert silence_s(answers, 3.2) == pytest.approx(0.5)
    assert silence_s(answers, 9.0) is None
