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

"""Which labs live on this machine, and removing what a dead one left.

Each lab writes ``/run/nova-pmt-lab/ID.json``. The owner and the hosts are named by pid *and* start
time, since a pid alone may belong to someone else by now. A lab lives as long as its owner does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nova_pmt.lab import paths

_MADE = paths.REGISTRY / "mountpoints"


@dataclass(frozen=True)
class Process:
    """A process that cannot be confused with a later one of the same pid."""

    pid: int
    start: int  # clock ticks after the machine's boot

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has ``pid`` now.

        :raises ProcessLookupError: there is none.
        """
        try:
            # The name, in parentheses, may itself contain spaces and parentheses.
            stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError as e:
            raise ProcessLookupError(pid) from e
        return cls(pid, int(stat[19]))

    def alive(self) -> bool:
        """Whether it still runs."""
        try:
            return Process.of(self.pid) == self
        except ProcessLookupError:
            return False

    def signal(self, number: int, wait: float = 0.0) -> bool:
        """Send it a signal; wait up to ``wait`` seconds for its end. True: it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            # The pidfd holds the pid: no other process can get it from here on.
            if not self.alive():
                return True
            signal.pidfd_send_signal(fd, number)
            return bool(select.select([fd], [], [], wait)[0])
        except ProcessLookupError:
            return True
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Entry:
    """What is written down about one lab."""

    id: str
    owner: Process
    directory: str
    hosts: dict[str, Process] = field(default_factory=dict)  # name -> PID 1
    detached: bool = False

    @property
    def file(self) -> Path:
        """Where it is written down."""
        return paths.REGISTRY / f"{self.id}.json"

    def save(self) -> None:
        """Write it down, whole or not at all."""
        paths.REGISTRY.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(self.file)

    def alive(self) -> bool:
        """Whether its owner runs."""
        return self.owner.alive()

    def destroy(self) -> None:
        """End what is left of this lab and forget it. Safe to repeat."""
        for init in self.hosts.values():
            init.signal(signal.SIGKILL, wait=30)
        directory = Path(self.directory)
        if directory.name == self.id:  # never anything that this lab did not make
            shutil.rmtree(directory, ignore_errors=True)
        forget(self.id)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """Labs come and go one at a time, as far as the registry is concerned."""
    # The registry's own directory does not stay, so its parent is what is locked.
    fd = os.open(paths.REGISTRY.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def make_mountpoints(wanted: Iterable[str]) -> None:
    """Make directories that hosts mount on; the last lab removes those that were not there."""
    with _lock():
        made = _MADE.read_text().splitlines() if _MADE.exists() else []
        for path in map(Path, wanted):
            for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
                missing.mkdir()
                made.append(str(missing))
        _MADE.write_text("".join(path + "\n" for path in made))


def forget(lab_id: str) -> None:
    """The lab is down: remove its entry, and after the last lab the directories made for it."""
    with _lock():
        (paths.REGISTRY / f"{lab_id}.json").unlink(missing_ok=True)
        # Removing a directory would take away what another namespace has mounted on it.
        if any(paths.REGISTRY.glob("*.json")) or not paths.REGISTRY.exists():
            return
        if _MADE.exists():
            for path in reversed(_MADE.read_text().splitlines()):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            _MADE.unlink()
        with contextlib.suppress(OSError):
            paths.REGISTRY.rmdir()


def entries() -> list[Entry]:
    """All labs that are written down, alive or dead."""
    found = []
    for file in sorted(paths.REGISTRY.glob("*.json")):
        try:
            data = json.loads(file.read_text())
            data["owner"] = Process(**data["owner"])
            data["hosts"] = {name: Process(**p) for name, p in data["hosts"].items()}
            found.append(Entry(**data))
        except FileNotFoundError:
            continue  # a lab that just went down
        except (ValueError, KeyError, TypeError):
            file.unlink(missing_ok=True)
    return found


def clean() -> list[Entry]:
    """Remove what dead labs left; returns their entries."""
    dead = [entry for entry in entries() if not entry.alive()]
    for entry in dead:
        entry.destroy()
    return dead
