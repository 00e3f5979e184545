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

"""The course of a trial: faults come, are put right, and what is found is told. All played."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nova_pmt.evaluation import faulttrial
from nova_pmt.evaluation.cloud import Lost
from nova_pmt.evaluation.faults import Fault, FaultPlan
from nova_pmt.evaluation.faulttrial import FaultResult, FaultTrial
from nova_pmt.evaluation.injection import Strike
from nova_pmt.evaluation.timeline import Event, Timeline
from nova_pmt.evaluation.trial import Pace, Void
from nova_pmt.evaluation.wire import Frame
from nova_pmt.exception import LabError

PAIR = {"generation": 1, "primary_host": "one", "standby_host": "two"}
KILL = Fault("qemu-kill", "primary")
STOP = Fault("worker-stop", "primary", seconds=0.05)


class Guest:
    """Is moved, and no more."""

    uuid = "u"
    spec = SimpleNamespace(mac="52:54:00:00:00:01")

    def __init__(self, host: str = "one") -> None:
        self.host = SimpleNamespace(name=host)

    def on(self, host: Any) -> Guest:
        return Guest(host.name)


class Session:
    """Clients that are always answered."""

    def __init__(self) -> None:
        self.guest = Guest()
        self.room = True
        self.traffic = SimpleNamespace(go=lambda think_s: None, latest=time.monotonic)

    def moved(self, guest: Guest) -> None:
        self.guest = guest


class Cloud:
    """What the trial sees of hosts and managers.

    :param after: what follows when all was put right: a pair, or an error.
    """

    def __init__(self, directory: Path, after: Any = PAIR) -> None:
        self.lab = SimpleNamespace(host=lambda name: SimpleNamespace(name=name))
        self.armed = directory / "armed"
        self.events: list[Event] = []
        self.traces = SimpleNamespace(read=self._read)
        self.frames: list[Frame] = []
        self.wire = SimpleNamespace(take=lambda mac: self.frames)
        self.calls: list[str] = []
        self.left: list[str] = []
        self._after = after
        self.state = ("protected", 1)

    def _read(self, uuid: str) -> list[Event]:
        events, self.events = self.events, []
        return events

    def protected(self, guest: Guest, options: Any, **named: Any) -> tuple[Any, list[str]]:
        if "ask" not in named:
            return PAIR, []
        if isinstance(self._after, Exception):
            raise self._after
        return self._after, []

    def row(self, uuid: str) -> dict[str, Any]:
        state, generation = self.state
        return {"state": state, "generation": generation, "reason": "because"}

    def mend(self) -> None:
        self.calls.append("mend")

    def leftovers(self, guest: Guest) -> list[str]:
        return self.left


class Played(FaultTrial):
    """Without a guest to look into."""

    def _check(self, killed: float) -> None:
        self._found.answered = 5


def play(
    monkeypatch: pytest.MonkeyPatch,
    cloud: Cloud,
    faults: tuple[Fault, ...],
    strike: Callable[[Fault], Strike] | None = None,
) -> tuple[FaultTrial, Session]:
    """A trial, yet to be run."""
    monkeypatch.setattr(faulttrial, "CLEAN_S", 0.0)

    def prepare(fault: Fault) -> Strike:
        heal = () if fault.kind.endswith("-kill") else (lambda: cloud.calls.append("heal"),)
        return Strike(fault, lambda: cloud.calls.append(fault.kind), *heal)

    injector = SimpleNamespace(prepare=strike or prepare)
    monkeypatch.setattr(faulttrial, "Injector", lambda *_: injector)
    session = Session()
    plan = FaultPlan(1, "two" if len(faults) > 1 else faults[0].kind, 0.01, faults)
    trial = Played(
        cloud,  # type: ignore[arg-type]
        session,  # type: ignore[arg-type]
        plan,
        Pace(0.005),
        {},
        Timeline("one"),
    )
    return trial, session


@pytest.mark.parametrize(("generation", "wrong"), [(PAIR["generation"], 0), (99, 1)])
def test_a_database_that_is_away_must_move_no_pair(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, generation: int, wrong: int
) -> None:
    cloud = Cloud(tmp_path, {**PAIR, "generation": generation, "reason": "lost"})
    trial, _ = play(monkeypatch, cloud, (Fault("database-kill"),))
    assert trial.run().unrecovered == wrong


def test_a_failover_is_told_with_who_went_on_and_when(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path, {"generation": 2, "primary_host": "two", "standby_host": "one"})

    def prepare(fault: Fault) -> Strike:
        def kill() -> None:
            cloud.events.append(Event(time.monotonic() + 0.2, "two", "run", 1, 7))

        return Strike(fault, kill)

    trial, session = play(monkeypatch, cloud, (KILL,), prepare)
    result = trial.run()
    assert result.clean
    assert (result.winner, result.survivor, result.epoch) == ("standby", "two", 7)
    assert result.failover_ms is not None and 200 <= result.failover_ms < 5000
    assert result.after == "2 two one"
    assert session.guest.host.name == "two"
    assert result.faults == ["qemu-kill primary"]


def test_what_lasts_is_put_right_before_all_is_mended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path)
    trial, _ = play(monkeypatch, cloud, (STOP,))
    assert trial.run().winner == ""
    assert cloud.calls == ["worker-stop", "heal", "mend"]


def test_the_second_fault_may_find_nothing_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path)

    def prepare(fault: Fault) -> Strike:
        def fail() -> None:
            raise LabError("there is no such port")

        return Strike(fault, fail if fault.kind == "repl-cut" else lambda: None)

    trial, _ = play(monkeypatch, cloud, (KILL, Fault("repl-cut", "standby")), prepare)
    result = trial.run()
    assert result.clean
    assert result.faults == ["qemu-kill primary"]
    assert result.missed == ["repl-cut standby: there is no such port"]


def test_a_split_brain_is_found_also_when_the_guest_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path, Lost("no host has a QEMU of it"))
    cloud.events = [Event(1.0, "two", "run", 1, 7), Event(2.0, "one", "alone", 1)]
    for faults in ((KILL,), (KILL, Fault("worker-kill", "standby"))):
        trial, session = play(monkeypatch, cloud, faults)
        cloud.events = [Event(1.0, "two", "run", 1, 7), Event(2.0, "one", "alone", 1)]
        result = trial.run()
        assert result.split_brain == 1
        assert not result.clean
        assert not session.room


def test_a_guest_that_nobody_could_save_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path, Lost("no host has a QEMU of it"))
    trial, _ = play(monkeypatch, cloud, (KILL, Fault("worker-kill", "standby")))
    with pytest.raises(Void, match="qemu-kill primary \\+ worker-kill standby: no host"):
        trial.run()
    trial, session = play(monkeypatch, cloud, (KILL,))
    result = trial.run()
    assert result.unrecovered == 1
    assert not session.room


def test_a_pair_that_came_apart_by_itself_is_not_broken_a_second_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path)
    cloud.state = ("reprotecting", 2)
    trial, _ = play(monkeypatch, cloud, (STOP,))
    with pytest.raises(Void, match="had come apart before: reprotecting, generation 2"):
        trial.run()
    assert cloud.calls == ["heal"]


@pytest.mark.parametrize(
    ("faults", "split"),
    [((KILL,), 1), ((STOP,), 0), ((Fault("worker-stop", "standby", seconds=0.05),), 1)],
)
def test_frames_of_the_loser_are_a_split_brain_unless_they_had_been_stopped_on_their_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, faults: tuple[Fault, ...], split: int
) -> None:
    cloud = Cloud(tmp_path)
    cloud.events = [Event(1.0, "two", "run", 1, 7)]
    cloud.frames = [Frame(0.9, "one"), Frame(1.01, "one"), Frame(1.2, "two"), Frame(3.0, "one")]
    trial, _ = play(monkeypatch, cloud, faults)
    result = trial.run()
    assert (result.stray_frames, result.split_brain) == (1, split)
    if split:
        assert result.problems == [
            "1 frames came out of one 2000 to 2000 ms after another host went on"
        ]


def test_what_is_left_over_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    cloud.left = ["three: 1 nova_pmt.cmd.worker (pids [7]), 0 expected"]
    trial, _ = play(monkeypatch, cloud, (KILL,))
    result = trial.run()
    assert result.leftovers == 1
    assert result.problems == cloud.left


def test_what_is_being_made_is_not_left_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The machine is busy, and the pair has come apart once more since it was looked at."""
    cloud = Cloud(tmp_path, PAIR)
    looks: list[str] = []

    def leftovers(guest: Guest) -> list[str]:
        looks.append("look")
        if len(looks) < 3:
            cloud.state = ("syncing", 2)
            return ["one: no filters"]
        cloud.state = ("protected", 2)
        return []

    monkeypatch.setattr(cloud, "leftovers", leftovers)
    trial, _ = play(monkeypatch, cloud, (Fault("worker-kill", "primary"),))
    monkeypatch.setattr(faulttrial, "CLEAN_S", 1.0)
    assert trial.run().clean
    assert len(looks) == 3


