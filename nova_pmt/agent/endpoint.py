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

"""The agent's RPC endpoint: each operation of the service, its outcome in an envelope."""

from __future__ import annotations

from typing import Any

from nova_pmt import rpc
from nova_pmt.agent import rpcapi
from nova_pmt.agent.service import AgentService
from nova_pmt.messaging import oslo_messaging
from nova_pmt.rpc import enveloped


class Endpoint:
    """RPC methods, version 1.0; :class:`nova_pmt.agent.rpcapi.AgentAPI` documents them."""

    target = oslo_messaging.Target(version=rpc.VERSION)

    def __init__(self, service: AgentService) -> None:
        self._service = service

    @enveloped
    def find(self, domain: str) -> Any:
        return self._service.find(domain)

    @enveloped
    def check(self, domain: str, standby_host: str | None = None) -> Any:
        return self._service.check(domain, standby_host)

    @enveloped
    def check_standby(
        self,
        uuid: str,
        memory_bytes: int,
        arbiter_token: str,
        primary_host: str,
        disks: list[dict[str, Any]] | None = None,
    ) -> Any:
        return self._service.check_standby(uuid, memory_bytes, arbiter_token, primary_host, disks)

    @enveloped
    def protect(
        self,
        domain: str,
        standby_host: str,
        strategy: str | None = None,
        options: dict[str, float] | None = None,
    ) -> Any:
        return self._service.protect(domain, standby_host, strategy, options)

    @enveloped
    def prepare_standby(
        self,
        pair: dict[str, Any],
        domain_xml: str,
        layout: list[dict[str, Any]],
        disks: list[dict[str, Any]] | None = None,
    ) -> Any:
        return self._service.prepare_standby(pair, domain_xml, layout, disks)

    @enveloped
    def release_standby(self, uuid: str, generation: int, forget: bool = False) -> Any:
        return self._service.release_standby(uuid, generation, forget)

    @enveloped
    def unprotect(self, domain: str) -> Any:
        return self._service.unprotect(domain)

    @enveloped
    def move_standby(self, domain: str, standby_host: str) -> Any:
        return self._service.move_standby(domain, standby_host)

    @enveloped
    def failover(self, domain: str, force: bool = False) -> Any:
        return self._service.failover(domain, force)

    @enveloped
    def status(self, domain: str | None = None) -> Any:
        return self._service.status(domain)

    @enveloped
    def list(self) -> Any:
        return self._service.list()


def server(transport: Any, host: str, endpoint: Endpoint) -> Any:
    """The RPC server of this host, not started."""
    return rpc.server(transport, rpcapi.TOPIC, host, endpoint)
