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


"""The RPC interface of nova-pmt-compute, seen from the managers.

Topic ``nova-pmt-compute``, server = host name, version 1.0; see :mod:`nova_pmt.rpc`. It is on the
bus of nova_pmt: Nova's own interface is not ours to extend.
"""

from __future__ import annotations

from typing import Any

from nova_pmt import rpc

TOPIC = "nova-pmt-compute"


class ComputeAPI:
    """Calls nova-pmt-compute. All that is here can be asked again when an answer got lost.

    Every method raises :class:`nova_pmt.exception.HostUnreachable` when there is no answer in time,
    and else whatever :class:`nova_pmt.exception.PmtError` was raised there.

    :param timeout_s: for one call. They destroy domains, and ask Nova's conductor.
    """

    def __init__(self, transport: Any, timeout_s: float = 60) -> None:
        self._caller = rpc.Caller(transport, TOPIC, "nova-pmt-compute")
        self._timeout_s = timeout_s

    def finish_evacuations(self, host: str) -> None:
        """Destroy what was evacuated from that host, and close its evacuations.

        nova-compute does so when it starts, and only then. Until then Nova refuses to take back
        that the host is forced down.
        """
        self._caller.call(host, "finish_evacuations", self._timeout_s, {})

    def replug(self, host: str, uuid: str) -> None:
        """Plug the interfaces of a server on its standby's host as they are now.

        :raises nova_pmt.exception.NotProtected: that host has no standby of this server.
        """
        self._caller.call(host, "replug", self._timeout_s, {"uuid": uuid})
