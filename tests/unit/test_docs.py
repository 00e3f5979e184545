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

"""The documentation tells of every error, option group, frame and state that there is."""

from __future__ import annotations

import re
from pathlib import Path

from nova_pmt import exception, faultpoint
from nova_pmt.agent import control
from nova_pmt.replication import protocol

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "doc/source/admin/operators-guide.rst").read_text()
ARCHITECTURE = (ROOT / "doc/source/contributor/architecture.rst").read_text()
#: ``raise Kind(..., code="X")`` and ``code = "X"`` in a class.
_CODE = re.compile(r'\bcode ?= ?"([A-Z_]+)"')


def tree(kind: type[exception.PmtError]) -> set[str]:
    return {kind.code}.union(*(tree(sub) for sub in kind.__subclasses__()))


def codes_in_the_source() -> set[str]:
    sources = (ROOT / "nova_pmt").rglob("*.py")
    return {code for path in sources for code in _CODE.findall(path.read_text())}


def missing(names: set[str], text: str) -> list[str]:
    return sorted(name for name in names if f"``{name}``" not in text)


def test_the_guide_has_every_error_of_the_tree() -> None:
    assert missing(tree(exception.PmtError), GUIDE) == []


def test_the_guide_has_every_error_that_is_raised_with_a_code_of_its_own() -> None:
    assert missing(codes_in_the_source(), GUIDE) == []


def test_the_guide_has_no_error_that_there_is_not() -> None:
    table = GUIDE.split(".. error-table-begins")[1].split(".. error-table-ends")[0]
    told = set(re.findall(r"^   \* - ``([A-Z_]+)``", table, flags=re.MULTILINE))
    assert told
    assert sorted(told - tree(exception.PmtError) - codes_in_the_source()) == []


def test_the_guide_has_every_final_state_of_a_worker() -> None:
    assert missing(set(control.FINAL_STATES), GUIDE) == []


def test_the_architecture_page_has_every_frame() -> None:
    assert missing({kind.name for kind in protocol.Type}, ARCHITECTURE) == []


def test_the_architecture_page_has_every_fault_point() -> None:
    assert missing(set(faultpoint.STEPS), ARCHITECTURE) == []
