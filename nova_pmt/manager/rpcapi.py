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

"""The RPC interface of nova-pmt-manager, seen from an agent, a worker or the command line.

Topic ``nova-pmt-manager``, version 1.0; any manager answers. See :mod:`nova_pmt.rpc`.
"""

from __future__ import annotations

from typing import Any

from nova_pmt import rpc

TOPIC = "nova-pmt-manager"


class ManagerAPI:
    """Calls any one manager. All that is here can be asked again when an answer got lost.

    Every method raises :class:`nova_pmt.exception.HostUnreachable` when there is no answer in time,
    and else whatever :class:`nova_pmt.exception.PmtError` the manager raised.
    """

    def __init__(self, transport: Any, timeout_s: float = 2) -> None:
        self._caller = rpc.Caller(transport, TOPIC, "nova-pmt-manager")
        self._timeout_s = timeout_s

    def begin(self, arrangement: dict[str, Any]) -> dict[str, Any]:
        """Open a generation (:class:`nova_pmt.arbiter.base.Arrangement`)."""
        return self._call("begin", arrangement=arrangement)

    def claim(
        self,
        uuid: str,
        generation: int,
        side: str,
        *,
        reason: str = "",
        other_stopped: bool = False,
    ) -> bool:
        """Ask to go on: whether this side is the one (:class:`nova_pmt.arbiter.base.Arbiter`)."""
        won = self._call(
            "claim",
            uuid=uuid,
            generation=generation,
            side=side,
            reason=reason,
            other_stopped=other_stopped,
        )
        return won is True  # nothing else is a permission

    def winner(self, uuid: str, generation: int) -> str | None:
        """Which side won; None while nobody has claimed."""
        return self._call("winner", uuid=uuid, generation=generation)

    def challenge(self, uuid: str) -> str:
        """A token that the pair's other host can see, if it asks the same managers."""
        return str(self._call("challenge", uuid=uuid))

    def answer(self, uuid: str, token: str) -> bool:
        """Whether this token was left."""
        return self._call("answer", uuid=uuid, token=token) is True

    def beat(
        self,
        host: str,
        facts: dict[str, Any],
        pairs: list[dict[str, Any]],
        running: list[str] | None = None,
    ) -> dict[str, Any]:
        """A host is there, with these pairs; brings ``alive`` and ``maintenance``.

        :param running: UUIDs of the guests that run there; None: it is not known.
        """
        return self._call("beat", host=host, facts=facts, pairs=pairs, running=running)

    def release(self, domain: str) -> dict[str, Any]:
        """Let go of a pair that waits to be protected again."""
        return self._call("release", domain=domain)

    def pairs(self, host: str | None = None, state: str | None = None) -> list[dict[str, Any]]:
        """All pairs that are remembered, or those of a host, or in a state."""
        return self._call("pairs", host=host, state=state)

    def pair(self, domain: str) -> dict[str, Any]:
        """One pair, by UUID or name."""
        return self._call("pair", domain=domain)

    def events(
        self, domain: str | None = None, after: int = 0, limit: int = 100
    ) -> list[dict[str, Any]]:
        """Lines of the audit trail, the oldest first; those after a number, or the last ones."""
        return self._call("events", domain=domain, after=after, limit=limit)

    def hosts(self) -> list[dict[str, Any]]:
        """Every host that was ever heard of."""
        return self._call("hosts")

    def maintain(self, host: str, on: bool) -> None:
        """No new standbys there, until it is turned off again."""
        self._call("maintain", host=host, on=on)

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._caller.call(None, method, self._timeout_s, arguments)
