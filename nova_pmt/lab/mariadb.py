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

"""A private MariaDB: a plain process of its own, all that it has below one directory.

It is reached through a socket in that directory and has no port. The password is made anew each
time and lies only in a file of mode 0600; no command line has it. What it has answered survives
its being killed, but not a power cut: it never waits for a disk.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from nova_pmt.exception import LabError
from nova_pmt.lab.rabbit import private_file

USER = "nova_pmt"
#: Of a socket's path: the kernel's limit is 108 bytes with the final zero.
_MAX_SOCKET_PATH = 107
_INSTALL_S, _READY_S, _STOP_S = 120.0, 60.0, 20.0

_OPTIONS = (
    # We are root, in the lab; MariaDB wants to be told that this is meant.
    "--user=root",
    "--skip-networking",
    "--skip-name-resolve",
    "--skip-log-bin",
    "--character-set-server=utf8mb4",
    # Commits go to the kernel at once, so that SIGKILL takes nothing away, and no further.
    "--innodb-flush-log-at-trx-commit=2",
    "--debug-no-sync",
    "--innodb-use-native-aio=OFF",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=8M",
    "--aria-pagecache-buffer-size=1M",
    "--key-buffer-size=1M",
    "--performance-schema=OFF",
    "--max-connections=100",
)


class MariaDB:
    """One server; a context manager that leaves nothing.

    Use it from a thread that outlives it: it ends with the one that started it.

    :param directory: is made, and removed at the end with all that is in it.
    :param options: of mariadbd, on top of ours.
    """

    def __init__(self, directory: Path, options: Sequence[str] = ()) -> None:
        self._directory = directory
        self._options = tuple(options)
        self._socket = directory / "socket"
        self._log = directory / "log"
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MariaDB:
        server, install = _program("mariadbd"), _program("mariadb-install-db")
        if len(str(self._socket)) > _MAX_SOCKET_PATH:
            raise LabError(
                f"{self._socket} is too long for a socket's path",
                cure=f"Choose a directory whose path is below {_MAX_SOCKET_PATH - 10} characters.",
            )
        self._server = server
        self._directory.mkdir(mode=0o700, parents=True)
        try:
            self._install(install)
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._directory)

    @property
    def pid(self) -> int:
        """Of the server that runs; 0 when none does."""
        return self._process.pid if self._process is not None else 0

    def url(self, database: str) -> str:
        """What oslo.db takes as ``[database] connection``; contains the password."""
        where = quote(str(self._socket), safe="/")
        return f"mysql+pymysql://{USER}:{self._password}@/{database}?unix_socket={where}"

    def create(self, database: str, charset: str = "utf8mb4") -> str:
        """Make an empty database; its :meth:`url`."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE `{database}` CHARACTER SET {charset}")
        return self.url(database)

    def dump(
        self, databases: Sequence[str], target: Path, without_rows: Sequence[str] = ()
    ) -> None:
        """Write what makes ``databases`` anew, with all that is in them, for :meth:`load`.

        :param without_rows: tables (``DATABASE.TABLE``) that are empty then.
        :raises LabError: mariadb-dump failed.
        """
        empty = [f"--ignore-table-data={table}" for table in without_rows]
        with open(target, "wb") as file:
            self._client("mariadb-dump", [*empty, "--databases", *databases], stdout=file)

    def load(self, source: Path) -> None:
        """Read what :meth:`dump` has written.

        :raises LabError: the client failed.
        """
        with open(source, "rb") as file:
            self._client("mariadb", [], stdin=file, stdout=subprocess.DEVNULL)

    def _client(self, program: str, arguments: Sequence[str], **streams: Any) -> None:
        # As root over the socket: no password is needed, so none is told.
        argv = [_program(program), "--no-defaults", "--user=root", f"--socket={self._socket}"]
        done = subprocess.run(
            [*argv, *arguments], stderr=subprocess.PIPE, text=True, check=False, **streams
        )
        if done.returncode:
            raise LabError(f"{program}: {done.stderr.strip()}")

    def connect(self, database: str | None = None, timeout_s: float = 10.0) -> Any:
        """A connection of PyMySQL's, whose rows are dictionaries; a context manager."""
        import pymysql
        from pymysql.cursors import DictCursor

        return pymysql.connect(
            user=USER,
            password=self._password,
            unix_socket=str(self._socket),
            database=database,
            cursorclass=DictCursor,
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
        )

    def start(self) -> None:
        """Start it, and wait until it answers.

        :raises LabError: it ended, or does not answer in time.
        """
        accounts = self._directory / "accounts.sql"
        private_file(
            accounts,
            f"CREATE USER IF NOT EXISTS '{USER}'@'localhost' IDENTIFIED BY '{self._password}';\n"
            f"GRANT ALL ON *.* TO '{USER}'@'localhost';\n",
        )
        argv = [
            *("setpriv", "--pdeathsig", "KILL", self._server, "--no-defaults", *_OPTIONS),
            *self._options,
            f"--datadir={self._directory}/data",
            f"--tmpdir={self._directory}",
            f"--socket={self._socket}",
            f"--pid-file={self._directory}/pid",
            f"--init-file={accounts}",
        ]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _READY_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(0.02)
        raise LabError(
            f"MariaDB is not ready: {self._tail()}",
            cure="Look at what it says; is there memory, and space for 100 MB in the directory?",
        )

    def kill(self) -> None:
        """SIGKILL, as when its machine dies; returns once it is gone. It may be started again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Let it end in order; by force after a while. It may be started again."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def _install(self, program: str) -> None:
        argv = [
            *(program, "--no-defaults", "--user=root", "--skip-test-db"),
            *("--auth-root-authentication-method=socket", "--skip-name-resolve"),
            f"--datadir={self._directory}/data",
        ]
        with open(self._log, "ab") as log:
            try:
                done = subprocess.run(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
                    timeout=_INSTALL_S,
                )
            except subprocess.TimeoutExpired:
                raise LabError(f"{program} was not done within {_INSTALL_S:g} s") from None
        if done.returncode:
            raise LabError(
                f"{program} failed: {self._tail()}", cure="Correct what it names, then try again."
            )

    def _answers(self) -> bool:
        """Whether it greets: it does so only after its accounts are there."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_READY_S)
            try:
                connection.connect(str(self._socket))
                return bool(connection.recv(1))
            except OSError:
                return False

    def _tail(self) -> str:
        return self._log.read_bytes()[-1500:].decode(errors="replace").strip()


def _program(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise LabError(
            "MariaDB is not installed",
            cure="apt-get install --no-install-recommends mariadb-server",
        )
    return found
