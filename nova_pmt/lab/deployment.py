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

"""nova_pmt itself in the lab's hosts: configuration, agents, the operator's command in ctl."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from nova_pmt.exception import LabError
from nova_pmt.lab import libvirtd
from nova_pmt.lab.host import SHARED, LabHost
from nova_pmt.lab.lab import Lab
from nova_pmt.lab.process import LabProcess

CONFIG = "/etc/nova_pmt/nova-pmt.conf"
ARBITER = f"{SHARED}/arbiter"
#: What an agent logs when it can be asked.
READY = "is ready"

#: Where the managers of :func:`start_managers` keep what they know, in ctl.
DATABASE = "/var/lib/nova_pmt/manager.sqlite"
#: What a deployment with managers sets on every host; quick, since tests wait for it.
WITH_MANAGERS: Mapping[str, Mapping[str, str]] = {
    "arbiter": {"driver": "manager"},
    "manager": {
        "enabled": "true",
        "heartbeat_interval_s": "0.5",
        "host_timeout_s": "5",
        "repair_interval_s": "0.5",
        "repair_backoff_s": "2",
    },
    "database": {"connection": f"sqlite:///{DATABASE}"},
}

_TEMPLATE = """\
[DEFAULT]
host = {host}
my_ip = {address}
transport_url = {transport_url}
use_stderr = true
debug = {debug}
[arbiter]
directory = {arbiter}
[client]
hosts = {hosts}
[guest]
memory_backing_dir = {memory}
[replication]
listen_address = {address}
peer_timeout_ms = {peer_timeout_ms}
[oslo_messaging_notifications]
driver = {notifications}
"""


def configure(
    lab: Lab,
    *,
    debug: bool = False,
    peer_timeout_ms: int = 1000,
    extra: Mapping[str, Mapping[str, str]] | None = None,
    own: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
) -> None:
    """Write the configuration of every host.

    :param peer_timeout_ms: twice the product's default: two cores emulate all hosts and guests.
    :param extra: group to option to value, on top.
    :param own: host to what it has on top of that.
    """
    arbiter = lab.ctl.path(ARBITER)
    arbiter.mkdir(parents=True, exist_ok=True)
    for host in lab.hosts:
        text = _TEMPLATE.format(
            host=host.name,
            address=host.repl_ip,
            transport_url=lab.transport_url if lab.rabbit else "fake://",
            debug=str(debug).lower(),
            arbiter=ARBITER,
            hosts=",".join(compute.name for compute in lab.computes),
            memory=libvirtd.MEMORY_BACKING,
            peer_timeout_ms=peer_timeout_ms,
            notifications="messagingv2" if lab.rabbit else "noop",
        )
        groups = {group: dict(options) for group, options in (extra or {}).items()}
        for group, options in (own or {}).get(host.name, {}).items():
            groups.setdefault(group, {}).update(options)
        for group, options in groups.items():
            text += f"[{group}]\n" + "".join(f"{name} = {v}\n" for name, v in options.items())
        path = host.path(CONFIG)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:  # holds the message bus's password
            file.write(text)


def start_agent(host: LabHost, env: Mapping[str, str] | None = None) -> LabProcess:
    """Start nova-pmt-agent in a host; :func:`wait_agents` waits for it."""
    return host.spawn("nova-pmt-agent", ["nova-pmt-agent", "--config-file", CONFIG], env)


def wait_agents(lab: Lab, timeout: float = 60.0) -> None:
    """Wait until every agent of the lab listens.

    :raises LabError: one ended, or did not get that far in time.
    """
    for host in lab.computes:
        wait_ready(host.processes["nova-pmt-agent"], timeout)


def wait_ready(process: LabProcess, timeout: float = 60.0) -> None:
    """Wait until an agent or a manager that was just started listens.

    :raises LabError: it ended, or did not get that far in time.
    """
    deadline = time.monotonic() + timeout
    while not process.said(READY):
        if not process.alive() or time.monotonic() > deadline:
            raise LabError(f"{process.name} is not ready: {process.tail()}")
        time.sleep(0.05)


def start_managers(lab: Lab, count: int = 1, timeout: float = 60.0) -> list[LabProcess]:
    """Make the database and start managers in ctl, configured with :data:`WITH_MANAGERS`.

    :raises LabError: one ended, or does not listen in time.
    """
    lab.ctl.path(DATABASE).parent.mkdir(parents=True, exist_ok=True)
    lab.ctl.run(["nova-pmt-manage", "--config-file", CONFIG, "db", "sync"])
    return [start_manager(lab, number, timeout) for number in range(1, count + 1)]


def start_manager(lab: Lab, number: int, timeout: float = 60.0) -> LabProcess:
    """Start manager ``number`` in ctl, over the database that is there.

    :param timeout: 0: do not wait for it.
    :raises LabError: it ended, or does not listen in time.
    """
    argv = ["nova-pmt-manager", "--config-file", CONFIG]
    process = lab.ctl.spawn(manager(number), argv)
    if timeout:
        wait_ready(process, timeout)
    return process


def manager(number: int) -> str:
    """What this manager is called among the processes of ctl."""
    return f"nova-pmt-manager-{number}"


def deploy(lab: Lab) -> None:
    """Configuration and agents everywhere; returns when every agent listens."""
    configure(lab)
    for host in lab.computes:
        start_agent(host)
    wait_agents(lab)


def takeover(lab: Lab, host: LabHost, *, since: float, timeout: float = 20.0) -> dict[str, Any]:
    """What the agent of a host says of a takeover.

    :param since: CLOCK_MONOTONIC in seconds; older takeovers do not count.
    :raises LabError: there was none in time.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for event in reversed(json.loads(operate(lab, "status", "-f", "json").stdout)["recent"]):
            details = event.get("details") or {}
            if (
                event["host"] == host.name
                and event["state"] == "standby_active"
                and details.get("running_at", 0.0) > since
            ):
                return dict(details)
    raise LabError(f"{host.name} knows of no takeover after {timeout:.0f} s")


def operate(
    lab: Lab, *arguments: str, check: bool = True, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run the operator's command ``nova-pmt`` in ctl."""
    result = lab.ctl.run(["nova-pmt", *arguments], check=False, timeout=timeout)
    if check and result.returncode:
        raise LabError(
            f"nova-pmt {' '.join(arguments)} ended with {result.returncode}: "
            f"{result.stderr.strip() or result.stdout.strip()}"
        )
    return result
