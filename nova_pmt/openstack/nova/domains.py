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


"""What the domain of a server is on this host: a guest that runs, or one that waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from nova_pmt.standby import domainxml

#: ``waiting``: it is the agent's standby, which holds no guest that runs yet. ``stopped``: it is
#: defined only.
Situation = Literal["absent", "stopped", "waiting", "running"]

#: VIR_DOMAIN_RUNNING, _BLOCKED, _PAUSED, _SHUTDOWN (in progress), _PMSUSPENDED.
_ALIVE = frozenset({1, 2, 3, 4, 7})
_PAUSED, _PAUSED_BY_USER = 3, 1
_POLL_S = 0.2


class Connection(Protocol):
    """What is used of libvirt's connection."""

    def lookupByUUIDString(self, uuid: str) -> Any: ...  # noqa: N802 - libvirt's name


class Domains:
    """Looks at this host's domains; changes none.

    :param connection: gives the connection to libvirt.
    :param gone: whether an exception of libvirt says that there is no such domain.
    """

    def __init__(
        self,
        connection: Callable[[], Connection],
        gone: Callable[[Exception], bool],
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connection = connection
        self._gone = gone
        self._monotonic = monotonic
        self._sleep = sleep

    def look(self, uuid: str) -> Situation:
        """What the domain of this UUID is.

        :raises libvirt.libvirtError: libvirt does not tell.
        """
        try:
            domain = self._connection().lookupByUUIDString(uuid)
            if domain.info()[0] not in _ALIVE:
                return "stopped"
            return "running" if domainxml.read_mark(domain.XMLDesc(0)) is None else "waiting"
        except Exception as error:
            if self._gone(error):
                return "absent"
            raise

    def settled(self, uuid: str, timeout_s: float) -> Situation:
        """The same, once the agent has decided about a domain that waits; or after the timeout.

        The agent takes the mark away when the guest runs, or ends the domain.
        """
        deadline = self._monotonic() + timeout_s
        while (found := self.look(uuid)) == "waiting" and self._monotonic() < deadline:
            self._sleep(_POLL_S)
        return found

    def paused_by_user(self, uuid: str) -> bool:
        """Somebody suspended the guest; it does not only stand still for a checkpoint."""
        try:
            state, reason = self._connection().lookupByUUIDString(uuid).state()
        except Exception as error:
            if self._gone(error):
                return False
            raise
        return (state, reason) == (_PAUSED, _PAUSED_BY_USER)
