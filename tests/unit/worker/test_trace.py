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

"""The record of releases: for tests only, and in nobody's way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nova_pmt.worker import trace
from nova_pmt.worker.trace import Trace


class Buffer:
    """What a trace knows of a buffer; ``calls`` is what was done to it."""

    def __init__(self) -> None:
        self.nic = SimpleNamespace(alias="net0")
        self.last_cut = 0
        self.pressure = 0.25
        self.broken = ""
        self.calls: list[tuple[str, int]] = []

    def cut(self, epoch: int) -> None:
        self.last_cut += 1000
        self.calls.append(("cut", epoch))

    def release(self, epoch: int) -> float | None:
        self.calls.append(("release", epoch))
        return 0.5


class NoOffsets:
    """A buffer that keeps to the contract and knows no offsets, as ``plug`` does."""

    def __init__(self) -> None:
        self.nic = SimpleNamespace(alias="net1")

    def cut(self, epoch: int) -> None:
        pass

    def release(self, epoch: int) -> float | None:
        return None


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_the_variable_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trace.VARIABLE, raising=False)
    assert Trace.from_environment() is None
    monkeypatch.setenv(trace.VARIABLE, "")
    assert Trace.from_environment() is None


def test_releases_are_written_with_the_end_of_their_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace"
    monkeypatch.setenv(trace.VARIABLE, str(path))
    made = Trace.from_environment()
    assert made is not None
    buffer = Buffer()
    traced = made.wrap(buffer)
    begin = time.monotonic()
    traced.cut(1)
    traced.cut(2)
    assert not path.read_text()  # nothing is written in a pause
    assert traced.release(1) == 0.5
    assert traced.release(2) == 0.5
    found = lines(path)  # at once, so that a worker that is killed leaves them
    assert [(line["event"], line["epoch"], line["nic"], line["end"]) for line in found] == [
        ("release", 1, "net0", 1000),
        ("release", 2, "net0", 2000),
    ]
    assert begin <= found[0]["at"] <= found[1]["at"] <= time.monotonic()
    assert buffer.calls == [("cut", 1), ("cut", 2), ("release", 1), ("release", 2)]
    made.close()


def test_a_release_is_written_down_before_it_is_done(tmp_path: Path) -> None:
    made = Trace(str(tmp_path / "trace"))
    buffer = Buffer()
    seen: list[int] = []
    buffer.release = lambda epoch: seen.append(len(lines(tmp_path / "trace")))  # type: ignore
    traced = made.wrap(buffer)
    traced.cut(1)
    traced.release(1)
    assert seen == [1]
    made.close()


def test_lines_are_added_to_what_is_there(tmp_path: Path) -> None:
    for number in range(2):
        made = Trace(str(tmp_path / "trace"))
        made.line(number=number)
        made.close()
    assert [line["number"] for line in lines(tmp_path / "trace")] == [0, 1]


def test_what_the_loop_asks_goes_through(tmp_path: Path) -> None:
    made = Trace(str(tmp_path / "trace"))
    buffer = Buffer()
    traced = made.wrap(buffer)
    assert (traced.pressure, traced.broken) == (0.25, "")
    buffer.pressure, buffer.broken = 0.75, "EPIPE"
    assert (traced.pressure, traced.broken) == (0.75, "EPIPE")
    made.close()


def test_a_buffer_that_knows_no_offsets_can_be_traced(tmp_path: Path) -> None:
    """The contract has none."""
    made = Trace(str(tmp_path / "trace"))
    traced = made.wrap(NoOffsets())
    traced.cut(1)
    assert traced.release(1) is None
    (line,) = lines(tmp_path / "trace")
    assert (line["epoch"], line["nic"]) == (1, "net1")
    made.close()
