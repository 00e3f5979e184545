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

"""The rig, and the command against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nova_pmt.cmd import client
from tests.unit.agent.rig import Rig, eventually
from tests.unit.client.managed import Managed


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Compute hosts a and b with their agents."""
    made = Rig(tmp_path)
    made.start()
    yield made
    made.close()


@pytest.fixture
def managed(tmp_path: Path, rig: Rig) -> Iterator[Managed]:
    """The same with a manager, which has heard of both hosts; the command knows only of it."""
    rig.a.stop()
    rig.b.stop()
    made = Managed(rig, tmp_path)
    rig.start()
    made.beat()
    rig.config.write_text(
        "[DEFAULT]\ntransport_url = fake://\n[client]\ntimeout_s = 5\n[manager]\nenabled = true\n"
    )
    eventually(lambda: len(made.database.hosts()) == 2)
    yield made
    made.close()


@pytest.fixture
def nova_pmt(rig: Rig, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs ``nova-pmt`` with these arguments."""

    def run(*argv: str) -> Ran:
        try:
            status = client.main([*argv, "--config-file", str(rig.config)])
        except SystemExit as ended:  # argparse
            status = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run
