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

"""An arbiter in a directory that both hosts mount, such as a small NFS export.

A claim is a hard link: made complete in a file of its own, then linked to the
one name that stands for (pair, generation). ``link`` is atomic on local file systems
and on NFS and fails when the name exists, so exactly one claim can win, and whoever
asks later reads who it was. VMware's tie-breaker file works the same way.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from typing import Any

from nova_pmt import exception
from nova_pmt.arbiter.base import Arbiter, Side

_UUID = re.compile(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


class FileArbiter(Arbiter):
    """See the module's text; the directory is ``[arbiter] directory``."""

    def __init__(self, conf: Any) -> None:
        self._directory = str(conf.arbiter.directory)

    def _path(self, pair: str, suffix: str) -> str:
        if not _UUID.match(pair):
            raise ValueError(f"not a UUID: {pair!r}")
        return os.path.join(self._directory, f"{pair}.{suffix}")

    def _see_mounted(self, pair: str) -> None:
        """What was left here when the pair was made must be here: else this is another directory.

        A mount point whose export is away is an empty local directory, and on each host another
        one: both sides would win.
        """
        try:
            os.stat(self._path(pair, "challenge"))
        except FileNotFoundError as error:
            raise exception.ArbiterUnavailable(
                f"the arbiter's directory {self._directory} does not hold what was left there when "
                f"pair {pair} was made",
                cure="Mount the shared directory again; the side that waits goes on by itself.",
            ) from error
        except OSError as error:
            raise self._unavailable(error) from error

    def claim(
        self,
        pair: str,
        generation: int,
        side: Side,
        *,
        reason: str = "",
        other_stopped: bool = False,
    ) -> bool:
        self._see_mounted(pair)
        path = self._path(pair, str(int(generation)))
        own = f"{path}.{secrets.token_hex(8)}.tmp"
        try:
            descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                try:
                    os.write(descriptor, side.encode())
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                # Over NFS a lost reply makes link() fail although it worked: read who won.
                with contextlib.suppress(FileExistsError):
                    os.link(own, path)
            finally:
                os.unlink(own)
        except OSError as error:
            raise self._unavailable(error) from error
        return self.winner(pair, generation) == side

    def winner(self, pair: str, generation: int) -> Side | None:
        try:
            with open(self._path(pair, str(int(generation))), encoding="ascii") as file:
                text = file.read(16)
        except FileNotFoundError:
            self._see_mounted(pair)
            return None
        except OSError as error:
            raise self._unavailable(error) from error
        if text == "primary":
            return "primary"
        if text == "standby":
            return "standby"
        raise exception.ArbiterUnavailable(f"claim of pair {pair} is unreadable: {text!r}")

    def challenge(self, pair: str) -> str:
        token = secrets.token_hex(16)
        path = self._path(pair, "challenge")
        try:
            with open(path + ".tmp", "w", encoding="ascii") as file:
                file.write(token)
            os.replace(path + ".tmp", path)
        except OSError as error:
            raise self._unavailable(error) from error
        return token

    def answer(self, pair: str, token: str) -> bool:
        try:
            with open(self._path(pair, "challenge"), encoding="ascii") as file:
                return secrets.compare_digest(file.read(64), token)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> exception.ArbiterUnavailable:
        return exception.ArbiterUnavailable(
            f"the arbiter's directory {self._directory} cannot be used: {error.strerror}"
        )
