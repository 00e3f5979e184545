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


"""What this nova-compute knows of the standby servers of its host, in small files.

Nova asks for the state of a server many times, also while the message bus is away; and after a
restart it must be known what was plugged and made for whom. So each standby server has a note,
written before anything is made and taken away after everything is gone.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from oslo_log import log

LOG = log.getLogger(__name__)

#: ``waiting``: the domain is the agent's, and waits. ``adopted``: Nova knows that the server runs
#: here. ``left``: the standby server was deleted while the guest ran here and Nova knew nothing.
State = Literal["waiting", "adopted", "left"]


@dataclass(frozen=True)
class Note:
    """One standby server.

    :param standby: UUID of the standby server.
    :param protected: UUID of the server that it stands by for.
    :param protected_id: number of that server in Nova's database; its domain's name comes from it.
    :param directory: the directory of the protected server's files is ours to remove.
    :param vifs: Nova's VIFs of the protected server that are plugged here.
    """

    standby: str
    protected: str
    protected_id: int = 0
    project_id: str = ""
    directory: bool = False
    vifs: list[dict[str, Any]] = field(default_factory=list)
    state: State = "waiting"


class Notes:
    """All notes of one host; from any thread.

    :param directory: of this host alone, kept over restarts; made when the first note is written.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._notes: dict[str, Note] = {}
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            names = []
        for name in names:
            if name.endswith(".json"):
                self._load(os.path.join(directory, name))

    def _load(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8") as file:
                note = Note(**json.load(file))
        except (OSError, ValueError, TypeError) as error:
            LOG.error("Note %s is unreadable: %s", path, error)
            return
        self._notes[note.standby] = note

    def get(self, standby: str) -> Note | None:
        """The note of a standby server, while it is one."""
        with self._lock:
            note = self._notes.get(standby)
            return None if note is None or note.state == "left" else note

    def of(self, protected: str) -> Note | None:
        """The note of whatever stands, or stood, by for a server here."""
        with self._lock:
            return next((one for one in self._notes.values() if one.protected == protected), None)

    def __iter__(self) -> Iterator[Note]:
        with self._lock:
            return iter(list(self._notes.values()))

    def write(self, note: Note) -> None:
        """Add or replace; on disk when this returns.

        :raises OSError: it could not be written.
        """
        with self._lock:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            path = self._path(note.standby)
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                # (Not asdict(): it cannot copy the dictionaries of Nova's own classes.)
                json.dump(vars(note), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
            self._notes[note.standby] = note

    def become(self, note: Note, state: State) -> None:
        """Write it in another state."""
        self.write(replace(note, state=state))

    def remove(self, note: Note) -> None:
        """Forget it; nothing happens when it is unknown."""
        with self._lock:
            self._notes.pop(note.standby, None)
            try:
                os.unlink(self._path(note.standby))
            except FileNotFoundError:
                pass

    def _path(self, standby: str) -> str:
        return os.path.join(self._directory, f"{standby}.json")
