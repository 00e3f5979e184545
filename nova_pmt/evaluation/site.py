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

"""A lab whose hosts have agents, as a campaign uses it: ask, kill, restore."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from nova_pmt import exception
from nova_pmt.arbiter.base import Side
from nova_pmt.arbiter.file import FileArbiter
from nova_pmt.evaluation.console import Console
from nova_pmt.evaluation.plan import Plan
from nova_pmt.exception import LabError
from nova_pmt.lab import Lab, LabGuest, LabHost, deployment

T = TypeVar("T")
Pair = dict[str, Any]

AGENT = "nova-pmt-agent"
POLL_S = 0.02
PROTECT_S = 90.0
STOP_S = 15.0


def until(wanted: Callable[[], T | None], timeout_s: float, what: str, poll_s: float = POLL_S) -> T:
    """The first answer that is true.

    :raises LabError: there is none in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := wanted()):
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(poll_s)
    return found


class Site:
    """Agents and the operator's console.

    :param env: of the agents, and so of their workers.
    """

    def __init__(self, lab: Lab, console: Console, env: Mapping[str, str]) -> None:
        self.lab = lab
        self._console = console
        self._env = dict(env)
        shared = SimpleNamespace(directory=str(lab.ctl.path(deployment.ARBITER)))
        self._arbiter = FileArbiter(SimpleNamespace(arbiter=shared))

    @classmethod
    @contextlib.contextmanager
    def open(cls, lab: Lab, env: Mapping[str, str]) -> Iterator[Site]:
        """Start an agent in each host of a lab that is configured, and the console."""
        with Console(lab) as console:
            site = cls(lab, console, env)
            try:
                for host in lab.computes:
                    deployment.start_agent(host, site._env)
                deployment.wait_agents(lab)
                yield site
            finally:
                for host in lab.computes:
                    if AGENT in host.processes:
                        host.processes[AGENT].stop(STOP_S)

    def other(self, host: LabHost) -> LabHost:
        """The other one of the two."""
        one, two = self.lab.computes
        return two if host is one else one

    # -- asking -------------------------------------------------------------------------

    def pair(self, host: LabHost, uuid: str) -> Pair | None:
        """What a host's agent says of a server's pair."""
        for pair in self._console.ask("status", host.name, None)["pairs"]:
            if pair["uuid"] == uuid:
                return dict(pair)
        return None

    def takeover(self, host: LabHost, uuid: str, generation: int) -> dict[str, Any] | None:
        """What a standby's agent says of its takeover; None before it has one."""
        for event in self._console.ask("status", host.name, None)["recent"]:
            if (
                event["uuid"] == uuid
                and event["generation"] == generation
                and event["state"] == "standby_active"
            ):
                return dict(event.get("details") or {})
        return None

    def winner(self, uuid: str, generation: int) -> Side | None:
        """What the arbiter has decided."""
        return self._arbiter.winner(uuid, generation)

    def runs(self, host: LabHost, uuid: str) -> bool:
        """Whether libvirt of a host says that the guest runs there; a standby waits, paused."""
        import libvirt

        # A domain that ends as we look is no news; libvirt would print it.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        with host.libvirt() as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with contextlib.suppress(libvirt.libvirtError):
                    if domain.UUIDString() == uuid:
                        return bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)
        return False

    # -- protecting ---------------------------------------------------------------------

    def protected(self, guest: LabGuest, options: Mapping[str, float]) -> tuple[Pair, list[str]]:
        """Wait until the guest is protected; asks for it when there is no pair.

        :returns: the primary's view, and the codes of refusals on the way.
        :raises LabError: it does not come to that, with the last reason.
        """
        deadline = time.monotonic() + PROTECT_S
        refused: list[str] = []
        standby = self.other(guest.host)
        pair: Pair | None = None
        reason = ""
        while time.monotonic() < deadline:
            try:
                pair = self.pair(guest.host, guest.uuid)
                if pair is None and self.pair(standby, guest.uuid) is None:
                    self._console.ask(
                        "protect", guest.host.name, guest.uuid, standby.name, None, dict(options)
                    )
                elif pair and pair["state"] == "protected" and pair["role"] == "primary":
                    return pair, refused
            except exception.PmtError as error:
                reason = str(error)
                refused.append(error.code)
                time.sleep(0.2)
            time.sleep(0.05)
        raise LabError(f"{guest!r} is not protected after {PROTECT_S:.0f} s: {reason or pair}")

    # -- killing and restoring ----------------------------------------------------------

    def prepare_kill(self, guest: LabGuest, pair: Pair, plan: Plan) -> Callable[[], float]:
        """What kills, at once, when it is called: its result is the moment, CLOCK_MONOTONIC."""
        host = guest.host
        if plan.kind == "host":

            def pull_the_plug() -> float:
                killed = time.monotonic()
                host.power_off(silent=plan.silent)
                return killed

            return pull_the_plug
        pids = [guest.pid] if plan.kind == "qemu" else [host.outside_pid(pair["worker_pid"])]
        if plan.kind == "both":
            pids.insert(0, host.processes[AGENT].pid)

        def kill() -> float:
            killed = time.monotonic()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            return killed

        return kill

    def restore(self, host: LabHost) -> None:
        """Power, and an agent that can be asked."""
        if not host.powered:
            host.power_on()
        agent = host.processes.get(AGENT)
        if agent is None or not agent.alive():
            if agent is not None:
                agent.kill()  # reaps it
            deployment.start_agent(host, self._env)
            deployment.wait_agents(self.lab)
