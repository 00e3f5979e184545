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

"""The manager's RPC endpoint: each operation of the service, its outcome in an envelope."""

from __future__ import annotations

from typing import Any

from nova_pmt import rpc
from nova_pmt.manager.service import ManagerService
from nova_pmt.messaging import oslo_messaging
from nova_pmt.rpc import enveloped


class Endpoint:
    """RPC methods, version 1.0; :class:`nova_pmt.manager.rpcapi.ManagerAPI` documents them."""

    target = oslo_messaging.Target(version=rpc.VERSION)

    def __init__(self, service: ManagerService) -> None:
        self._service = service

    @enveloped
    def begin(self, arrangement: dict[str, Any]) -> Any:
        return self._service.begin(arrangement)

    @enveloped
    def claim(
        self,
        uuid: str,
        generation: int,
        side: str,
        reason: str = "",
        other_stopped: bool = False,
    ) -> Any:
        return self._service.claim(uuid, generation, side, reason, other_stopped)

    @enveloped
    def winner(self, uuid: str, generation: int) -> Any:
        return self._service.winner(uuid, generation)

    @enveloped
    def challenge(self, uuid: str) -> Any:
        return self._service.challenge(uuid)

    @enveloped
    def answer(self, uuid: str, token: str) -> Any:
        return self._service.answer(uuid, token)

    @enveloped
    def beat(
        self,
        host: str,
        facts: dict[str, Any],
        pairs: list[dict[str, Any]],
        running: list[str] | None = None,
    ) -> Any:
        return self._service.beat(host, facts, pairs, running)

    @enveloped
    def release(self, domain: str) -> Any:
        return self._service.release(domain)

    @enveloped
    def pairs(self, host: str | None = None, state: str | None = None) -> Any:
        return self._service.pairs(host, state)

    @enveloped
    def pair(self, domain: str) -> Any:
        return self._service.pair(domain)

    @enveloped
    def events(self, domain: str | None = None, after: int = 0, limit: int = 100) -> Any:
        return self._service.events(domain, after, limit)

    @enveloped
    def hosts(self) -> Any:
        return self._service.hosts()

    @enveloped
    def maintain(self, host: str, on: bool) -> Any:
        return self._service.maintain(host, on)
