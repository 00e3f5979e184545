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

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nova_pmt import unsafe
from nova_pmt.arbiter.load import load

UUID = "7b0e3b2e-0000-4000-8000-000000000001"


@pytest.fixture
def conf(tmp_path: Path) -> Any:
    return SimpleNamespace(arbiter=SimpleNamespace(driver="file", directory=str(tmp_path)))


def test_one_side_wins(conf: Any) -> None:
    arbiter = load(conf)
    arbiter.challenge(UUID)
    assert arbiter.claim(UUID, 1, "primary")
    assert not arbiter.claim(UUID, 1, "standby")


def test_only_the_variable_makes_everybody_win(conf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(unsafe.VARIABLE, unsafe.UNDECIDED)
    arbiter = load(conf)
    arbiter.challenge(UUID)
    assert arbiter.claim(UUID, 1, "primary")
    assert arbiter.claim(UUID, 1, "standby")
    assert arbiter.winner(UUID, 1) == "primary", "it is asked all the same"
    monkeypatch.setenv(unsafe.VARIABLE, "yes")  # any other value does nothing
    assert not load(conf).claim(UUID, 1, "standby")
