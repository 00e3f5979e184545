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

"""All options: what ``oslo-config-generator`` lists and what every command registers."""

from __future__ import annotations

import socket
from typing import Any

from oslo_config import cfg
from oslo_db import options as db_options

from nova_pmt.conf import (
    agent,
    arbiter,
    checkpoint,
    client,
    disk,
    guest,
    manager,
    metrics,
    network,
    nova,
    replication,
)

_GROUPS: list[tuple[cfg.OptGroup, list[cfg.Opt]]] = [
    (agent.GROUP, agent.OPTS),
    (arbiter.GROUP, arbiter.OPTS),
    (checkpoint.GROUP, checkpoint.OPTS),
    (client.GROUP, client.OPTS),
    (disk.GROUP, disk.OPTS),
    (guest.GROUP, guest.OPTS),
    (manager.GROUP, manager.OPTS),
    (metrics.GROUP, metrics.OPTS),
    (network.GROUP, network.OPTS),
    (nova.GROUP, nova.OPTS),
    (replication.GROUP, replication.OPTS),
    (replication.TLS_GROUP, replication.TLS_OPTS),
]


def list_opts() -> list[tuple[cfg.OptGroup | str, list[cfg.Opt]]]:
    """Entry point ``oslo.config.opts``."""
    return [
        ("DEFAULT", agent.DEFAULT_OPTS),
        *_GROUPS,
        (nova.GROUP, nova.list_auth_opts()),
    ]


def register(conf: cfg.ConfigOpts) -> None:
    """Register every option of ours."""
    conf.register_opts(agent.DEFAULT_OPTS)
    for group, options in _GROUPS:
        # Not the same object for every conf: options of one would be options of the other.
        conf.register_group(cfg.OptGroup(group.name, title=group.title))
        conf.register_opts(options, group=group.name)
    conf.register_opts(db_options.database_opts, "database")


def host_name(conf: Any) -> str:
    """This host's name: the option, or the machine's."""
    return str(conf.host or socket.gethostname())
