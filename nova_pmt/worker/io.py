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

"""The I/O loop of a worker: the link, the agent's socket, QEMU's end, in one thread."""

from __future__ import annotations

import os
import select
import selectors
import socket
from collections.abc import Callable
from typing import Any

from nova_pmt.agent import control

#: Events that are sent again and again.
_FIGURES = frozenset({"stats", "progress"})


class AgentChannel:
    """The worker's end of the socket to its agent.

    :param on_command: called with each command.
    :param on_gone: called once, when the agent has ended.
    """

    def __init__(
        self,
        sock: socket.socket,
        lines: control.Lines,
        on_command: Callable[[dict[str, Any]], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._lines = lines
        self._on_command = on_command
        self._on_gone = on_gone
        self._selector: selectors.BaseSelector | None = None

    def register(self, selector: selectors.BaseSelector) -> None:
        """Take part in an I/O loop."""
        self._selector = selector
        selector.register(self._sock, selectors.EVENT_READ, self._on_readable)

    def unregister(self) -> None:
        """Leave the I/O loop; what comes waits."""
        if self._selector is not None:
            self._selector.unregister(self._sock)
            self._selector = None

    def _on_readable(self, _mask: int) -> None:
        try:
            data = self._sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.unregister()
            self._on_gone()
            return
        self._lines.feed(data)
        for message in self._lines.messages():
            if "command" in message:
                self._on_command(message)

    def tell(self, event: str, **members: Any) -> None:
        """Send an event. An agent that has gone hears nothing; that is no error.

        One that stands still must not hold us up: it gets no more figures when it has not read
        what it got. (A socket that can be written to has most of its buffer free.)
        """
        if event in _FIGURES and not select.select([], [self._sock], [], 0)[1]:
            return
        try:
            self._sock.sendall(control.to_line({"event": event, **members}))
        except OSError:
            return


def watch_process(selector: selectors.BaseSelector, pid: int, on_end: Callable[[], None]) -> None:
    """Call ``on_end`` when a process ends: at once, by its pidfd."""
    fd = os.pidfd_open(pid)

    def ended(_mask: int) -> None:
        selector.unregister(fd)
        os.close(fd)
        on_end()

    selector.register(fd, selectors.EVENT_READ, ended)


def watch_hangup(
    selector: selectors.BaseSelector, descriptor: int, on_hangup: Callable[[], None]
) -> Callable[[], None]:
    """Call ``on_hangup`` when a socket's other end closes; reads nothing from it.

    :returns: ends the watch.
    """
    inner = select.epoll()  # nested, since selectors cannot wait for the hang-up alone
    inner.register(descriptor, select.EPOLLRDHUP)

    def end() -> None:
        if not inner.closed:
            selector.unregister(inner)
            inner.close()

    def hung_up(_mask: int) -> None:
        end()
        on_hangup()

    selector.register(inner, selectors.EVENT_READ, hung_up)
    return end


def dispatch(selector: selectors.BaseSelector, timeout_s: float) -> None:
    """One turn of the loop: call the callable that each ready file was registered with."""
    for key, mask in selector.select(timeout_s):
        key.data(mask)
