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

"""What must survive a restart of the agent: one small file for each pair, and generations."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from oslo_log import log

from nova_pmt.agent import inputs
from nova_pmt.agent.control import Pair
from nova_pmt.exception import ConfigError, InvalidInput

LOG = log.getLogger(__name__)

_VERSION = 1
#: Generations of servers that were not touched for longest are forgotten beyond this number.
_MAX_GENERATIONS = 10_000


@dataclass(frozen=True)
class Record:
    """A pair as it is on disk.

    :param role: ``primary`` or ``standby``: this host's part in the pair.
    :param state: the last known state; informative, a restart decides by the arbiter and the guest.
    :param desired: ``protected``, or ``unprotected`` when an operator ended it.
    :param updated: seconds since 1970.
    """

    role: str
    pair: Pair
    strategy: str = "pmt"
    options: dict[str, float] = field(default_factory=dict)
    state: str = "starting"
    desired: str = "protected"
    updated: float = 0.0


def parse(text: str) -> Record:
    """A record from its file's text.

    :raises ValueError, TypeError, KeyError, InvalidInput: it is not one of ours.
    """
    data = json.loads(text)
    if data.pop("version") != _VERSION:
        raise ValueError("unknown version of a record")
    pair = Pair(**data.pop("pair"))
    inputs.uuid(pair.uuid)
    inputs.generation(pair.generation)
    inputs.host(pair.primary_host)
    inputs.host(pair.standby_host)
    record = Record(pair=pair, **data)
    if record.role not in ("primary", "standby"):
        raise ValueError(f"unknown role {record.role!r}")
    return record


class RecordStore:
    """The records in ``<state_path>/pairs``.

    :raises nova_pmt.exception.ConfigError: the directory cannot be made.
    """

    def __init__(self, state_path: str) -> None:
        self._directory = os.path.join(state_path, "pairs")
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"state_path {state_path} cannot be used: {error.strerror}",
                cure="Make state_path a directory that nova-pmt-agent may write, and restart it.",
            ) from error

    def _path(self, uuid: str) -> str:
        return os.path.join(self._directory, f"{inputs.uuid(uuid)}.json")

    def save(self, record: Record) -> None:
        """Write it so that after a crash the file is either the old or the new one, whole.

        :raises OSError: the disk is full or broken.
        """
        text = json.dumps({"version": _VERSION, **asdict(record)}, indent=1)
        write_atomically(self._path(record.pair.uuid), text)

    def remove(self, uuid: str) -> None:
        """Forget a pair; nothing happens when it is unknown."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(uuid))

    def load(self) -> list[Record]:
        """Every record. A file that cannot be read is set aside, with its reason in the log."""
        found = []
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            if not name.endswith(".json"):
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    found.append(parse(file.read()))
            except (ValueError, TypeError, KeyError, InvalidInput, AttributeError) as error:
                LOG.error("Record %s is unreadable (%s); kept as %s.broken", path, error, path)
                os.replace(path, path + ".broken")
        return found


class Generations:
    """Gives numbers that grow with each new arrangement of a server, also across hosts.

    A server may have been protected from another host before, of which this one knows nothing.
    So a new number is at least the time in seconds: whatever a host with a sane clock gave earlier
    is smaller. What was given or seen here is kept, so that a clock that was set back, or two
    arrangements within a second, do not give a number twice. (A number that was decided at the
    arbiter already is skipped by the caller: it would be lost before it began.)
    """

    def __init__(self, state_path: str, now: Callable[[], float] = time.time) -> None:
        self._path = os.path.join(state_path, "generations.json")
        self._now = now
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}
        try:
            with open(self._path, encoding="utf-8") as file:
                self._last = {
                    inputs.uuid(k): inputs.generation(v) for k, v in json.load(file).items()
                }
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError, InvalidInput) as error:
            LOG.error("%s is unreadable (%s); numbers go on from the time", self._path, error)

    def next(self, uuid: str) -> int:
        """A number for a new arrangement of this server."""
        with self._lock:
            number = max(self._last.get(uuid, 0) + 1, int(self._now()))
            self._keep(uuid, number)
            return number

    def saw(self, uuid: str, generation: int) -> None:
        """Another host gave this number: ours will be greater."""
        with self._lock:
            if generation > self._last.get(uuid, 0):
                try:
                    self._keep(uuid, generation)
                except OSError as error:
                    # A full disk must not keep an agent from taking up its pairs.
                    LOG.error("%s cannot be written: %s", self._path, error)

    def last(self, uuid: str) -> int:
        """The greatest number known for this server; 0 when there is none."""
        with self._lock:
            return self._last.get(uuid, 0)

    def _keep(self, uuid: str, number: int) -> None:
        self._last.pop(uuid, None)  # to the end: the front is what was untouched for longest
        self._last[uuid] = number
        while len(self._last) > _MAX_GENERATIONS:
            del self._last[next(iter(self._last))]
        write_atomically(self._path, json.dumps(self._last))


def write_atomically(path: str, text: str) -> None:
    """Replace a file's content, mode 0600; it survives a power cut once this returns.

    :raises OSError: it could not be written; the old file is untouched.
    """
    directory = os.path.dirname(path)
    own = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            data: Any = memoryview(text.encode())
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(own, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(own)
        raise
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
