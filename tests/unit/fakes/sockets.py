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

"""Two ends of a connection with a link on each, driven by one thread; certificates for both."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nova_pmt.replication import tls
from nova_pmt.replication.link import Buffers, Link
from nova_pmt.replication.protocol import Header, Type


class End:
    """One end: a link, its loop, and what came."""

    def __init__(
        self, sock: socket.socket, name: str, *, earnest: bool = True, **options: Any
    ) -> None:
        self.frames: list[tuple[Header, bytes]] = []
        self.heartbeats = 0
        self.selector = selectors.DefaultSelector()
        values = {"heartbeat_s": 10.0, "timeout_s": 30.0, **options}
        self.link = Link(sock, self, peer=name, **values)
        if earnest:
            self.link.in_earnest()
        self.link.register(self.selector)

    def buffers(self, header: Header) -> Buffers:
        return [memoryview(bytearray(header.length))]

    def frame(self, header: Header, payload: Buffers) -> None:
        if header.type is Type.HEARTBEAT:
            self.heartbeats += 1
        else:
            self.frames.append((header, b"".join(payload)))

    def turn(self, timeout_s: float = 0.0) -> None:
        """One turn of the I/O loop."""
        for key, mask in self.selector.select(timeout_s):
            key.data(mask)

    def close(self) -> None:
        self.link.close()
        self.selector.close()


def turn_until(condition: Callable[[], bool], *ends: End, timeout_s: float = 20.0) -> None:
    """Run the loops of the ends until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        for end in ends:
            end.turn(0.001)


class Payload:
    """A frame whose bytes are the test's; remembers when they were sent."""

    def __init__(self, data: bytes, order: list[Any] | None = None, name: Any = None) -> None:
        self.header = Header(Type.PRELUDE, len(data))
        self._data = data
        self._order = [] if order is None else order
        self._name = name

    def begin(self) -> Buffers:
        return [memoryview(self.header.pack()), memoryview(self._data)]

    def sent(self) -> None:
        self._order.append(self._name)


def tls_conf(directory: Path, *, insecure: bool = False) -> Any:
    """What :mod:`nova_pmt.replication.tls` reads of the configuration."""
    return SimpleNamespace(
        tls=SimpleNamespace(
            insecure=insecure,
            ca_file=str(directory / "ca.pem"),
            cert_file=str(directory / "cert.pem"),
            key_file=str(directory / "key.pem"),
        )
    )


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """A connection over loopback: client, server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), 5.0)
        server, _ = listener.accept()
    server.settimeout(5.0)
    return client, server


def both(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Run two things at once; each gives its result or its exception."""

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # noqa: BLE001  it is the result
            return error

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(attempt(second)))
    thread.start()
    result = attempt(first)
    thread.join(10.0)
    return result, found[0]


def secure_pair(client_conf: Any, server_conf: Any) -> tuple[Any, Any]:
    """TLS over loopback between hosts ``one`` (client) and ``two``; sockets or exceptions."""
    client, server = tcp_pair()
    return both(
        lambda: tls.connect(client_conf, client, "two"),
        lambda: tls.accept(server_conf, server, "one"),
    )
