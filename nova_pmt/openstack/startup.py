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

"""From the configuration to a manager that follows Nova."""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.conf import nova as nova_conf
from nova_pmt.conf import opts
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine
from nova_pmt.manager.db.nova import NovaNotes
from nova_pmt.messaging import oslo_messaging
from nova_pmt.openstack.announce import Announcements
from nova_pmt.openstack.clients import OpenStack
from nova_pmt.openstack.computeapi import ComputeAPI
from nova_pmt.openstack.failover import Settling
from nova_pmt.openstack.follow import Follower
from nova_pmt.openstack.notifications import Listener

_POLL_S = 1.0
_COMPUTE_S = 20.0
#: Ports that are bound at the same time: as many pairs as may fail over with one host.
_URGENT = 8
_CLOSE_S = 2.0


class Following:
    """What a manager has for Nova; close it.

    :raises nova_pmt.exception.ConfigError: the credentials in group ``[nova]`` are not all there.
    """

    def __init__(self, conf: Any, engine: Engine, transport: Any) -> None:
        nova_conf.register_auth(conf)
        cloud = OpenStack.connect(conf)
        self._database = Database(engine)
        notes = NovaNotes(engine)
        self._workers = ThreadPoolExecutor(
            conf.manager.repairs_at_once, thread_name_prefix="follow"
        )
        self._urgent = ThreadPoolExecutor(_URGENT, thread_name_prefix="rebind")
        self._announce = Announcements(
            oslo_messaging.Notifier(
                oslo_messaging.get_notification_transport(conf),
                publisher_id=f"nova-pmt-manager.{opts.host_name(conf)}",
                retry=3,
            )
        )
        computes = ComputeAPI(transport, _COMPUTE_S)
        agents = AgentAPI(transport, work_timeout_s=conf.agent.worker_start_timeout_s + 20.0)
        self._follower = Follower(
            cloud,
            agents,
            self._database,
            notes,
            self._workers,
            computes=computes,
            urgent=self._urgent,
            announce=self._announce,
            name=f"{opts.host_name(conf)}.{os.getpid()}.{secrets.token_hex(4)}",
            honour=conf.nova.honour_property,
            reconcile_interval_s=conf.nova.reconcile_interval_s,
            failover_timeout_s=conf.nova.failover_timeout_s,
        )
        self._settling = Settling(cloud, computes, notes)
        self.touch = self._follower.touch
        self.claimed = self._follower.claimed
        self.owned = self._follower.owned
        self.sweep = self._follower.sweep
        self._listener = Listener(conf, self.touch)
        self._listener.start()

    def wait(self) -> None:
        """Until there may be something to do."""
        self._follower.woken.wait(_POLL_S)

    def settle(self) -> None:
        """Let compute services up whose hosts are back."""
        alive = frozenset(host.name for host in self._database.hosts() if host.alive)
        self._settling.sweep(alive)

    def close(self) -> None:
        """End it; turns that have begun go on to their next step."""
        self._follower.woken.set()
        self._listener.close()
        for pool in (self._workers, self._urgent):
            pool.shutdown(wait=False, cancel_futures=True)
        self._announce.close(_CLOSE_S)
