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


"""What this host's agent tells the other programs of this host, in a small file.

nova-compute must know without a call whether the agent lives, what the host is fit for, and which
guests are part of a pair: it is asked for that on the thread of libvirt's events. The file lies on
tmpfs, is replaced as a whole, and can be read by everybody; it holds no secrets.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from oslo_log import log

from nova_pmt import exception

LOG = log.getLogger(__name__)

#: In ``[guest] runtime_directory``.
FILE = "agent.json"
#: Seconds between two writes while nothing happens.
EVERY_S = 2.0
#: A file that is older, in seconds, is from an agent that hangs or is dead.
STALE_S = 10.0
#: Seconds between two questions to libvirt, whose answer hardly ever changes.
ABILITIES_EVERY_S = 60.0
_MAX_BYTES = 1 << 20
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Presence:
    """One moment of an agent.

    :param at: when it was written, in seconds since the machine's start (CLOCK_BOOTTIME).
    :param release: of nova_pmt.
    :param machine_types: that this host's QEMU knows.
    :param backing_free_bytes: room for the memory of standbys.
    :param replication_mbit: of the interface that standbys listen at; 0: not known.
    :param plug: the kernel can hold what a NIC with vhost sends.
    :param pairs: UUID of each pair of this host: ``primary`` or ``standby``.
    """

    pid: int
    at: float
    release: str = ""
    host: str = ""
    cpu_model: str = ""
    machine_types: tuple[str, ...] = ()
    backing_free_bytes: int = 0
    standbys: int = 0
    replication_mbit: int = 0
    plug: bool = False
    pairs: Mapping[str, str] = field(default_factory=dict)

    def alive(self, now: float) -> bool:
        """Whether the agent that wrote this is there and does not hang."""
        if not 0 <= now - self.at <= STALE_S:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # it is somebody else's, so it is there
        return True


def boot_time() -> float:
    """Seconds since the machine's start, suspended or not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def path(runtime_directory: str) -> str:
    """Where the file is."""
    return os.path.join(runtime_directory, FILE)


def read(file: str) -> Presence | None:
    """What was written last; None when there is nothing that can be read."""
    try:
        with open(file, encoding="utf-8") as stream:
            data = json.loads(stream.read(_MAX_BYTES))
        known = {name: data[name] for name in Presence.__dataclass_fields__ if name in data}
        known["machine_types"] = tuple(map(str, known.get("machine_types", ())))
        known["pairs"] = {str(uuid): str(role) for uuid, role in known.get("pairs", {}).items()}
        return Presence(**{**known, "pid": int(known["pid"]), "at": float(known["at"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(file: str, presence: Presence) -> None:
    """Replace the file as a whole.

    :raises OSError: it cannot be written.
    """
    own = f"{file}.{os.getpid()}.tmp"
    # (Not flushed to disk: it is on tmpfs, and nobody wants it after a power cut.)
    with open(own, "w", encoding="utf-8") as stream:
        os.fchmod(stream.fileno(), 0o644)
        json.dump(asdict(presence), stream)
    os.replace(own, file)


def backing_free(directory: str) -> int:
    """Bytes that the memory of standbys may still take there."""
    # libvirt makes it for its first guest.
    while not os.path.isdir(directory) and directory != "/":
        directory = os.path.dirname(directory)
    try:
        room = os.statvfs(directory)
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file)
        available = int(facts["MemAvailable"].split()[0]) << 10
        return min(room.f_bavail * room.f_frsize, available)
    except (OSError, ValueError, KeyError):
        return 0


def speed_mbit(address: str) -> int:
    """Speed of the interface that has this IPv4 address, in Mbit/s; 0: not known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(found[20:24]) != address:
                    continue
                with open(f"/sys/class/net/{name}/speed", encoding="ascii") as file:
                    return max(0, int(file.read()))
            except (OSError, ValueError):
                continue
    return 0


class Announcer:
    """A thread that keeps the file new, also when a bus or a libvirt hangs.

    :param abilities: ``cpu_model``, ``machine_types`` and ``plug`` of this host; may raise
        :class:`nova_pmt.exception.PmtError`.
    :param pairs: UUID and role of each pair; called from this thread.
    :param address: where standbys listen.
    """

    def __init__(
        self,
        host: str,
        runtime_directory: str,
        backing_directory: str,
        address: str,
        abilities: Callable[[], Mapping[str, Any]],
        pairs: Callable[[], Iterable[tuple[str, str]]],
    ) -> None:
        self._host = host
        self._file = path(runtime_directory)
        self._backing = backing_directory
        self._address = address
        self._ask = abilities
        self._pairs = pairs
        self._abilities: Mapping[str, Any] = {}
        self._news = threading.Event()
        self._stopping = False
        self._failing = False
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("presence", self._run), ("abilities", self._learn))
        ]
        self._stopped = threading.Event()
        for thread in self._threads:
            thread.start()

    def changed(self) -> None:
        """Something is to be told at once; never waits."""
        self._news.set()

    def close(self, timeout_s: float) -> None:
        """Take the file away: the agent is going."""
        self._stopping = True
        self._stopped.set()
        self._news.set()
        self._threads[0].join(timeout_s)
        try:
            os.unlink(self._file)
        except OSError:
            pass  # it was never written

    def _learn(self) -> None:
        # A thread of its own: a libvirtd that hangs is not an agent that does.
        while not self._stopping:
            try:
                self._abilities = self._ask()
                self._news.set()
            except exception.PmtError as error:
                LOG.info("what this host is fit for is not known: %s", error)
            except Exception:
                LOG.exception("what this host is fit for cannot be found out")
            self._stopped.wait(ABILITIES_EVERY_S if self._abilities else EVERY_S)

    def _run(self) -> None:
        while not self._stopping:
            self._news.clear()
            try:
                os.makedirs(os.path.dirname(self._file), mode=0o711, exist_ok=True)
                write(self._file, self._now())
                self._failing = False
            except OSError as error:
                if not self._failing:
                    LOG.error("nova-compute will take this agent for dead: %s", error)
                self._failing = True
            except Exception:  # an agent that is silent is taken for dead
                LOG.exception("this agent's presence cannot be told")
            self._news.wait(EVERY_S)

    def _now(self) -> Presence:
        pairs = dict(self._pairs())
        return Presence(
            pid=os.getpid(),
            at=boot_time(),
            release=_release(),
            host=self._host,
            cpu_model=str(self._abilities.get("cpu_model", "")),
            machine_types=tuple(self._abilities.get("machine_types", ())),
            backing_free_bytes=backing_free(self._backing),
            standbys=sum(role == "standby" for role in pairs.values()),
            replication_mbit=speed_mbit(self._address),
            plug=bool(self._abilities.get("plug")),
            pairs=pairs,
        )


def _release() -> str:
    try:
        return importlib.metadata.version("nova-pmt")
    except importlib.metadata.PackageNotFoundError:
        return ""
