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

"""A QMP server on a unix socket that says what the test wants it to say."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}}}
#: Given a command, the messages to send: dictionaries, or bytes as they are; None closes.
Answer = Callable[[dict[str, Any]], list[Any] | None]


def done(command: dict[str, Any], result: Any = None) -> dict[str, Any]:
    """The reply to a command that worked."""
    return {"return": {} if result is None else result, "id": command.get("id")}


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}}


class FakeQmp:
    """Serves one connection after the other.

    :param answer: what is said to each command after ``qmp_capabilities``.
    """

    def __init__(self, directory: Path, answer: Answer, greeting: Any = GREETING) -> None:
        self.path = str(directory / "qmp.sock")
        self.commands: list[dict[str, Any]] = []
        self.reads = 0
        self._answer = answer
        self._greeting = greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._peer: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> FakeQmp:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in (self._listener, self._peer):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._thread.join(5.0)

    def say(self, *messages: Any) -> None:
        """Send messages of its own accord."""
        assert self._peer is not None
        self._send(self._peer, list(messages))

    @staticmethod
    def _send(peer: socket.socket, messages: list[Any]) -> None:
        data = b"".join(
            message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
            for message in messages
        )
        peer.sendall(data)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                self._peer = peer
                with peer, contextlib.suppress(OSError):
                    self._talk(peer)

    def _talk(self, peer: socket.socket) -> None:
        self._send(peer, [self._greeting])
        text = ""
        while part := peer.recv(65536):
            self.reads += 1
            text += part.decode()
            while text.strip():
                try:
                    command, end = json.JSONDecoder().raw_decode(text.strip())
                except ValueError:
                    break  # the rest is still to come
                text = text.strip()[end:]
                self.commands.append(command)
                if "spoiled" in command.get("arguments", {}):
                    error = {"class": "GenericError", "desc": "Parameter 'spoiled' is unexpected"}
                    self._send(peer, [{"error": error, "id": command["id"]}])
                    continue
                if command["execute"] == "qmp_capabilities":
                    self._send(peer, [done(command)])
                    continue
                messages = self._answer(command)
                if messages is None:
                    return
                self._send(peer, messages)
