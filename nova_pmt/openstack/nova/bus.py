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


"""Our message bus inside nova-compute: not Nova's, and with a configuration of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oslo_log import log

from nova_pmt import rpc
from nova_pmt.messaging import oslo_messaging
from nova_pmt.openstack import computeapi
from nova_pmt.rpc import enveloped

LOG = log.getLogger(__name__)


def transport(conf: Any) -> Any | None:
    """The transport of nova-pmt.conf; None when there is no such file: nothing is known of a bus.

    Does not connect.
    """
    if not conf.config_file:
        return None
    _register_strangers(conf)
    return oslo_messaging.get_rpc_transport(conf)


def _register_strangers(conf: Any) -> None:
    """Options that oslo.messaging 18 looks for here, and registers in Nova's configuration only."""
    for module, name in (
        ("_metrics", "oslo_messaging_metrics"),
        ("_tracing", "oslo_messaging_tracing"),
    ):
        try:
            client = __import__(f"oslo_messaging.{module}.client", fromlist=[name])
            conf.register_opts(getattr(client, name), group=name)
        except (ImportError, AttributeError):
            pass  # another release, without them


class Endpoint:
    """RPC methods, version 1.0; documented by :class:`nova_pmt.openstack.computeapi.ComputeAPI`."""

    target = oslo_messaging.Target(version=rpc.VERSION)

    def __init__(
        self, finish_evacuations: Callable[[], None], replug: Callable[[str], None]
    ) -> None:
        self._finish_evacuations = finish_evacuations
        self._replug = replug

    @enveloped
    def finish_evacuations(self) -> Any:
        return self._finish_evacuations()

    @enveloped
    def replug(self, uuid: str) -> Any:
        return self._replug(uuid)


def server(transport: Any, host: str, endpoint: Endpoint) -> Any:
    """The RPC server of this nova-pmt-compute, not started."""
    return rpc.server(transport, computeapi.TOPIC, host, endpoint)
