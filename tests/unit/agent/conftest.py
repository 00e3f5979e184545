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

"""The rig as a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.agent.rig import Rig


@pytest.fixture
def stopped_rig(tmp_path: Path) -> Iterator[Rig]:
    """Two compute hosts whose agents are not started yet."""
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def rig(stopped_rig: Rig) -> Rig:
    """Two compute hosts with their agents."""
    stopped_rig.start()
    return stopped_rig
