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

"""Who let out what, and when: one timeline of all hosts, and what is wrong in it.

Its lines come from :mod:`nova_pmt.evaluation.observed`. At every instant one host may let output of
the guest go: the one on which the guest was begun, from a standby's ``run`` on the standby's.
Everything that another host lets out is a split brain; so is it when both sides of one generation
go on. An epoch that is released before the standby had its checkpoint is released too early.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Generations whose commits are kept; what is older is over.
_GENERATIONS = 8


@dataclass(frozen=True)
class Event:
    """One line.

    :param at: CLOCK_MONOTONIC in seconds.
    :param kind: ``commit`` (a standby has a checkpoint whole, and says so), ``release`` (a primary
        lets an epoch's packets go), ``armed`` (a primary holds output from now on), ``alone`` (it
        lets go of all, and holds no more), ``run`` (a standby goes on), ``claim``, ``taken`` and
        ``fault`` (a worker is to die at a step, and does).
    :param generation: None: an agent, which does not know it.
    """

    at: float
    host: str
    kind: str
    generation: int | None = None
    epoch: int | None = None
    pid: int = 0
    won: bool | None = None
    step: str = ""


def parse(line: str, uuid: str) -> Event | None:
    """A line of the trace, or None if it is cut short or of another guest."""
    try:
        data = json.loads(line)
    except ValueError:
        return None  # its writer was killed in the middle of it
    if data.get("uuid") != uuid:
        return None
    return Event(
        at=float(data["at"]),
        host=str(data["host"]),
        kind=str(data["event"]),
        generation=data.get("generation"),
        epoch=data.get("epoch"),
        pid=int(data.get("pid", 0)),
        won=data.get("won"),
        step=str(data.get("step", "")),
    )


class Tail:
    """The lines of one host's file, each once. The file may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[str]:
        """Lines that came since the last time; of an unfinished one nothing."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return data[:whole].decode("ascii", "replace").splitlines()


class Traces:
    """The files of all hosts, as one sequence of events."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tails = [Tail(path) for path in paths]
        self._late: list[Event] = []

    def read(self, uuid: str) -> list[Event]:
        """What came since the last time, in order.

        Whatever has led to an event that is there is there, too: the files are read twice, and
        of the second time only commits count yet.
        """
        events = self._late + self._events(uuid)
        again = self._events(uuid)
        self._late = [event for event in again if event.kind != "commit"]
        return sorted(events + [event for event in again if event.kind == "commit"], key=_order)

    def _events(self, uuid: str) -> list[Event]:
        parsed = (parse(line, uuid) for tail in self._tails for line in tail.read())
        return [event for event in parsed if event is not None]


def _order(event: Event) -> tuple[float, bool]:
    return event.at, event.kind != "commit"


@dataclass
class Findings:
    """What is wrong, a line each; nothing when both lists are empty."""

    split_brain: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)


class Timeline:
    """The life of one guest. Fed with events, trial after trial.

    :param host: on which it was begun.
    """

    def __init__(self, host: str) -> None:
        self.owner = host
        self._owners = [(0.0, host)]
        self._commits: dict[int, dict[int, float]] = {}
        self._alone: dict[int, Event] = {}
        self._ran: dict[int, Event] = {}

    def feed(self, events: Sequence[Event]) -> Findings:
        """Take note of events that came after those before; what is wrong in them."""
        found = Findings()
        for event in events:
            if event.kind == "commit":
                self._commit(event)
            elif event.kind == "release":
                self._release(event, found)
            elif event.kind == "alone":
                self._goes_alone(event, found)
            elif event.kind == "run":
                self._runs(event, found)
        return found

    def _commit(self, event: Event) -> None:
        if event.generation is None or event.epoch is None:
            return
        self._commits.setdefault(event.generation, {}).setdefault(event.epoch, event.at)
        while len(self._commits) > _GENERATIONS:
            del self._commits[min(self._commits)]

    def _release(self, event: Event, found: Findings) -> None:
        generation, epoch = event.generation or 0, event.epoch or 0
        what = f"{event.host} released epoch {epoch} of generation {generation}"
        committed = self._commits.get(generation, {}).get(epoch)
        if committed is None:
            found.early.append(f"{what}, which no standby ever had")
        elif committed > event.at:
            found.early.append(f"{what} {(committed - event.at) * 1e3:.1f} ms before its commit")
        ran = self._ran.get(generation)
        if ran is not None and ran.epoch is not None and epoch > ran.epoch:
            found.early.append(f"{what}; {ran.host} went on from epoch {ran.epoch}")
        if event.host != self.owner:
            found.split_brain.append(f"{what} {self._since(event)}")

    def _goes_alone(self, event: Event, found: Findings) -> None:
        if event.host != self.owner:
            found.split_brain.append(f"{event.host} let all go {self._since(event)}")
        if event.generation is not None:
            self._alone[event.generation] = event

    def _runs(self, event: Event, found: Findings) -> None:
        generation = event.generation
        if generation is not None:
            other = self._alone.get(generation)
            if other is not None:
                found.split_brain.append(
                    f"{event.host} and {other.host} both went on in generation {generation}"
                )
            self._ran[generation] = event
        self.owner = event.host
        self._owners.append((event.at, event.host))

    def owner_at(self, at: float) -> tuple[str, float]:
        """Who might let output go at a moment, and since when."""
        return next((host, since) for since, host in reversed(self._owners) if since <= at)

    def _since(self, event: Event) -> str:
        """How long after somebody else went on."""
        runs = [ran.at for ran in self._ran.values() if ran.host == self.owner]
        if not runs:
            return f"although the guest is {self.owner}'s"
        return f"{(event.at - max(runs)) * 1e3:.1f} ms after {self.owner} went on"


def decided(events: Iterable[Event], since: float) -> Event | None:
    """The first event after a moment by which one side went on without the other."""
    found = [event for event in events if event.kind in ("run", "alone") and event.at >= since]
    return min(found, default=None, key=lambda event: event.at)
