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

"""From the configuration to a running agent; refuses, with the cure, what could not work."""

from __future__ import annotations

import importlib.metadata
import os
import ssl
import stat
import sys
import threading
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent.endpoint import Endpoint, server
from nova_pmt.agent.heartbeat import Heartbeats
from nova_pmt.agent.host import Host
from nova_pmt.agent.notifications import Notifications
from nova_pmt.agent.pairs import Pairs
from nova_pmt.agent.parts import Parts, Timing
from nova_pmt.agent.presence import Announcer
from nova_pmt.agent.records import Generations, RecordStore
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.agent.service import AgentService
from nova_pmt.agent.supervisor import Supervisor
from nova_pmt.arbiter.base import Arbiter
from nova_pmt.conf import opts
from nova_pmt.manager.rpcapi import ManagerAPI
from nova_pmt.messaging import oslo_messaging
from nova_pmt.metrics.agent import PairsCollector
from nova_pmt.metrics.server import MetricsServer

LOG = log.getLogger(__name__)

_CLOSE_S = 3.0


def check(conf: Any, euid: int) -> None:
    """Refuse to start where protection could not work.

    :raises nova_pmt.exception.ConfigError: with what is wrong and how to make it right.
    """
    if euid != 0:
        raise exception.ConfigError(
            "nova-pmt-agent must run as root: it reads guests' memory",
            cure="Start it with systemd (nova-pmt-agent.service) or as root.",
        )
    if conf.manager.enabled != (conf.arbiter.driver == "manager"):
        raise exception.ConfigError(
            "[manager] enabled and [arbiter] driver = manager go together, and only one is set",
            cure="Set both on every compute host, or neither: managers decide only about pairs "
            "that they are told of.",
        )
    _check_state_path(conf.state_path)
    if conf.tls.insecure:
        LOG.warning("[tls] insecure is set: guests' memory crosses the network in the clear")
    else:
        _check_tls(conf.tls)


def _check_state_path(path: str) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        probe = os.path.join(path, f".probe.{os.getpid()}")
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.unlink(probe)
    except OSError as error:
        raise exception.ConfigError(
            f"[DEFAULT] state_path {path} cannot be written: {error.strerror}",
            cure="Make it a directory on a local disk that root can write.",
        ) from error


def _check_tls(tls: Any) -> None:
    cure = (
        "Put the deployment's certificates where [tls] ca_file, cert_file and key_file say; "
        "[tls] insecure = true does without, for tests on a network of your own."
    )
    for option in ("ca_file", "cert_file", "key_file"):
        path = getattr(tls, option)
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise exception.ConfigError(
                f"[tls] {option} {path} cannot be read: {error.strerror}", cure=cure
            ) from error
        if option == "key_file" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise exception.ConfigError(
                f"[tls] key_file {path} can be read by others than its owner",
                cure=f"chmod 600 {path}",
            )
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.cert_file, tls.key_file)
        context.load_verify_locations(tls.ca_file)
    except (ssl.SSLError, ValueError) as error:
        raise exception.ConfigError(
            f"[tls] certificate, key and authority do not fit together: {error}", cure=cure
        ) from error


def worker_argv(conf: Any) -> list[str]:
    """The command of a worker: this Python, and the configuration that this agent has read."""
    argv = [sys.executable, "-m", "nova_pmt.cmd.worker"]
    for path in conf.config_file or []:
        argv += ["--config-file", os.path.abspath(path)]
    for path in conf.config_dir or []:
        argv += ["--config-dir", os.path.abspath(path)]
    return argv


def log_directory(conf: Any) -> str | None:
    """Where workers' output goes; None when this agent logs to its own output."""
    if conf.log_dir:
        return str(conf.log_dir)
    if conf.log_file:
        return os.path.dirname(os.path.abspath(conf.log_file))
    return None


def timing(conf: Any) -> Timing:
    """The waits that an operator can set."""
    return Timing(
        resync_s=float(conf.agent.resync_interval_s),
        worker_start_s=float(conf.agent.worker_start_timeout_s),
        claim_delay_s=conf.replication.claim_delay_ms / 1e3,
    )


def strategies() -> frozenset[str]:
    """The names of all strategies that are installed."""
    found = importlib.metadata.entry_points(group="nova_pmt.strategies")
    return frozenset(entry.name for entry in found)


class Agent:
    """A running agent: RPC server, workers, notifications. Close it to end all of them."""

    def __init__(self, conf: Any, host: Host, arbiter: Arbiter) -> None:
        name = opts.host_name(conf)
        transport = oslo_messaging.get_rpc_transport(conf)
        notifier = oslo_messaging.Notifier(
            oslo_messaging.get_notification_transport(conf),
            publisher_id=f"nova-pmt-agent.{name}",
            retry=3,
        )
        store = RecordStore(conf.state_path)
        records = store.load()
        self._notifications = Notifications(notifier)
        waits = timing(conf)
        parts = Parts(
            name=name,
            address=str(conf.replication.listen_address),
            host=host,
            arbiter=arbiter,
            api=AgentAPI(transport, work_timeout_s=waits.worker_start_s + 2 * waits.stop_s),
            supervisor=Supervisor(worker_argv(conf), log_directory(conf)),
            pairs=Pairs(name, store, self._notifications),
            generations=Generations(conf.state_path),
            resync=bool(conf.agent.resync),
            timing=waits,
        )
        self._heartbeats: Heartbeats | None = None
        if conf.manager.enabled:
            managers = ManagerAPI(transport, timeout_s=conf.manager.call_timeout_s)
            self._heartbeats = Heartbeats(
                name, managers, parts.pairs, host.facts, conf.manager.heartbeat_interval_s
            )
        self._service = AgentService(parts, strategies(), conf.checkpoint.strategy)
        self._serving = threading.Event()
        self._metrics = MetricsServer(
            conf.metrics.listen_address,
            conf.metrics.agent_port,
            [PairsCollector(name, lambda: [one.view(name) for one in parts.pairs])],
            self._problems,
        )
        self._server = server(transport, name, Endpoint(self._service))
        # Pairs first: a protect that comes in at once must find what is protected already.
        self._service.resume(records)
        self._presence = Announcer(
            name,
            conf.guest.runtime_directory,
            conf.guest.memory_backing_dir,
            str(conf.replication.listen_address),
            host.abilities,
            lambda: [(one.uuid, one.record.role) for one in parts.pairs],
        )
        parts.pairs.on_change(self._presence.changed)
        LOG.info("%d pairs of an earlier life were taken up", len(records))
        # In a thread: it waits for the message bus for as long as there is none, and neither
        # the pairs above nor a signal to stop may wait with it.
        threading.Thread(target=self._serve, args=(name,), name="serve", daemon=True).start()

    def _problems(self) -> list[str]:
        return [] if self._serving.is_set() else ["the message bus does not answer"]

    def _serve(self, name: str) -> None:
        self._server.start()
        self._serving.set()
        LOG.info("nova-pmt-agent of %s is ready", name)

    def close(self) -> None:
        """End the RPC server, then the workers; guests run on, records stay."""
        self._metrics.close()
        serving = self._serving.is_set()
        if serving:
            self._server.stop()
        self._service.stop()
        if serving:
            self._server.wait()
        if self._heartbeats is not None:
            self._heartbeats.close(_CLOSE_S)
        self._presence.close(_CLOSE_S)
        self._notifications.close(_CLOSE_S)