def test_a_worker_dies_at_its_step_in_a_new_generation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path)
    cloud.state = ("unprotected", 1)
    fault = Fault("step", "primary", seconds=0.05, patient=True, step="round.sent", nth=9)

    def protected(guest: Guest, options: Any, **named: Any) -> tuple[Any, list[str]]:
        if cloud.armed.exists():
            assert '"fault": "round.sent:kill:9"' in cloud.armed.read_text()
            died = time.monotonic()
            cloud.events.append(Event(died, "one", "fault", 2, step="round.sent"))
            cloud.events.append(Event(died + 0.1, "two", "run", 2, 8))
        return PAIR, []

    monkeypatch.setattr(cloud, "protected", protected)
    trial, _ = play(monkeypatch, cloud, (fault,))
    result = trial.run()
    assert isinstance(result, FaultResult)
    assert result.clean
    assert result.steps == ["round.sent"]
    assert result.winner == "standby"
    assert not cloud.armed.exists()


@pytest.mark.parametrize("lost", [1, 9])
def test_a_worker_that_is_lost_before_its_step_is_given_another_chance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: int
) -> None:
    """The machine was too busy: nobody died at the step, and that is no fault of the product's."""
    cloud = Cloud(tmp_path)
    fault = Fault("step", "primary", seconds=0.05, patient=True, step="round.sent", nth=9)
    generations = itertools.count(2)
    attempts = 0

    def row(uuid: str) -> dict[str, Any]:
        state = "protected" if attempts and cloud.armed.exists() else "unprotected"
        return {"state": state, "generation": 99, "reason": "because"}

    def protected(guest: Guest, options: Any, **named: Any) -> tuple[Any, list[str]]:
        nonlocal attempts
        if cloud.armed.exists():
            attempts += 1
            kind = "taken" if attempts <= lost else "fault"
            number = next(generations)
            cloud.events.append(Event(time.monotonic(), "one", kind, number, step="round.sent"))
        return PAIR, []

    monkeypatch.setattr(cloud, "protected", protected)
    monkeypatch.setattr(cloud, "row", row)
    trial, _ = play(monkeypatch, cloud, (fault,))
    if lost > 3:
        with pytest.raises(Void, match="3 times"):
            trial.run()
        assert attempts == 3
    else:
        result = trial.run()
        assert isinstance(result, FaultResult)
        assert (result.steps, attempts) == (["round.sent"], 2)
        assert result.missed == ["step primary round.sent: its worker was lost before"]
        assert result.clean
    assert not cloud.armed.exists()
