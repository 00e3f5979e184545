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

"""Pairs of workers without agents: the tests play the agents' part."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from nova_pmt.agent import control
from nova_pmt.arbiter.file import FileArbiter
from nova_pmt.bench.protection import describe
from nova_pmt.lab import LabGuest, LabHost, deployment, process

Event = dict[str, Any]
_generations = itertools.count(int(time.time()))
SYNC_S, END_S = 60.0, 60.0


class Worker:
    """A worker process in a host, and what it said."""

    def __init__(
        self,
        host: LabHost,
        spec: control.PrimarySpec | control.StandbySpec,
        env: Mapping[str, str] | None = None,
        config: str = deployment.CONFIG,
    ) -> None:
        self.host = host
        self.events: list[Event] = []
        self.stats: Event = {}
        self._news = threading.Condition()
        self._sock, theirs = socket.socketpair()
        self.log = host.log_directory / f"worker-{spec.pair.name}-{spec.role}.log"
        with self.log.open("ab") as log:
            argv = [sys.executable, "-m", "nova_pmt.cmd.worker", "--config-file", config]
            self._process = subprocess.Popen(
                process.enter(host.init_pid, [*argv, "--control-fd", str(theirs.fileno())]),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=process.environment(env),
            )
        theirs.close()
        self._sock.sendall(control.spec_line(spec))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        lines = control.Lines()
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                data = b""
            lines.feed(data)
            with self._news:
                for message in lines.messages():
                    message["seen_at"] = time.monotonic()
                    if message["event"] == "stats":
                        self.stats = message
                    else:
                        self.events.append(message)
                if not data:
                    self.events.append({"event": "gone"})
                self._news.notify_all()
            if not data:
                return

    def wait(self, wanted: Callable[[Event], bool], timeout_s: float = END_S) -> Event:
        """The first event that is wanted; fails the test when the worker ends without it."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                gone = any(event["event"] == "gone" for event in self.events)
                if gone or time.monotonic() > deadline:
                    raise AssertionError(f"{self.events[-6:]}\n{self.log.read_text()[-3000:]}")
                self._news.wait(0.2)

    def state(self, *states: str, timeout_s: float = END_S) -> Event:
        """The first report of one of these states."""
        return self.wait(
            lambda event: event["event"] == "state" and event["state"] in states, timeout_s
        )

    def error(self, timeout_s: float = END_S) -> Event:
        """The first error that it reported."""
        event = self.wait(lambda event: event["event"] == "error", timeout_s)
        return dict(event["error"])

    def command(self, name: str) -> None:
        self._sock.sendall(control.to_line({"command": name}))

    @property
    def pid(self) -> int:
        """Its pid in the root namespace."""
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        with open(children, encoding="ascii") as file:
            return int(file.read().split()[0])

    def kill(self) -> None:
        with contextlib.suppress(OSError, IndexError):
            os.kill(self.pid, 9)

    def wait_stats(self, wanted: Callable[[Event], bool], timeout_s: float = END_S) -> Event:
        """Statistics that are wanted."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while not (self.stats and wanted(self.stats)):
                assert time.monotonic() < deadline, (self.stats, self.events[-4:])
                self._news.wait(0.2)
            return self.stats

    def close(self) -> None:
        """Hang up, which ends it in an orderly way; then make sure."""
        # close() alone would not: the listening thread's recv() keeps the socket open.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait(30)


class WorkerPair:
    """A primary and a standby worker of one guest."""

    def __init__(self, primary: Worker, standby: Worker, pair: control.Pair) -> None:
        self.primary, self.standby, self.pair = primary, standby, pair

    def protected(self, timeout_s: float = SYNC_S) -> WorkerPair:
        """Wait for the first commit."""
        self.primary.state("protected", timeout_s=timeout_s)
        return self

    def rounds(self, count: int, timeout_s: float = SYNC_S) -> Event:
        """Wait until so many rounds are committed; returns the statistics then."""
        return self.primary.wait_stats(lambda stats: stats["rounds"] >= count, timeout_s)


@contextlib.contextmanager
def protect(
    guest: LabGuest,
    standby: LabHost,
    *,
    strategy: str = "pmt",
    options: Mapping[str, float] | None = None,
    primary_env: Mapping[str, str] | None = None,
    standby_env: Mapping[str, str] | None = None,
    config: str = deployment.CONFIG,
    endpoint: Callable[[str, int], tuple[str, int]] | None = None,
    alter_pair: Callable[[control.Pair], control.Pair] = lambda pair: pair,
) -> Iterator[WorkerPair]:
    """Protect a guest; ends both workers at the end.

    :param endpoint: replaces where the primary connects to (a proxy).
    :param alter_pair: what the primary believes the pair to be.
    """
    xml, blocks, disks = describe(guest)
    pair = control.Pair(guest.uuid, guest.name, next(_generations), guest.host.name, standby.name)
    shared = SimpleNamespace(directory=str(guest.host.lab.ctl.path(deployment.ARBITER)))
    FileArbiter(SimpleNamespace(arbiter=shared)).challenge(guest.uuid)
    with contextlib.ExitStack() as stack:
        standby_spec = control.StandbySpec(pair, xml, blocks, disks)
        waiting = Worker(standby, standby_spec, standby_env, config)
        stack.callback(waiting.close)
        ready = waiting.wait(lambda event: event["event"] in ("ready", "error"))
        assert ready["event"] == "ready", ready
        address, port = ready["address"], ready["port"]
        if endpoint is not None:
            address, port = endpoint(address, port)
        running = Worker(
            guest.host,
            control.PrimarySpec(alter_pair(pair), address, port, strategy, dict(options or {})),
            primary_env,
            config,
        )
        stack.callback(running.close)
        yield WorkerPair(running, waiting, pair)
