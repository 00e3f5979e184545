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

"""What the agent is made of: handed to each of its parts, and replaced by tests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from oslo_log import log

from nova_pmt.agent.host import Host
from nova_pmt.agent.pairs import Clock, Pairs
from nova_pmt.agent.records import Generations
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.agent.supervisor import Supervisor
from nova_pmt.arbiter.base import Arbiter

LOG = log.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """How long things may take, in seconds.

    :param resync_s: before the second attempt to protect again; doubles up to ``resync_max_s``.
    :param worker_start_s: until a worker has taken up its pair.
    :param retry_s: between two questions to an arbiter or a libvirt that does not answer.
    :param claim_delay_s: for a primary that lives to claim before its standby does.
    :param follow_s: how long a primary whose guest died with its worker watches for a takeover,
        and a standby's host, where the guest runs, for who won.
    :param command_s: until a worker has ended after switchover, takeover or unprotect.
    :param stop_s: until a worker has ended that was told that its agent goes away.
    :param settle_s: for a pair that is over until its worker has cleaned up.
    """

    resync_s: float = 5.0
    resync_max_s: float = 300.0
    worker_start_s: float = 30.0
    retry_s: float = 1.0
    claim_delay_s: float = 0.15
    follow_s: float = 30.0
    command_s: float = 60.0
    stop_s: float = 10.0
    settle_s: float = 5.0


@dataclass(frozen=True)
class Parts:
    """Everything that primaries and standbys of this host share.

    :param name: this host's name.
    :param address: where this host's standbys listen.
    :param resync: protect again by itself what broke.
    :param stopping: set when the agent shuts down.
    """

    name: str
    address: str
    host: Host
    arbiter: Arbiter
    api: AgentAPI
    supervisor: Supervisor
    pairs: Pairs
    generations: Generations
    resync: bool = True
    timing: Timing = field(default_factory=Timing)
    clock: Clock = field(default_factory=Clock)
    stopping: threading.Event = field(default_factory=threading.Event)

    def tidy(self, uuid: str) -> None:
        """Remove what a guest that is gone has left here. Never raises: its pair is over anyway."""
        try:
            self.host.tidy(uuid)
        except Exception as error:  # noqa: BLE001 - whatever libvirt's bindings raise
            LOG.warning("%s: something of its QEMU may be left: %s", uuid, error)
