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

"""The timeline finds a split brain and an early release, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from nova_pmt.evaluation.timeline import Event, Timeline, Traces, decided, parse

UUID = "6d1b6f0e-0000-4000-8000-000000000001"


def commit(at: float, epoch: int, generation: int = 1, host: str = "two") -> Event:
    return Event(at, host, "commit", generation, epoch)


def release(at: float, epoch: int, generation: int = 1, host: str = "one") -> Event:
    return Event(at, host, "release", generation, epoch)


def run(at: float, epoch: int, generation: int = 1, host: str = "two") -> Event:
    return Event(at, host, "run", generation, epoch)


ROUNDS = [commit(1.0, 1), release(1.01, 1), commit(2.0, 2), release(2.01, 2)]


def test_rounds_a_failover_and_rounds_the_other_way_are_clean() -> None:
    timeline = Timeline("one")
    found = timeline.feed(
        [
            *ROUNDS,
            run(3.0, 2),
            commit(4.0, 1, generation=2, host="three"),
            release(4.1, 1, generation=2, host="two"),
        ]
    )
    assert found.split_brain == found.early == []
    assert timeline.owner == "two"


def test_a_primary_that_goes_on_alone_and_is_protected_again_is_clean() -> None:
    alone = Event(3.0, "one", "alone", 1)
    again = [commit(4.0, 1, generation=2), release(4.1, 1, generation=2)]
    found = Timeline("one").feed([*ROUNDS, alone, Event(3.5, "one", "armed", 2), *again])
    assert found.split_brain == found.early == []


def test_a_release_after_the_standby_went_on_is_a_split_brain() -> None:
    found = Timeline("one").feed([*ROUNDS, commit(2.5, 3), run(3.0, 3), release(3.25, 3)])
    assert found.early == []
    assert found.split_brain == ["one released epoch 3 of generation 1 250.0 ms after two went on"]


def test_a_loser_that_lets_all_go_is_a_split_brain() -> None:
    for generation in (1, None):  # its worker, and its agent
        found = Timeline("one").feed([*ROUNDS, run(3.0, 2), Event(3.1, "one", "alone", generation)])
        assert found.split_brain == ["one let all go 100.0 ms after two went on"]


def test_both_sides_of_one_generation_are_a_split_brain_whoever_was_first() -> None:
    found = Timeline("one").feed([*ROUNDS, Event(2.9, "one", "alone", 1), run(3.0, 2)])
    assert found.split_brain == ["two and one both went on in generation 1"]


def test_what_one_host_may_do_is_remembered_from_trial_to_trial() -> None:
    timeline = Timeline("one")
    assert not timeline.feed([*ROUNDS, run(3.0, 2)]).split_brain
    assert timeline.feed([release(9.0, 1)]).split_brain


def test_a_release_without_or_before_its_commit_is_early() -> None:
    found = Timeline("one").feed([commit(1.0, 1), release(1.1, 1), release(1.2, 2)])
    assert found.early == ["one released epoch 2 of generation 1, which no standby ever had"]
    timeline = Timeline("one")
    timeline.feed([commit(1.5, 1)])
    found = timeline.feed([release(1.4, 1)])
    assert found.early == ["one released epoch 1 of generation 1 100.0 ms before its commit"]


def test_a_commit_of_another_generation_does_not_count() -> None:
    assert Timeline("one").feed([commit(1.0, 1), release(1.1, 1, generation=2)]).early


def test_a_release_beyond_what_the_standby_went_on_from_is_early() -> None:
    found = Timeline("one").feed([*ROUNDS, commit(2.5, 3), run(3.0, 2), release(3.1, 3)])
    assert found.early == ["one released epoch 3 of generation 1; two went on from epoch 2"]
    assert found.split_brain


def test_who_went_on_first_after_a_moment() -> None:
    events = [*ROUNDS, run(3.0, 2), Event(5.0, "two", "alone", 2)]
    assert decided(events, 2.0) == run(3.0, 2)
    assert decided(events, 4.0) == Event(5.0, "two", "alone", 2)
    assert decided(events, 6.0) is None


def line(host: str, event: str, at: float, **members: object) -> str:
    return json.dumps({"at": at, "event": event, "host": host, "uuid": UUID, **members}) + "\n"


def test_lines_are_of_one_guest_and_those_cut_short_are_left_out() -> None:
    text = line("one", "release", 1.5, generation=3, epoch=4, pid=5, nic="net0", end=77)
    assert parse(text, UUID) == Event(1.5, "one", "release", 3, 4, pid=5)
    assert parse(text, "another") is None
    assert parse(text[:-9], UUID) is None


def test_files_are_read_on_from_where_they_were_and_as_one_sequence(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    traces = Traces([one, two])
    assert traces.read(UUID) == []
    one.write_text(line("one", "release", 2.0, generation=1, epoch=1))
    two.write_text(line("two", "commit", 1.0, generation=1, epoch=1) + '{"at": 3')
    assert [event.kind for event in traces.read(UUID)] == ["commit", "release"]
    with two.open("a") as file:
        file.write(line("two", "run", 3.0)[len('{"at": 3') :])
    assert [event.kind for event in traces.read(UUID)] == ["run"]
    assert traces.read(UUID) == []
