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

"""The lab's private RabbitMQ: a plain process in ctl, its state below the lab's directory.

The password is made anew for each lab and lies only in files of mode 0600; no command line has it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nova_pmt.exception import LabError
from nova_pmt.lab import network

if TYPE_CHECKING:
    from nova_pmt.lab.host import LabHost

PORT = 5672
USER = "nova_pmt"
_HELLO = b"AMQP\x00\x00\x09\x01"

# Erlang terms: the newer format of rabbitmq.conf is translated at each start, which takes longer
# than the start itself does afterwards.
_CONFIGURATION = """\
[
  {{rabbit, [
    {{tcp_listeners, [{{"{address}", {port}}}]}},
    {{default_user, <<"{user}">>}},
    {{default_pass, <<"{password}">>}},
    {{disk_free_limit, 50000000}},
    {{collect_statistics_interval, 60000}},
    {{log, [{{console, [{{enabled, true}}, {{level, warning}}]}},
            {{file, [{{file, false}}]}}]}}
  ]}}
].
"""


_NAME_IN_USE = "dist_port_already_used"


class Rabbit:
    """The broker of one lab."""

    def __init__(self, ctl: LabHost, lab_id: str) -> None:
        self._ctl = ctl
        self._directory = ctl.disk / "rabbitmq"
        # epmd listens on the loopback of ctl only, so the node must be called so.
        self._node = f"pmt-{lab_id}@localhost"
        self._password = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        """What oslo.messaging takes as ``transport_url``; contains the password."""
        return f"rabbit://{USER}:{self._password}@{network.MGMT.address(0)}:{PORT}//"

    def start(self) -> None:
        """Start it in the background; :meth:`wait_ready` waits for it."""
        home = self._directory / "home"
        home.mkdir(parents=True, exist_ok=True)
        private_file(home / ".erlang.cookie", secrets.token_hex(20), 0o400)
        private_file(
            self._directory / "rabbitmq.config",
            _CONFIGURATION.format(
                address=network.MGMT.address(0), port=PORT, user=USER, password=self._password
            ),
        )
        (self._directory / "enabled_plugins").write_text("[].\n")
        server = _server()
        plugins = self._directory / "plugins"
        plugins.mkdir(exist_ok=True)
        # At each start all that lies there is read, enabled or not: a second for nothing. What
        # is not called rabbitmq_* belongs to the broker itself.
        for source in server.parent.parent.joinpath("plugins").iterdir():
            link = plugins / source.name
            needed = not source.name.startswith("rabbitmq_") or "prelaunch" in source.name
            if needed and not link.exists():
                link.symlink_to(source)
        self._ctl.spawn("rabbitmq", [str(server)], self._environment(home))

    def _environment(self, home: Path) -> dict[str, str]:
        # One scheduler, and none that burns a core while it waits for work.
        thrift = "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none"
        return {
            "HOME": str(home),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_CONFIG_FILE": str(self._directory / "rabbitmq.config"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_MNESIA_BASE": str(self._directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._directory / "enabled_plugins"),
            "RABBITMQ_PLUGINS_DIR": str(self._directory / "plugins"),
            "RABBITMQ_PID_FILE": str(self._directory / "pid"),
            "RABBITMQ_DIST_PORT": "25672",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": thrift,
        }

    def wait_ready(self, timeout: float = 90.0) -> None:
        """Return once it speaks AMQP: listeners open only after users and queues are there.

        Its name server may not have noticed yet that the one before was killed, and then it ends:
        it is started again.

        :raises LabError: it ended, or does not speak within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            process = self._ctl.processes["rabbitmq"]
            while process.alive() and time.monotonic() < deadline:
                if self._speaks():
                    return
                time.sleep(0.05)
            if time.monotonic() > deadline or not process.said(_NAME_IN_USE):
                break
            time.sleep(0.5)
            self.restart()
        raise LabError(
            f"RabbitMQ is not ready: {process.tail()}",
            cure=f"See {process.log} and {self._directory}/log.",
        )

    def _speaks(self) -> bool:
        try:
            with self._ctl.dial(network.MGMT.address(0), PORT, 5) as connection:
                connection.sendall(_HELLO)
                return connection.recv(1) == b"\x01"  # a method frame: connection.start
        except OSError:
            return False

    def pids(self) -> list[int]:
        """The broker itself, as seen from the root namespace: to be stopped, or killed."""
        found = self._ctl.commands().items()
        return [pid for pid, words in found if os.path.basename(words[0]) == "beam.smp"]

    def _processes(self) -> list[int]:
        """All of it in ctl, also what has not become the broker yet."""
        found = self._ctl.commands().items()
        return [
            pid
            for pid, words in found
            if any("rabbitmq" in word or self._node in word for word in words)
        ]

    def alive(self) -> bool:
        """Whether it runs, or is about to: its start is a script that takes a while."""
        process = self._ctl.processes.get("rabbitmq")
        return (process is not None and process.alive()) or bool(self.pids())

    def restart(self) -> None:
        """Start it again after it was killed, with what was durable; does not wait for it."""
        process = self._ctl.processes.pop("rabbitmq", None)
        if process is not None:
            process.kill()
        # Its script may be gone without it, or be just about to become it.
        deadline = time.monotonic() + 30
        while left := self._processes():
            if time.monotonic() > deadline:
                raise LabError(f"RabbitMQ does not end: processes {left} are left after SIGKILL")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.start()

    def stop(self) -> None:
        """Let it close its queues and end; by force after 15 s."""
        process = self._ctl.processes.pop("rabbitmq", None)
        if process is not None:
            process.stop(15)


def _server() -> Path:
    # Debian's /usr/sbin/rabbitmq-server insists on user rabbitmq and on /var/lib/rabbitmq.
    found = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    if not found:
        raise LabError("RabbitMQ is not installed", cure="apt-get install rabbitmq-server")
    return found[-1]


def private_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that never was readable for anyone else."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "w") as f:
        f.write(text)
