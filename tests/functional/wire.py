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

"""A proxy between the hosts that changes, cuts or holds what passes."""

from __future__ import annotations

import contextlib
import socket
import threading

from nova_pmt.lab import LabHost


class Proxy:
    """Passes one connection on, from a port on ``host`` to where it really goes.

    :param flip_at: flip one bit of the byte at this offset of what the client sends.
    :param cut_at: close both ends after so many bytes of what the client sends.
    """

    def __init__(
        self, host: LabHost, *, flip_at: int | None = None, cut_at: int | None = None
    ) -> None:
        self._host = host
        self._flip_at, self._cut_at = flip_at, cut_at
        self._sockets: list[socket.socket] = []

    def endpoint(self, address: str, port: int) -> tuple[str, int]:
        """Start; returns what the client shall connect to."""
        ip = self._host.repl_ip
        listener = self._host.in_network(lambda: socket.create_server((ip, 0)))
        self._sockets.append(listener)
        threading.Thread(target=self._serve, args=(listener, address, port), daemon=True).start()
        return ip, int(listener.getsockname()[1])

    def _serve(self, listener: socket.socket, address: str, port: int) -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            server = self._host.dial(address, port)
            self._sockets += [client, server]
            threading.Thread(target=self._pass, args=(server, client), daemon=True).start()
            self._pass(client, server, alter=True)

    def _pass(self, source: socket.socket, target: socket.socket, alter: bool = False) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if alter and self._flip_at is not None and 0 <= self._flip_at - passed < len(data):
                    changed = bytearray(data)
                    changed[self._flip_at - passed] ^= 0x10
                    data = bytes(changed)
                passed += len(data)
                if alter and self._cut_at is not None and passed >= self._cut_at:
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
