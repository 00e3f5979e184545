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

"""The RPC interface of nova-pmt-agent, seen from a caller: another agent or the command line.

Topic ``nova-pmt-agent``, server = host name, version 1.0; see :mod:`nova_pmt.rpc`.
"""

from __future__ import annotations

from typing import Any

from nova_pmt import rpc

TOPIC = "nova-pmt-agent"


class AgentAPI:
    """Calls agents.

    Every method raises :class:`nova_pmt.exception.HostUnreachable` when there is no answer in
    time, and else whatever :class:`nova_pmt.exception.PmtError` the agent raised.

    :param timeout_s: for calls that only look.
    :param work_timeout_s: for calls that start or end workers.
    """

    def __init__(self, transport: Any, timeout_s: float = 10, work_timeout_s: float = 180) -> None:
        self._caller = rpc.Caller(transport, TOPIC, "nova-pmt-agent")
        self._timeout_s = timeout_s
        self._work_timeout_s = max(timeout_s, work_timeout_s)

    def find(self, host: str, domain: str) -> dict[str, Any]:
        """Does the host know this domain, does it run there, and what part has it in a pair?"""
        return self._look(host, "find", domain=domain)

    def check(self, host: str, domain: str, standby_host: str | None = None) -> dict[str, Any]:
        """Could it be protected? Changes nothing."""
        return self._call(
            host, "check", 3 * self._timeout_s, domain=domain, standby_host=standby_host
        )

    def check_standby(
        self,
        host: str,
        *,
        uuid: str,
        memory_bytes: int,
        arbiter_token: str,
        primary_host: str,
        disks: list[dict[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Why the host cannot hold this standby: error dictionaries."""
        return self._look(
            host,
            "check_standby",
            uuid=uuid,
            memory_bytes=memory_bytes,
            arbiter_token=arbiter_token,
            primary_host=primary_host,
            disks=disks or [],
        )

    def protect(
        self,
        host: str,
        domain: str,
        standby_host: str,
        strategy: str | None = None,
        options: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """Begin to protect; returns the pair's status once its first synchronisation began."""
        return self._work(
            host,
            "protect",
            domain=domain,
            standby_host=standby_host,
            strategy=strategy,
            options=options or {},
        )

    def prepare_standby(
        self,
        host: str,
        *,
        pair: dict[str, Any],
        domain_xml: str,
        layout: list[dict[str, Any]],
        disks: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Start a standby; returns the ``address`` and ``port`` where it waits for its primary."""
        return self._work(
            host,
            "prepare_standby",
            pair=pair,
            domain_xml=domain_xml,
            layout=layout,
            disks=disks or [],
        )

    def release_standby(
        self, host: str, *, uuid: str, generation: int, forget: bool = False
    ) -> dict[str, Any]:
        """End a standby of that generation or an older one; ``gone`` tells that there is none.

        With ``forget`` the images of its disks go, too, which are kept otherwise.
        """
        return self._work(host, "release_standby", uuid=uuid, generation=generation, forget=forget)

    def unprotect(self, host: str, domain: str) -> dict[str, Any]:
        """End protection; the guest runs on."""
        return self._work(host, "unprotect", domain=domain)

    def move_standby(self, host: str, domain: str, standby_host: str) -> dict[str, Any]:
        """Primary's host, of a guest that runs alone: its next standby is made there, at once."""
        return self._look(host, "move_standby", domain=domain, standby_host=standby_host)

    def failover(self, host: str, domain: str, force: bool = False) -> dict[str, Any]:
        """Primary's host: planned switchover. Standby's host, with force: take over."""
        return self._work(host, "failover", domain=domain, force=force)

    def status(self, host: str, domain: str | None = None) -> dict[str, Any]:
        """Pairs of that host in full, and what happened to pairs that are no more."""
        return self._look(host, "status", domain=domain)

    def list(self, host: str) -> dict[str, Any]:
        """Pairs of that host in short."""
        return self._look(host, "list")

    def _look(self, host: str, method: str, **arguments: Any) -> Any:
        return self._call(host, method, self._timeout_s, **arguments)

    def _work(self, host: str, method: str, **arguments: Any) -> Any:
        return self._call(host, method, self._work_timeout_s, **arguments)

    def _call(self, host: str, method: str, timeout_s: float, **arguments: Any) -> Any:
        return self._caller.call(host, method, timeout_s, arguments)
