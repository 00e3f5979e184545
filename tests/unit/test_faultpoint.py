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

"""Every named step is one that the code comes to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nova_pmt import exception, faultpoint

PACKAGE = Path(faultpoint.__file__).parent


def test_every_step_is_reached_in_exactly_one_place() -> None:
    found = [
        step
        for path in PACKAGE.rglob("*.py")
        for step in re.findall(r'faultpoint\.reach\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(found) == sorted(faultpoint.STEPS)


@pytest.mark.parametrize("text", ["", "round.paused", "nowhere:kill", "round.paused:explode"])
def test_a_fault_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(exception.ConfigError):
        faultpoint._Fault(text)


def test_the_nth_time_counts() -> None:
    fault = faultpoint._Fault("round.paused:fail:3")
    fault.reach("round.paused")
    fault.reach("round.scanned")
    fault.reach("round.paused")
    with pytest.raises(exception.PmtError, match=r"round\.paused"):
        fault.reach("round.paused")
