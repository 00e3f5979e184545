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

"""The project's metadata tells the truth about the code."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = sorted(importlib.metadata.distribution("nova-pmt").entry_points)


def test_console_scripts_are_declared() -> None:
    scripts = {point.name for point in ENTRY_POINTS if point.group == "console_scripts"}
    assert {"nova-pmt", "nova-pmt-agent", "nova-pmt-worker", "nova-pmt-lab"} <= scripts


@pytest.mark.parametrize("point", ENTRY_POINTS, ids=lambda p: f"{p.group}:{p.name}")
def test_every_entry_point_loads(point: importlib.metadata.EntryPoint) -> None:
    if point.group.startswith("nova.") or point.name == "nova-pmt-compute":
        # Processes of Nova's load these; tests/functional_nova has them do so.
        assert (ROOT / point.module.replace(".", "/")).with_suffix(".py").is_file()
        return
    assert callable(point.load())


def test_every_source_file_carries_the_licence() -> None:
    sources = [*ROOT.glob("nova_pmt/**/*.py"), *ROOT.glob("tests/**/*.py")]
    without = [
        str(path.relative_to(ROOT))
        for path in sources
        if "Licensed under the Apache License, Version 2.0" not in path.read_text()[:400]
    ]
    assert without == []
