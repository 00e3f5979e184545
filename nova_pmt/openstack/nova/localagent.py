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


"""The agent of this host, and the managers, as the compute driver needs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import presence
from nova_pmt.agent.presence import Presence
from nova_pmt.manager import states

LOG = log.getLogger(__name__)

#: The file is not read anew within this time, in seconds: events ask hundreds of times a second.
_CACHE_S = 0.5
#: A worker that is just being started can be told to end within this time, in seconds.
_READY_S, _READY_EVERY_S = 15.0, 0.5

#: May this host start the guest of a pair? ``elsewhere``: it runs on another host. ``open``:
#: another host may still go on with it. ``unknown``: nobody answers.
Verdict = Literal["free", "elsewhere", "open", "unknown"]
_UNDECIDED = states.OPEN | {"failing_over"}


class Agents(Protocol):
    """What is used of :class:`nova_pmt.agent.rpcapi.AgentAPI`."""

    def unprotect(self, host: str, domain: str) -> dict[str, Any]: ...

    def status(self, host: str, domain: str | None = None) -> dict[str, Any]: ...

    def release_standby(
        self, host: str, *, uuid: str, generation: int, forget: bool = False
    ) -> dict[str, Any]: ...


class Managers(Protocol):
    """What is used of :class:`nova_pmt.manager.rpcapi.ManagerAPI`."""

    def pair(self, domain: str) -> dict[str, Any]: ...


class LocalAgent:
    """See the module's text.

    :param runtime_directory: ``[guest] runtime_directory``, where the agent's file is.
    :param agents: None: there is no message bus of nova_pmt here.
    :param managers: None: there are none.
    """

    def __init__(
        self,
        host: str,
        runtime_directory: str,
        agents: Agents | None,
        managers: Managers | None,
        monotonic: Callable[[], float] = time.monotonic,
        boot_time: Callable[[], float] = presence.boot_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._host = host
        self._file = presence.path(runtime_directory)
        self._agents = agents
        self._managers = managers
        self._monotonic = monotonic
        self._boot_time = boot_time
        self._sleep = sleep
        self._lock = threading.Lock()
        self._seen: Presence | None = None
        self._seen_at: float | None = None
        self._primaries: set[str] = set()

    def presence(self) -> Presence | None:
        """What the agent said last, if it lives."""
        with self._lock:
            now = self._monotonic()
            if self._seen_at is None or not 0 <= now - self._seen_at < _CACHE_S:
                self._seen, self._seen_at = presence.read(self._file), now
                if self._seen is not None:
                    pairs = self._seen.pairs.items()
                    self._primaries |= {uuid for uuid, role in pairs if role == "primary"}
            seen = self._seen
        return seen if seen is not None and seen.alive(self._boot_time()) else None

    def role(self, uuid: str) -> str | None:
        """``primary`` or ``standby``: this host's part in a pair; None: it has none."""
        seen = self.presence()
        return None if seen is None else seen.pairs.get(uuid)

    def was_primary(self, uuid: str) -> bool:
        """Whether the guest was protected on this host, since this process has looked."""
        with self._lock:
            return uuid in self._primaries

    def unprotect(self, uuid: str) -> bool:
        """End the protection of a guest of this host; whether it had any.

        :raises nova_pmt.exception.PmtError: it may be protected still.
        """
        if self._agents is None:
            return False
        if self.presence() is None:
            # Workers end with their agent, and let their guests run.
            LOG.warning("%s: there is no nova-pmt-agent on this host to unprotect it", uuid)
            return False
        deadline = self._monotonic() + _READY_S
        while True:
            try:
                self._agents.unprotect(self._host, uuid)
            except (exception.NotProtected, exception.UnknownDomain, exception.WrongHost):
                return False
            except exception.NotReady:  # its worker is just being started
                if self._monotonic() >= deadline:
                    raise
                self._sleep(_READY_EVERY_S)
            else:
                return True

    def end_standby(self, uuid: str) -> bool:
        """End the domain that waits here; false: it went on instead, or does not end.

        :raises nova_pmt.exception.PmtError: the agent does not answer, or could not.
        """
        if self._agents is None:
            raise exception.HostUnreachable("there is no message bus of nova_pmt", host=self._host)
        generation = 0
        try:
            for pair in self._agents.status(self._host, uuid)["pairs"]:
                generation = max(generation, int(pair["generation"]))
        except (exception.NotProtected, exception.UnknownDomain):
            pass
        released = self._agents.release_standby(
            self._host, uuid=uuid, generation=max(1, generation), forget=True
        )
        return released.get("gone") is True

    def active_host(self, uuid: str) -> str | None:
        """Where the managers have seen a pair's guest run last; None: there is no such pair.

        :raises nova_pmt.exception.PmtError: no manager answers.
        """
        pair = self._pair(uuid)
        return None if pair is None else str(pair["active_host"])

    def verdict(self, uuid: str, dead: str = "") -> tuple[Verdict, str]:
        """May a guest be started on this host? And which host has it, or may get it.

        Asked for a guest that runs nowhere on this host. While a generation is open its standby may
        still go on: then two copies would run.

        :param dead: a host that Nova knows to be down.
        """
        try:
            pair = self._pair(uuid)
        except exception.PmtError as error:
            LOG.warning("%s: whether it runs elsewhere cannot be found out: %s", uuid, error)
            return "unknown", ""
        if pair is None or pair["state"] == "unprotected":
            return "free", ""
        if pair["state"] in _UNDECIDED or (pair["state"] == "error" and not pair["winner"]):
            return "open", str(pair["standby_host"])
        active = str(pair["active_host"])
        return ("free", "") if active in (self._host, dead) else ("elsewhere", active)

    def _pair(self, uuid: str) -> dict[str, Any] | None:
        if self._managers is None:
            return None
        try:
            return self._managers.pair(uuid)
        except (exception.NotProtected, exception.UnknownDomain):
            return None
