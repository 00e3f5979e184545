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
"""The cloud's control plane in ctl: its databases, its APIs, OVN's databases and northd."""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.metadata
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nova_pmt.exception import LabError
from nova_pmt.lab import network, paths
from nova_pmt.lab.lab import Lab
from nova_pmt.lab.mariadb import MariaDB
from nova_pmt.lab.openstack import settings
from nova_pmt.lab.openstack.settings import Account, Settings
from nova_pmt.lab.rabbit import private_file

_HERE = Path(__file__).parent
#: Proxies of the machine are not for services that live inside of it.
ENVIRONMENT: Mapping[str, str] = {
    "PYTHONWARNINGS": "ignore",
    "no_proxy": "*",
    "NO_PROXY": "*",
    "OS_CLIENT_CONFIG_FILE": "/dev/null",
}
_PACKAGES = ("nova", "keystone", "openstack-placement", "glance", "neutron")
_DATABASE_OPTIONS = (
    "--max-connections=600",
    "--innodb-buffer-pool-size=128M",
    "--innodb-log-file-size=48M",
    "--innodb-file-per-table=0",
)
_SCHEMA_S = 600.0
_START_S = 300.0
CONDUCTOR_READY = "Starting conductor node"


class Control:
    """ctl's part of the cloud.

    :param account: of the services; the first user of all, an administrator.
    :param nova: nova.conf of ctl, but for its databases.
    :param say: told what is done, for people.
    """

    def __init__(
        self, lab: Lab, account: Account, nova: Settings, say: Callable[[str], None]
    ) -> None:
        self._ctl = lab.ctl
        self._account = account
        self._nova = nova
        self._say = say
        self._transport_url = lab.transport_url
        self._state = lab.ctl.disk / "openstack"
        self._etc = self._state / "etc"
        self._cells = False  # they are still to be made
        self.database = MariaDB(lab.directory / "mariadb", _DATABASE_OPTIONS)

    # -- before the first service --------------------------------------------------------------

    def configure(self) -> None:
        """Write the configuration of all services; the database runs, and is empty."""
        etc, account, state = self._etc, self._account, self._state
        for name in ("locks", "glance/images", "glance/staging", "glance/tasks", "neutron"):
            (state / name).mkdir(parents=True, exist_ok=True)
        url = self.database.url
        settings.write(
            etc / "keystone/keystone.conf", settings.keystone(url("keystone"), state / "keystone")
        )
        for keys in ("fernet", "credential"):
            directory = state / "keystone" / keys
            directory.mkdir(parents=True, mode=0o700)
            for number in range(2):
                key = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
                private_file(directory / str(number), key)
        settings.write(
            etc / "placement/placement.conf", settings.placement(url("placement"), account)
        )
        settings.write(
            etc / "glance/glance-api.conf",
            settings.glance(url("glance"), account, state / "glance", self._transport_url),
        )
        settings.write(
            etc / "neutron/neutron.conf",
            settings.neutron(url("neutron"), account, state / "neutron", self._transport_url),
        )
        settings.write(
            self._ctl.disk_path(settings.NOVA_CONFIG),
            settings.merged(self._nova, settings.nova_control(url("nova"), url("nova_api"))),
        )
        # Looked for next to nova.conf, whatever that says.
        paste = settings.etc("nova") / "api-paste.ini"
        shutil.copy(paste, self._ctl.disk_path(settings.NOVA_CONFIG).parent)
        self._ctl.disk_path(f"{settings.NOVA_DIRECTORY}/locks").mkdir(parents=True, exist_ok=True)
        private_file(self._state / "cell0", url("nova_cell0"))

    def make_schemas(self) -> None:
        """All tables: from the dump of an earlier lab with the same versions, or by migrations.

        The dump has no rows but those that migrations insert, so it holds nothing of that lab's.
        """
        versions = ",".join(f"{name}={importlib.metadata.version(name)}" for name in _PACKAGES)
        cache = paths.base_directory() / "openstack"
        digest = hashlib.sha256(versions.encode() + (_HERE / "nova_schema.py").read_bytes())
        dump = cache / f"schemas-{digest.hexdigest()[:12]}.sql"
        if dump.exists():
            self.database.load(dump)
            self._cells = True
            self._say("databases: read from the dump of an earlier run")
            return
        for name in settings.DATABASES:
            self.database.create(name, "utf8mb3")  # what their migrations are tested with
        etc = self._etc
        commands = {
            "nova": self._nova_schema("schema"),
            "neutron": [
                *("neutron-db-manage", "--config-file", f"{etc}/neutron/neutron.conf"),
                *("upgrade", "head"),
            ],
            "keystone": [
                *("keystone-manage", "--config-file", f"{etc}/keystone/keystone.conf", "db_sync")
            ],
            "glance": [
                *("glance-manage", "--config-file", f"{etc}/glance/glance-api.conf", "db_sync")
            ],
            "placement": [
                *("placement-manage", "--config-file", f"{etc}/placement/placement.conf"),
                *("db", "sync"),
            ],
        }
        with ThreadPoolExecutor(len(commands), thread_name_prefix="schema") as pool:
            wait_all([pool.submit(self._run, n, argv) for n, argv in commands.items()])
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = dump.with_suffix(f".{os.getpid()}")
        self.database.dump(settings.DATABASES, unfinished, without_rows=("nova_api.cell_mappings",))
        unfinished.replace(dump)
        self._say("databases: migrated")

    def make_cells(self) -> None:
        """Nova's map of its cells, if :meth:`make_schemas` did not make it."""
        if self._cells:
            self._run("nova-cells", self._nova_schema("cells"))

    def _nova_schema(self, what: str) -> list[str]:
        script = str(_HERE / "nova_schema.py")
        return [sys.executable, script, settings.NOVA_CONFIG, f"{self._state}/cell0", what]

    def _run(self, name: str, argv: list[str], env: Mapping[str, str] | None = None) -> None:
        done = self._ctl.run(
            argv, check=False, timeout=_SCHEMA_S, env={**ENVIRONMENT, **(env or {})}
        )
        log = self._ctl.log_directory / f"ctl-db-{name}.log"
        log.write_text(done.stdout + done.stderr)
        if done.returncode:
            raise LabError(
                f"{name}: {argv[0]} ended with {done.returncode}: {done.stderr.strip()[-1500:]}",
                cure=f"See {log}.",
            )

    # -- services ------------------------------------------------------------------------------

    def start_keystone(self) -> None:
        """Its first user, and the API; returns when it answers."""
        self._serve(
            "keystone",
            "keystone.wsgi.api:application",
            8,
            OS_KEYSTONE_CONFIG_DIR=f"{self._etc}/keystone",
            OS_KEYSTONE_CONFIG_FILES="keystone.conf",
        )
        address = settings.url("keystone")
        urls = [f"--bootstrap-{kind}-url={address}" for kind in ("admin", "internal", "public")]
        self._run(
            "keystone-bootstrap",
            [
                *("keystone-manage", "--config-file", f"{self._etc}/keystone/keystone.conf"),
                *("bootstrap", "--bootstrap-username", self._account.name),
                *(*urls, "--bootstrap-region-id", settings.REGION),
            ],
            {"OS_BOOTSTRAP_PASSWORD": self._account.password},
        )
        self.wait("keystone")

    def start_ovn(self) -> None:
        """Both databases of OVN, and northd."""
        directory = self._state / "ovn"
        directory.mkdir(parents=True, exist_ok=True)
        self._ctl.path("/run/ovn").mkdir(exist_ok=True)
        for name, port in (("nb", 6641), ("sb", 6642)):
            file = directory / f"{name}.db"
            self._ctl.run(
                ["ovsdb-tool", "create", str(file), f"/usr/share/ovn/ovn-{name}.ovsschema"]
            )
            self._ctl.spawn(
                f"ovn-{name}",
                [
                    *("ovsdb-server", str(file), f"--remote=punix:/run/ovn/ovn{name}_db.sock"),
                    f"--remote=ptcp:{port}:{network.MGMT.address(0)}",
                    f"--unixctl=/run/ovn/ovn{name}_db.ctl",
                    *(f"--pidfile=/run/ovn/ovn{name}.pid", "-vconsole:warn"),
                ],
            )
        for name in ("nb", "sb"):
            wait_for(self._ctl.path(f"/run/ovn/ovn{name}_db.sock").exists, f"OVN's {name}")
        self._ctl.spawn(
            "ovn-northd",
            [
                *("ovn-northd", "--ovnnb-db=unix:/run/ovn/ovnnb_db.sock"),
                *("--ovnsb-db=unix:/run/ovn/ovnsb_db.sock", "-vconsole:warn"),
            ],
        )

    def start_first(self) -> None:
        """Services that look into Keystone's catalog only when they are used; does not wait."""
        etc = self._etc
        self._nova_service("nova-conductor")
        self._serve(
            "neutron",
            "neutron.wsgi.api:application",
            8,
            OS_NEUTRON_CONFIG_DIR=f"{etc}/neutron",
            OS_NEUTRON_CONFIG_FILES="neutron.conf",
            ASGI_WORKERS="1",
        )
        self._serve(
            "placement",
            "placement.wsgi.api:application",
            6,
            OS_PLACEMENT_CONFIG_DIR=f"{etc}/placement",
        )
        self._serve(
            "glance", "glance.wsgi.api:application", 6, OS_GLANCE_CONFIG_DIR=f"{etc}/glance"
        )

    def start_second(self) -> None:
        """Those that look into the catalog at once, and remember for ever what is missing."""
        self._nova_service("nova-scheduler")
        self._serve(
            "nova", "nova.wsgi.osapi_compute:application", 8, OS_NOVA_CONFIG_DIR="/etc/nova"
        )

    def _nova_service(self, name: str) -> None:
        self._ctl.spawn(name, [name, "--config-file", settings.NOVA_CONFIG], ENVIRONMENT)

    def _serve(self, name: str, target: str, threads: int, **env: str) -> None:
        program = [sys.executable, str(_HERE / "serve.py"), f"{name}-api", target]
        self._ctl.spawn(
            f"{name}-api",
            [*program, network.MGMT.address(0), str(settings.PORTS[name]), str(threads)],
            {**ENVIRONMENT, **env},
        )

    def wait_conductor(self) -> None:
        """Its first call to a conductor that does not listen yet costs a service ten seconds."""
        process = self._ctl.processes["nova-conductor"]
        wait_for(lambda: process.said(CONDUCTOR_READY), "nova-conductor", process.alive)

    def wait(self, name: str) -> None:
        """Wait until an API answers."""
        process = self._ctl.processes[f"{name}-api"]
        try:
            wait_for(lambda: self._answers(settings.PORTS[name]), f"{name}-api", process.alive)
        except LabError as e:
            raise LabError(f"{e.message}: {process.tail()}", cure=f"See {process.log}.") from None

    def _answers(self, port: int) -> bool:
        connection = http.client.HTTPConnection(network.MGMT.address(0), port, timeout=30)
        try:
            connection.sock = self._ctl.dial(network.MGMT.address(0), port, 30)
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def wait_for(
    there: Callable[[], object],
    what: str,
    alive: Callable[[], bool] = lambda: True,
    timeout: float = _START_S,
) -> None:
    """Wait until ``there()`` is true.

    :param timeout: in seconds; generous, since others may use the machine, too.
    :raises LabError: not in time, or not ``alive()`` any more.
    """
    deadline = time.monotonic() + timeout
    while not there():
        if not alive():
            raise LabError(f"{what} has ended")
        if time.monotonic() > deadline:
            raise LabError(f"{what} was not ready within {timeout:.0f} s")
        time.sleep(0.1)


def wait_all(futures: list[Future[None]]) -> None:
    """Wait for all of them, also when one fails; then raise the first failure."""
    failures = [f.exception() for f in futures]
    for failure in failures:
        if failure is not None:
            raise failure
