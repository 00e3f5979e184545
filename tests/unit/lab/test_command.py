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

"""nova-pmt-lab: arguments and what it prints; no lab is started."""

from __future__ import annotations

import json
import os

import pytest

from nova_pmt.cmd import lab as command
from nova_pmt.lab import demo, detached, paths, registry
from nova_pmt.lab.registry import Entry, Process


@pytest.fixture(autouse=True)
def own_registry(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REGISTRY", tmp_path / "registry")
    monkeypatch.setattr(registry, "_MADE", tmp_path / "registry" / "mountpoints")


def entry(name: str, detached: bool = True) -> Entry:
    me = Process.of(os.getpid())
    made = Entry(name, me, f"/nowhere/{name}", {"ctl": me, "compute1": Process(1, 0)}, detached)
    made.save()
    return made


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "nova-pmt-lab up" in text
    assert "virsh create" in text


def test_without_a_lab_the_cure_is_told(capsys):
    assert command.main(["shell"]) == 1
    error = capsys.readouterr().err
    assert "no lab is up" in error
    assert "nova-pmt-lab up" in error


def test_down_wants_a_name_if_there_is_a_choice(capsys):
    entry("a")
    entry("b")
    assert command.main(["down"]) == 1
    assert "--lab" in capsys.readouterr().err


def test_the_labs_of_tests_are_not_found_unless_named():
    entry("tests", detached=False)
    with pytest.raises(Exception, match="no lab"):
        detached.find()
    assert detached.find("tests").id == "tests"


def test_status_as_text_and_as_json(capsys):
    entry("a")
    assert command.main(["status"]) == 0
    text = capsys.readouterr().out
    assert "a  up  detached" in text
    assert "compute1   off" in text
    assert command.main(["status", "-f", "json"]) == 0
    (data,) = json.loads(capsys.readouterr().out)
    assert data["hosts"] == {"ctl": os.getpid(), "compute1": None}


def test_shell_passes_a_command_with_its_options(monkeypatch):
    entry("a")
    seen = []
    monkeypatch.setattr(os, "execvpe", lambda file, argv, env: seen.append((argv, env)))
    command.main(["shell", "--", "virsh", "list", "--all"])
    argv, env = seen[0]
    assert argv[:3] == ["nsenter", "-t", str(os.getpid())]
    assert argv[-3:] == ["virsh", "list", "--all"]
    assert env["NOVA_PMT_LAB"] == "a"


def test_shell_on_a_host_without_power(capsys):
    entry("a")
    assert command.main(["shell", "compute1"]) == 1
    assert "compute1" in capsys.readouterr().err


def test_a_command_after_dashes_is_for_shell_only():
    with pytest.raises(SystemExit) as stop:
        command.main(["status", "--", "ls"])
    assert stop.value.code == 2


def test_demo_is_given_its_arguments(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(demo, "main", lambda *arguments: seen.append(arguments) or 0)
    assert command.main(["demo", "--watch", "3", "--directory", str(tmp_path)]) == 0
    assert seen == [(3.0, tmp_path)]
