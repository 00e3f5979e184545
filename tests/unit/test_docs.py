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

"""The documentation tells of every error, state, row, frame, plug-in and remnant that there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nova_pmt import exception, faultpoint
from nova_pmt.agent import control
from nova_pmt.client import render
from nova_pmt.conf import disk as disk_options
from nova_pmt.conf import network as network_options
from nova_pmt.guest.disk import bitmap, discover, log, source
from nova_pmt.guest.network import redirector, tapredirect
from nova_pmt.guest.network.base import Nic
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


def status_rows(pair: dict[str, Any]) -> set[str]:
    """What stands at the left of ``nova-pmt status``."""
    return {str(cell) for cell in render.status_table(pair).columns[0].cells}


def test_the_guide_has_every_row_of_the_status() -> None:
    nic = {"mac": "MAC", "buffer": "redirector", "dropped_packets": 0}
    nic |= dict.fromkeys(("held_bytes", "limit_bytes", "peak_bytes"), 0)
    disk = dict.fromkeys(("log_bytes", "log_peak_bytes", "written_bytes"), 0) | {"disk": "NAME"}
    pair = dict.fromkeys(("name", "uuid", "host", "primary_host", "standby_host", "strategy"), "x")
    pair |= {"state": "protected", "since": 0.0, "generation": 1, "reason": "x", "attempts": 1}
    pair |= {"progress": {"done_pages": 1, "total_pages": 2}, "next_attempt_s": 1.0}
    pair |= {"last_error": exception.PmtError("x").to_dict()}
    stats = {"network": [nic], "disks": [disk]}
    rows = status_rows({**pair, "role": "primary", "stats": stats})
    rows |= status_rows({**pair, "role": "standby", "stats": {"disks": 1}})
    section = GUIDE.split("``status`` has, for a primary:")[1].split("``top`` has")[0]
    told = set(re.split(r"``|\s{2,}|, |\n", section))
    assert sorted(rows - told - {"server", "host"}) == []


def test_the_guide_has_every_option_of_disks_and_network() -> None:
    options = [*disk_options.OPTS, *network_options.OPTS]
    assert [opt.name for opt in options if not re.search(rf"\b{opt.name}\b", GUIDE)] == []


def test_the_guide_has_everything_that_a_crash_may_leave() -> None:
    nic = Nic("net0", "hostnet0", "52:54:00:00:00:00", "vnet0", vhost=False)
    names = {*redirector._ids(nic), tapredirect.ifb_name("vnet0"), f"{tapredirect._OURS:#x}"}
    names |= {discover.FILTER_PREFIX + "vda", discover.FILE_PREFIX + "vda", "vda" + log.SUFFIX}
    names |= {bitmap.NAME, bitmap.FROZEN, bitmap.NOTE, source.SOCKET, source._EXPORT_PREFIX + "vda"}
    section = GUIDE.split("Clean up after a crash\n===")[1]
    assert missing(names, section) == []


def test_the_architecture_page_has_every_plug_in() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(
        r'^\[project.entry-points."(nova_pmt\.\w+)"\]\n((?:\w+ = .*\n)+)', text, re.M
    )
    names = {name for _, body in found for name in re.findall(r"^(\w+) =", body, re.M)}
    assert len(found) > 3
    assert missing({group for group, _ in found} | names, ARCHITECTURE) == []


def test_the_architecture_page_has_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "nova_pmt").glob("*/__init__.py")}
    shape = ARCHITECTURE.split("Shape of the code")[1]
    assert sorted(name for name in packages if f"\n      {name}/" not in shape) == []


def test_the_architecture_page_has_every_frame() -> None:
    assert missing({kind.name for kind in protocol.Type}, ARCHITECTURE) == []


def test_the_architecture_page_has_every_fault_point() -> None:
    assert missing(set(faultpoint.STEPS), ARCHITECTURE) == []
