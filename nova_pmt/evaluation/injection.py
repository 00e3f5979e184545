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

"""How each fault is done to a lab, and put right.

What takes time is done before (:meth:`Injector.prepare`), so that the fault itself comes at its
moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from nova_pmt.evaluation.cloud import Cloud, ControlPlane
from nova_pmt.evaluation.faults import CLUSTER, Fault
from nova_pmt.evaluation.site import AGENT, Pair
from nova_pmt.exception import LabError, PmtError
from nova_pmt.lab import Lab, LabGuest, LabHost, deployment, network

Action = Callable[[], None]

_LOCKED_S = 15.0
#: Holds the database until its standard input ends.
_LOCK = """\
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
sys.stdin.readline()
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
database.execute("ROLLBACK")
"""
#: What each of these needs of the machine.
_NEEDS: Mapping[str, Literal["block", "lose"]] = MappingProxyType(
    {
        "repl-one-way": "block",
        "mgmt-one-way": "block",
        "repl-loss": "lose",
    }
)


def skipped(lab: Lab, kinds: Iterable[str], plane: ControlPlane) -> dict[str, str]:
    """Kinds that this machine, or this control plane, cannot do, and why."""
    found = {}
    for kind in kinds:
        if kind == "database-lock" and plane.server is not None:
            found[kind] = "the managers' database is a server: see database-stop"
        if kind in CLUSTER and (plane.server is None or plane.managers < 3):
            found[kind] = "needs three managers over MariaDB (--cluster)"
        need = _NEEDS.get(kind)
        reason = network.missing(need, lab.ctl.init_pid) if need else ""
        if reason:
            found[kind] = f"the kernel, or a tool, cannot: {reason}"
    return found


def _nothing() -> None:
    """There is nothing to put right."""


@dataclass
class Strike:
    """A fault that is ready.

    :param begin: does it; returns when it is done.
    :param heal: puts it right. May be called when the host has lost its power.
    """

    fault: Fault
    begin: Action
    heal: Action = field(default=_nothing)
    begun_at: float = 0.0
    healed: bool = False

    @property
    def lasts(self) -> bool:
        """There is something to put right."""
        return self.heal is not _nothing

    def strike(self) -> None:
        """Do it now."""
        self.begun_at = time.monotonic()
        self.begin()

    def heal_once(self) -> None:
        """Put it right, if that was not done before."""
        if not self.healed:
            self.healed = True
            self.heal()


class _Victims:
    """Processes that get signals; never one that happens to have inherited a pid."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._descriptors = [os.pidfd_open(pid) for pid in pids]

    def send(self, number: int) -> None:
        for descriptor in self._descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class _Lock:
    """A process of our own that takes the managers' database away."""

    def __init__(self, database: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LOCK, str(database)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise LabError("the managers' database cannot be locked")

    def heal(self) -> None:
        try:
            self._process.communicate(timeout=_LOCKED_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class Injector:
    """Faults of one pair.

    :param pair: its primary's view.
    """

    def __init__(self, cloud: Cloud, guest: LabGuest, pair: Pair) -> None:
        self._cloud = cloud
        self._lab = cloud.lab
        self._guest = guest
        self._hosts = {
            part: cloud.lab.host(pair[f"{part}_host"]) for part in ("primary", "standby")
        }

    def prepare(self, fault: Fault) -> Strike:
        """Get ready for it.

        :raises LabError: what it is to be done to is not there.
        :raises PmtError: an agent does not tell.
        """
        what, _, how = fault.kind.partition("-")
        host = self._hosts.get(fault.side)
        if what in ("repl", "mgmt", "both", "data"):
            assert host is not None
            return self._of_network(fault, host, what, how)
        if what == "host":
            assert host is not None
            return self._of_host(fault, host, how)
        if what == "agent":
            assert host is not None
            return self._of_agent(fault, host, how)
        if what in ("manager", "managers"):
            numbers = self._cloud.plane.numbers
            if how.startswith("most-"):
                numbers.remove(fault.number)
            elif fault.number:
                numbers = [fault.number]
            return self._of_managers(fault, numbers, how.removeprefix("most-"))
        if what == "rabbit":
            return self._of_rabbit(fault, how)
        if what == "database" and how != "lock":
            return self._of_server(fault, how)
        if what == "database":
            lock = _Lock(self._cloud.database)
            return Strike(fault, lock.begin, lock.heal)
        assert host is not None
        return self._of_process(fault, self._pid(host, what), how)

    def switchover(self, fault: Fault) -> Strike:
        """An operator orders the pair to change sides; its answer is of no interest."""
        primary = self._hosts["primary"].name

        def order() -> None:
            with contextlib.suppress(PmtError):
                self._cloud.ask("failover", primary, self._guest.uuid)

        thread = threading.Thread(target=order, name="switchover", daemon=True)
        return Strike(fault, thread.start)

    def _pid(self, host: LabHost, what: str) -> int:
        if what == "qemu":
            return self._guest.on(host).pid
        pair = self._cloud.pair(host, self._guest.uuid)
        if pair is None or not pair["worker_pid"]:
            raise LabError(f"{host.name} has no worker of {self._guest!r}")
        return host.outside_pid(pair["worker_pid"])

    def _of_process(self, fault: Fault, pid: int, how: str) -> Strike:
        victims = _Victims([pid])
        if how == "kill":

            def kill() -> None:
                victims.send(signal.SIGKILL)
                victims.close()

            return Strike(fault, kill)

        def go_on() -> None:
            victims.send(signal.SIGCONT)
            victims.close()

        return Strike(fault, lambda: victims.send(signal.SIGSTOP), go_on)

    def _of_agent(self, fault: Fault, host: LabHost, how: str) -> Strike:
        agent = host.processes[AGENT]
        if how == "stop":
            return Strike(fault, lambda: agent.signal(signal.SIGSTOP), agent.go_on)
        return Strike(
            fault,
            lambda: agent.signal(signal.SIGKILL),
            lambda: self._cloud.restore(host) if host.powered else None,
        )

    def _of_managers(self, fault: Fault, numbers: Sequence[int], how: str) -> Strike:
        managers = [self._lab.ctl.processes[deployment.manager(number)] for number in numbers]
        number = signal.SIGSTOP if how == "stop" else signal.SIGKILL

        def begin() -> None:
            for manager in managers:
                manager.signal(number)

        def heal() -> None:
            for manager in managers:
                manager.go_on()
            if how == "kill":
                for each in numbers:
                    self._cloud.restore_manager(each)

        return Strike(fault, begin, heal)

    def _of_rabbit(self, fault: Fault, how: str) -> Strike:
        rabbit = self._lab.rabbit
        assert rabbit is not None
        victims = _Victims(rabbit.pids())

        def heal() -> None:
            victims.send(signal.SIGCONT)
            victims.close()
            if how == "kill":
                rabbit.restart()

        number = signal.SIGSTOP if how == "stop" else signal.SIGKILL
        return Strike(fault, lambda: victims.send(number), heal)

    def _of_server(self, fault: Fault, how: str) -> Strike:
        server = self._cloud.plane.server
        assert server is not None
        if how == "kill":
            return Strike(fault, server.kill, server.start)
        victims = _Victims([server.pid])

        def go_on() -> None:
            victims.send(signal.SIGCONT)
            victims.close()

        return Strike(fault, lambda: victims.send(signal.SIGSTOP), go_on)

    def _of_host(self, fault: Fault, host: LabHost, how: str) -> Strike:
        if how == "kill":
            return Strike(
                fault,
                lambda: host.power_off(silent=fault.silent),
                lambda: self._cloud.restore(host),
            )
        return Strike(fault, host.freeze, _if_powered(host, host.thaw))

    def _of_network(self, fault: Fault, host: LabHost, what: str, how: str) -> Strike:
        links = [host.link(name) for name in (("repl", "mgmt") if what == "both" else (what,))]
        link = links[0]
        ways: dict[str, tuple[Action, Action]] = {
            "loss": (lambda: link.lose(fault.amount), link.keep),
            "slow": (lambda: link.limit(fault.amount), link.unlimit),
            "delay": (lambda: link.disturb(delay_s=fault.amount / 1e3), link.settle),
            "corrupt": (lambda: link.disturb(corrupt=fault.amount), link.settle),
            "cut": (lambda: _each(links, "down"), lambda: _each(links, "up")),
        }
        if how == "one-way":  # in ctl, where it outlives a host's power
            way: Literal["in", "out"] = "in" if fault.way == "in" else "out"
            return Strike(fault, lambda: link.block(way), link.unblock)
        begin, heal = ways[how]
        if how in ("delay", "corrupt"):  # as well: what does it may be in ctl
            return Strike(fault, begin, heal)
        return Strike(fault, begin, _if_powered(host, heal))


def _each(links: Iterable[network.Link], verb: str) -> None:
    for link in links:
        getattr(link, verb)()


def _if_powered(host: LabHost, heal: Action) -> Action:
    """A host that lost its power meanwhile gets new cables, and new processes, anyway."""

    def attempt() -> None:
        with contextlib.suppress(LabError):
            if host.powered:
                heal()

    return attempt
