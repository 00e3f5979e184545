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


"""Hearing of writes to a file: real inotify, real files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nova_pmt.guest.disk.growth import Watcher


class File:
    """A file that is watched, and how often it was told of."""

    def __init__(self, path: Path, watcher: Watcher) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        self.path = path
        self.told = 0
        self.then: Callable[[], None] = lambda: None
        self.watcher = watcher

    def arm(self) -> None:
        self.watcher.arm(self.descriptor, self._tell)

    def _tell(self) -> None:
        self.then()
        self.told += 1

    def await_told(self, times: int) -> None:
        deadline = time.monotonic() + 20
        while self.told < times:
            assert time.monotonic() < deadline, f"told {self.told} times, not {times}"
            time.sleep(0.0005)

    def write(self) -> None:
        with self.path.open("ab") as other:  # by somebody else, as QEMU does
            other.write(b"x" * 512)


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    made = Watcher()
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path, watcher: Watcher) -> Iterator[File]:
    made = File(tmp_path / "log", watcher)
    yield made
    os.close(made.descriptor)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "disk-output"]


def test_each_time_it_is_armed_it_tells_once(file: File) -> None:
    for times in range(1, 20):
        file.arm()
        for _ in range(5):
            file.write()
        file.await_told(times)
    time.sleep(0.05)
    assert file.told == 19


def test_not_armed_it_tells_nothing(file: File) -> None:
    file.write()
    file.arm()
    file.write()
    file.await_told(1)
    file.write()
    time.sleep(0.05)
    assert file.told == 1


def test_it_may_be_armed_where_it_tells(file: File) -> None:
    file.then = file.arm
    file.arm()
    for times in range(1, 6):
        file.write()
        file.await_told(times)


def test_a_file_whose_name_is_gone_is_watched_all_the_same(file: File) -> None:
    file.path.unlink()
    file.arm()
    os.write(file.descriptor, b"x")
    file.await_told(1)


def test_each_file_is_told_of_by_itself(tmp_path: Path, watcher: Watcher) -> None:
    files = [File(tmp_path / f"log{number}", watcher) for number in range(5)]
    for number, file in enumerate(files * 4):
        for other in files:
            other.arm()
        file.write()
        file.await_told(number // 5 + 1)
    time.sleep(0.05)
    assert [file.told for file in files] == [4] * 5
    for file in files:
        os.close(file.descriptor)


def test_closed_it_leaves_no_thread_and_cannot_be_armed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watcher = Watcher()
    file = File(tmp_path / "log", watcher)
    file.arm()
    watcher.close()
    watcher.close()
    assert not threads()
    with pytest.raises(OSError, match="nobody watches"):
        file.arm()
    os.close(file.descriptor)
    assert len(os.listdir("/proc/self/fd")) == before
