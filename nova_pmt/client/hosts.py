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

"""Asking many hosts at once, and finding the one that has a domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from nova_pmt import exception
from nova_pmt.agent.rpcapi import AgentAPI

#: Calls under way at the same time.
_PARALLEL = 32


@dataclass(frozen=True)
class Answers:
    """What hosts said: a result or an error for each."""

    results: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, exception.PmtError] = field(default_factory=dict)

    @property
    def unreachable(self) -> list[str]:
        """Hosts that did not answer."""
        return [
            host
            for host, error in self.errors.items()
            if isinstance(error, exception.HostUnreachable)
        ]


def ask(hosts: Sequence[str], question: Callable[[str], Any]) -> Answers:
    """Put a question to all hosts at the same time."""
    answers = Answers()
    if not hosts:
        return answers
    with ThreadPoolExecutor(min(len(hosts), _PARALLEL)) as pool:
        asked = [(host, pool.submit(question, host)) for host in dict.fromkeys(hosts)]
        for host, future in asked:
            try:
                answers.results[host] = future.result()
            except exception.PmtError as error:
                answers.errors[host] = error
    return answers


def known(configured: Sequence[str], chosen: str | None) -> list[str]:
    """The hosts to ask.

    :raises nova_pmt.exception.ConfigError: none is known.
    """
    if chosen is not None:
        return [chosen]
    if not configured:
        raise exception.ConfigError(
            "no compute host is known to ask",
            cure="Name one with --host, or set [client] hosts = HOST, HOST, ... in nova-pmt.conf.",
        )
    return list(configured)


def locate(api: AgentAPI, hosts: Sequence[str], domain: str, role: str = "primary") -> str:
    """The host to send a command about this domain to.

    :param role: the part in the pair that the command is for. Without a pair it goes to where
        the domain runs; when that host does not answer, to whoever knows the domain.
    :raises nova_pmt.exception.UnknownDomain: no host knows it.
    :raises nova_pmt.exception.HostUnreachable: no host that answered knows it.
    :raises nova_pmt.exception.InvalidInput: several servers have this name.
    """
    answers = ask(hosts, lambda host: api.find(host, domain))
    found = answers.results
    if not found:
        if answers.unreachable:
            silent = ", ".join(answers.unreachable)
            raise exception.HostUnreachable(
                f"{domain} was not found, and these hosts do not answer: {silent}"
            )
        for error in answers.errors.values():
            if not isinstance(error, exception.UnknownDomain):
                raise error
        raise exception.UnknownDomain(f"none of {', '.join(hosts)} knows a domain {domain}")
    if len({entry["uuid"] for entry in found.values()}) > 1:
        raise exception.InvalidInput(
            f"several servers are named {domain}",
            cure="Name the server by its UUID.",
        )

    def fitness(host: str) -> tuple[bool, bool]:
        return found[host]["role"] == role, bool(found[host]["running"])

    return max(found, key=fitness)
