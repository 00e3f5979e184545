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

"""Records and generations survive what may happen to a host."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from nova_pmt import exception
from nova_pmt.agent import records
from nova_pmt.agent.control import Pair
from nova_pmt.agent.records import Generations, Record, RecordStore
from tests.unit.agent.rig import UUID

PAIR = Pair(UUID, "web1", 7, "a", "b")


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    record = Record("primary", PAIR, "pmt", {"interval_ms": 20}, "protected", "protected", 12.5)
    RecordStore(str(tmp_path)).save(record)
    assert RecordStore(str(tmp_path)).load() == [record]


def test_records_are_for_their_owner_only_and_leave_no_temporary_files(tmp_path: Path) -> None:
    RecordStore(str(tmp_path)).save(Record("primary", PAIR))
    (path,) = (tmp_path / "pairs").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_crash_while_writing_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RecordStore(str(tmp_path))
    store.save(Record("primary", PAIR, state="syncing"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(Record("primary", PAIR, state="protected"))
    assert [record.state for record in store.load()] == ["syncing"]
    assert len(list((tmp_path / "pairs").iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2}',
        '{"version": 1, "role": "primary", "pair": {"uuid": "../../etc/passwd", "name": "x", '
        '"generation": 1, "primary_host": "a", "standby_host": "b"}}',
    ],
)
def test_a_broken_record_is_set_aside_and_the_others_are_read(tmp_path: Path, text: str) -> None:
    store = RecordStore(str(tmp_path))
    store.save(Record("standby", PAIR))
    broken = tmp_path / "pairs" / "0-broken.json"
    broken.write_text(text)
    assert [record.pair for record in store.load()] == [PAIR]
    assert not broken.exists()
    assert broken.with_name("0-broken.json.broken").read_text() == text


def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    store = RecordStore(str(tmp_path))
    store.remove(UUID)
    assert store.load() == []


def test_a_state_path_that_cannot_be_made_is_an_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(exception.ConfigError) as error:
        RecordStore(str(tmp_path / "file"))
    assert "state_path" in error.value.cure


def test_generations_grow_even_when_the_clock_is_set_back(tmp_path: Path) -> None:
    clock = iter([1000.0, 1000.2, 500.0, 3000.0])
    generations = Generations(str(tmp_path), lambda: next(clock))
    assert [generations.next(UUID) for _ in range(4)] == [1000, 1001, 1002, 3000]


def test_generations_are_greater_than_what_other_hosts_gave(tmp_path: Path) -> None:
    Generations(str(tmp_path), lambda: 10.0).saw(UUID, 5000)
    again = Generations(str(tmp_path), lambda: 10.0)
    assert again.last(UUID) == 5000
    assert again.next(UUID) == 5001


def test_unreadable_generations_go_on_from_the_time(tmp_path: Path) -> None:
    (tmp_path / "generations.json").write_text("{")
    assert Generations(str(tmp_path), lambda: 77.0).next(UUID) == 77


def test_only_so_many_generations_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MAX_GENERATIONS", 3)
    generations = Generations(str(tmp_path), lambda: 1.0)
    names = [UUID[:-1] + str(i) for i in range(5)]
    for name in names:
        generations.next(name)
    assert list(json.loads((tmp_path / "generations.json").read_text())) == names[2:]


def test_a_full_disk_does_not_keep_an_agent_from_taking_up_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_atomically", full)
    generations = Generations(str(tmp_path))
    generations.saw(UUID, 7)
    assert generations.last(UUID) == 7
    with pytest.raises(OSError, match="No space"):
        generations.next(UUID)  # a new one must be kept
