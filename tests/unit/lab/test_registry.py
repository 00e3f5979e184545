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

"""The registry: who lives, who is dead, and what may be removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from nova_pmt.lab import paths, registry
from nova_pmt.lab.registry import Entry, Process


@pytest.fixture(autouse=True)
def own_registry(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REGISTRY", tmp_path / "registry")
    monkeypatch.setattr(registry, "_MADE", tmp_path / "registry" / "mountpoints")
    return tmp_path / "registry"


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def dead() -> Process:
    """A process that certainly is not: our pid, started before all others."""
    return Process(os.getpid(), 0)


def lab(tmp_path, name: str, owner: Process, hosts=None) -> Entry:
    directory = tmp_path / "run" / name
    (directory / "compute1").mkdir(parents=True)
    entry = Entry(name, owner, str(directory), hosts or {})
    entry.save()
    return entry


def test_entries_come_back_as_they_were(tmp_path):
    entry = lab(tmp_path, "a", Process.of(os.getpid()), {"ctl": Process(1, 2)})
    assert registry.entries() == [entry]
    assert entry.alive()


def test_a_pid_alone_is_nobody():
    assert Process.of(os.getpid()).alive()
    assert not dead().alive()


def test_signal_spares_a_later_process_of_the_same_pid(sleeper):
    assert Process(sleeper.pid, 1).signal(signal.SIGKILL)
    assert sleeper.poll() is None


def test_signal_tells_whether_it_is_gone(sleeper):
    process = Process.of(sleeper.pid)
    assert not process.signal(signal.SIGCONT)
    assert process.signal(signal.SIGKILL, wait=10)


def test_process_names_may_look_like_anything(tmp_path):
    program = tmp_path / "a) 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "1000"]) as process:
        try:
            assert Process.of(process.pid).start >= Process.of(os.getpid()).start
        finally:
            process.kill()


def test_clean_removes_the_dead_and_spares_the_living(tmp_path, sleeper):
    living = lab(tmp_path, "living", Process.of(os.getpid()))
    gone = lab(tmp_path, "gone", dead(), {"compute1": Process.of(sleeper.pid)})
    assert [entry.id for entry in registry.clean()] == ["gone"]
    assert registry.entries() == [living]
    assert os.path.isdir(living.directory)
    assert not os.path.exists(gone.directory)
    assert sleeper.wait(10) == -signal.SIGKILL


def test_a_directory_that_is_not_the_labs_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    Entry("gone", dead(), str(precious)).save()
    registry.clean()
    assert precious.is_dir()
    assert registry.entries() == []


def test_rubbish_in_the_registry_is_removed(own_registry):
    own_registry.mkdir()
    (own_registry / "x.json").write_text("{")
    (own_registry / "y.json").write_text(json.dumps({"id": "y"}))
    assert registry.entries() == []
    assert list(own_registry.glob("*.json")) == []


def test_mount_points_go_with_the_last_lab(tmp_path, own_registry):
    there = tmp_path / "there"
    there.mkdir()
    wanted = [str(there), str(tmp_path / "new" / "deep")]
    for name in ("a", "b"):
        lab(tmp_path, name, Process.of(os.getpid()))
        registry.make_mountpoints(wanted)
    registry.forget("a")  # who made them, but not the last one
    assert (tmp_path / "new" / "deep").is_dir()
    registry.forget("b")
    assert not (tmp_path / "new").exists()
    assert there.is_dir()
    assert not own_registry.exists()
