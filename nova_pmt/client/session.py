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

"""What a command of ``nova-pmt`` works with, and how it tells of errors."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console

from nova_pmt import exception
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.client import hosts, render
from nova_pmt.client.hosts import Answers
from nova_pmt.manager.rpcapi import ManagerAPI

T = TypeVar("T")

STATUS_OK, STATUS_FAILED, STATUS_USAGE, STATUS_REFUSED, STATUS_UNREACHABLE = range(5)


@dataclass(frozen=True)
class Session:
    """What a command works with.

    :param configured: ``[client] hosts``.
    :param managers: None where ``[manager] enabled`` is not set.
    """

    args: argparse.Namespace
    api: AgentAPI
    configured: list[str]
    out: Console
    err: Console
    sleep: Callable[[float], None] = time.sleep
    managers: ManagerAPI | None = None

    @property
    def json(self) -> bool:
        return bool(self.args.format == "json")

    def ask_managers(self, question: Callable[[ManagerAPI], T]) -> T:
        """Ask any manager.

        :raises nova_pmt.exception.ConfigError: there are none.
        :raises nova_pmt.exception.HostUnreachable: none answers.
        """
        if self.managers is None:
            raise exception.ConfigError(
                "the configuration says that there are no managers",
                cure="Set [manager] enabled = true in nova-pmt.conf if nova-pmt-manager runs; "
                "without managers 'nova-pmt list' and 'nova-pmt status' ask the hosts.",
            )
        try:
            return question(self.managers)
        except exception.HostUnreachable as error:
            raise exception.HostUnreachable(
                error.message,
                cure="Check that nova-pmt-manager runs and reaches the message bus; pairs that are "
                "protected stay so without it.",
            ) from error

    @functools.cached_property
    def _known(self) -> tuple[list[str], list[str]]:
        """Hosts to ask, and those that the managers take for dead."""
        if self.args.host is not None or self.configured or self.managers is None:
            return hosts.known(self.configured, self.args.host), []
        rows = self.ask_managers(lambda managers: managers.hosts())
        alive = [row["name"] for row in rows if row["alive"]]
        dead = [row["name"] for row in rows if not row["alive"]]
        if not alive:
            return hosts.known(dead, None), []
        return alive, dead

    def hosts(self) -> list[str]:
        """The hosts to ask: those of the configuration, or else those that the managers know."""
        return self._known[0]

    def ask(self, question: Callable[[str], Any]) -> Answers:
        """Ask all hosts; one that the managers take for dead counts as one without an answer."""
        asked, dead = self._known
        answers = hosts.ask(asked, question)
        for host in dead:
            answers.errors[host] = exception.HostUnreachable(
                f"the managers take {host} for dead: it was not asked",
                cure="See 'nova-pmt hosts'; '--host' asks it nevertheless.",
                host=host,
            )
        return answers

    def host(self, role: str = "primary") -> str:
        """The host to send this command to."""
        if self.args.host is not None:
            return str(self.args.host)
        return hosts.locate(self.api, self.hosts(), self.args.domain, role)

    def say(self, text: str) -> None:
        self.out.print(render.clean(text), markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """How far a command is: on stderr, beside the result."""
        self.err.print(render.clean(text), markup=False, highlight=False, soft_wrap=True)

    def give(self, data: Any) -> None:
        """A result for programs."""
        self.out.file.write(json.dumps(data, indent=2) + "\n")

    def give_line(self, data: Any) -> None:
        """One of many results for programs, as they come."""
        self.out.file.write(json.dumps(data) + "\n")
        self.out.file.flush()

    def complain(self, error: exception.PmtError) -> None:
        """An error on stderr."""
        complain(self.err, error, self.json)


def complain(err: Console, error: exception.PmtError, as_json: bool) -> None:
    """An error, its cure, and the errors that came with it."""
    if as_json:
        err.file.write(json.dumps({"error": error.to_dict()}) + "\n")
        return
    also = error.details.get("also")
    for one in (error.to_dict(), *(also if isinstance(also, list) else ())):
        err.file.write(f"error {one['code']}: {render.clean(one['message'])}\n")
        err.file.write(f"cure: {render.clean(one['cure'])}\n")


def exit_status(error: exception.PmtError) -> int:
    """The exit status for an error."""
    if isinstance(error, exception.HostUnreachable):
        return STATUS_UNREACHABLE
    return STATUS_REFUSED if isinstance(error, exception.Refusal) else STATUS_FAILED
