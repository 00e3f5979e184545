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

"""Protects a guest of the lab with two workers and no agents.

No message bus and no agents run beside what is measured, the worker's statistics come as it sends
them, and it can be given an environment of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import libvirt

from nova_pmt.agent import control
from nova_pmt.agent.supervisor import Outcome, Worker
from nova_pmt.arbiter.file import FileArbiter
from nova_pmt.exception import LabError
from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest import layout
from nova_pmt.guest.disk import discover
from nova_pmt.guest.monitor import LibvirtMonitor
from nova_pmt.lab import LabGuest, LabHost, deployment, process
from nova_pmt.standby import domainxml

SYNC_S, READY_S, END_S, STATS_S = 180.0, 30.0, 30.0, 10.0
_generations = itertools.count(int(time.time()))


class _Side:
    """A worker, and what it said."""

    def __init__(
        self,
        host: LabHost,
        spec: control.PrimarySpec | control.StandbySpec,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.stats: dict[str, Any] = {}
        self.stats_count = 0
        self._events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._log = host.log_directory / f"{host.name}-worker-{spec.role}.log"
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "nova_pmt.cmd.worker", "--config-file", deployment.CONFIG]
        with self._log.open("ab") as log:
            nsenter = subprocess.Popen(
                process.enter(host.init_pid, [*argv, "--control-fd", str(theirs.fileno())]),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=process.environment(env),
                start_new_session=True,  # Ctrl-C is for us
            )
        theirs.close()
        self.worker = Worker(spec, nsenter, ours, self._on_event, self._on_exit)
        self.worker.start()

    def _on_event(self, event: dict[str, Any]) -> None:
        with self._news:
            if event.get("event") == "stats":
                self.stats = event
                self.stats_count += 1
            else:
                self._events.append(event)
            self._news.notify_all()

    def _on_exit(self, outcome: Outcome) -> None:
        with self._news:
            self._events.append({"event": "exit", "state": outcome.state})
            self._news.notify_all()

    def failure(self) -> str:
        """What it said of its end; empty while it goes on."""
        for event in self._events:
            if event["event"] == "error":
                return f"{event['error']['message']} [{event['error']['code']}]"
            if event["event"] == "exit":
                return f"worker ended: {event['state']}"
        return ""

    def wait(self, kind: str, state: str | None, timeout_s: float) -> dict[str, Any]:
        """Wait for an event.

        :raises LabError: it did not come.
        """

        def found() -> dict[str, Any] | None:
            for event in self._events:
                if event["event"] == kind and state in (None, event.get("state")):
                    return event
            return None

        with self._news:
            self._news.wait_for(lambda: found() or self.failure(), timeout_s)
            event = found()
            if event is None:
                tail = self._log.read_text(errors="replace")[-1500:]
                reason = self.failure() or f"no {state or kind} within {timeout_s:.0f} s"
                raise LabError(f"the guest cannot be protected: {reason}\n{tail}".strip())
            return event

    def fresh_stats(self) -> dict[str, Any]:
        """Statistics that were sent after the call."""
        with self._news:
            seen = self.stats_count
            self._news.wait_for(lambda: self.stats_count > seen or self.failure(), STATS_S)
            if self.failure() or self.stats_count == seen:
                raise LabError(f"protection ended: {self.failure() or 'no statistics'}")
            return self.stats

    @property
    def pid(self) -> int:
        """In the root namespace."""
        return process.only_child(self.worker.pid)


class Protection:
    """A protected guest.

    :ivar primary_pid: of its worker; also ``standby_pid``.
    """

    def __init__(
        self, guest: LabGuest, primary: _Side, standby: _Side, standby_host: LabHost
    ) -> None:
        self._guest, self._standby_host = guest, standby_host
        self._primary, self._standby = primary, standby
        self._over = False
        self.primary_pid, self.standby_pid = primary.pid, standby.pid

    def stats(self) -> dict[str, Any]:
        """The primary's statistics as of now; takes up to half a second.

        :raises LabError: protection has ended.
        """
        return self._primary.fresh_stats()

    def fail_over(self) -> tuple[LabGuest, float, dict[str, Any]]:
        """Let the guest's QEMU die: the guest where it goes on, when it was killed (of
        CLOCK_MONOTONIC), and what the standby's worker tells of it. Protection is over then.

        :raises LabError: protection had ended before, or the standby does not go on.
        """
        self._demand_going_on()
        pid, self._over = self._guest.pid, True
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        details = self._standby.wait("state", "standby_active", END_S)["details"]
        return self._guest.on(self._standby_host), killed, dict(details)

    def _demand_going_on(self) -> None:
        failure = self._primary.failure()
        if failure:
            raise LabError(f"protection ended before it was told to: {failure}")

    def end(self) -> None:
        """Unprotect the guest, unless it failed over.

        :raises LabError: protection had ended before, or has not ended in time.
        """
        if self._over:
            return
        self._demand_going_on()
        self._primary.worker.command("unprotect")
        self._primary.wait("state", "unprotected", END_S)


def describe(guest: LabGuest) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Migratable XML, memory layout and disks, through libvirt."""
    connection = guest_domain.connect(guest.host.libvirt_uri)
    try:
        domain = guest_domain.Domain.find(connection, guest.uuid)
        with LibvirtMonitor(domain.handle, connection) as monitor:
            blocks = layout.discover(monitor)
            disks = discover.disks(domain.xml(), monitor)
        flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
        xml = domainxml.with_mark(domain.xml(flags), domainxml.Mark(0, "", domain.persistent))
        return (
            xml,
            [block.to_dict() for block in blocks.blocks],
            [disk.spec.to_dict() for disk in disks],
        )
    finally:
        connection.close()


@contextlib.contextmanager
def protect(
    guest: LabGuest,
    standby: LabHost,
    *,
    interval_ms: float,
    strategy: str = "pmt",
    more: Mapping[str, float] | None = None,
    primary_env: Mapping[str, str] | None = None,
) -> Iterator[Protection]:
    """Protect a guest until the end of the block; hosts are configured (lab.deployment).

    :param more: further options of the pair.
    :param primary_env: added to the primary worker's environment.
    :raises nova_pmt.exception.PmtError: it cannot be protected, or protection ended by itself.
    """
    xml, blocks, disks = describe(guest)
    pair = control.Pair(guest.uuid, guest.name, next(_generations), guest.host.name, standby.name)
    shared = SimpleNamespace(directory=str(guest.host.lab.ctl.path(deployment.ARBITER)))
    FileArbiter(SimpleNamespace(arbiter=shared)).challenge(guest.uuid)
    with contextlib.ExitStack() as stack:
        waiting = _Side(standby, control.StandbySpec(pair, xml, blocks, disks))
        stack.callback(waiting.worker.stop, END_S)
        ready = waiting.wait("ready", None, READY_S)
        spec = control.PrimarySpec(
            pair,
            ready["address"],
            ready["port"],
            strategy,
            {"interval_ms": interval_ms, **(more or {})},
        )
        running = _Side(guest.host, spec, primary_env)
        stack.callback(running.worker.stop, END_S)
        running.wait("state", "protected", SYNC_S)
        protection = Protection(guest, running, waiting, standby)
        yield protection
        protection.end()
