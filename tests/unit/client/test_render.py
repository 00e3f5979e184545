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

"""What operators see of output that is held, of disks and of the first copy."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from nova_pmt.client import progress, render
from tests.unit.agent.fake_worker import STATS

PAIR = {
    "uuid": "5d6c0c3e-5a1b-4c7d-9a53-0123456789ab", "name": "web1", "host": "a",
    "role": "primary", "state": "protected", "since": 0, "primary_host": "a", "standby_host": "b",
    "generation": 7, "strategy": "pmt", "options": {}, "output_commit": True, "attempts": 0,
}  # fmt: skip


def pair(role: str = "primary", **changes: Any) -> dict[str, Any]:
    stats = copy.deepcopy(STATS[role])
    stats.update(changes.pop("stats", {}))
    return {**PAIR, "role": role, "stats": stats, **changes}


def text(table: Table) -> list[str]:
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(table)
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def nic(**changes: Any) -> dict[str, Any]:
    return {**STATS["primary"]["network"][0], **changes}


def disk(**changes: Any) -> dict[str, Any]:
    return {**STATS["primary"]["disks"][0], **changes}


# -- status -----------------------------------------------------------------------------


def test_status_has_a_line_for_each_nic_and_each_disk() -> None:
    network = [nic(), nic(mac="52:54:00:00:00:0b", buffer="plug", held_bytes=0)]
    disks = [disk(), disk(disk="sda", log_bytes=0)]
    lines = text(render.status_table(pair(stats={"network": network, "disks": disks})))
    assert "output commit yes" in lines
    assert "output delay ms p50/p99 7.2/19.0" in lines
    assert "nic 52:54:00:00:00:0a redirector, holds 0.50 of 64 MiB (peak 3.00)" in lines
    assert "nic 52:54:00:00:00:0b plug, holds 0.00 of 64 MiB (peak 3.00)" in lines
    assert "disk vda log 0.25 MiB (peak 2.00), 5.0 MiB replicated" in lines
    assert "disk sda log 0.00 MiB (peak 2.00), 5.0 MiB replicated" in lines


def test_status_tells_of_dropped_packets() -> None:
    lines = text(render.status_table(pair(stats={"network": [nic(dropped_packets=17)]})))
    (line,) = [line for line in lines if line.startswith("nic")]
    assert line.endswith("(peak 3.00), full: 17 packets dropped")


@pytest.mark.parametrize("stats", [{"network": [], "disks": []}, {"network": None, "disks": None}])
def test_status_of_a_guest_without_nics_and_disks(stats: dict[str, Any]) -> None:
    lines = text(render.status_table(pair(stats=stats)))
    assert not [line for line in lines if line.startswith(("nic", "disk"))]


def test_status_says_when_output_is_not_held() -> None:
    assert "output commit no" in text(render.status_table(pair(output_commit=False)))


@pytest.mark.parametrize("missing", ["output_delay_ms", "network", "disks"])
def test_status_of_an_agent_that_does_not_tell_everything(missing: str) -> None:
    """An older release on the other host."""
    shown = pair()
    del shown["stats"][missing]
    lines = text(render.status_table(shown))
    if missing == "output_delay_ms":
        assert "output delay ms p50/p99 -/-" in lines
    assert text(render.top_table([shown]))[1]


def test_status_of_a_standby_tells_what_it_wrote_to_disks() -> None:
    assert "written to disks MiB 5.0" in text(render.status_table(pair("standby")))
    without = text(render.status_table(pair("standby", stats={"disks": 0})))
    assert not [line for line in without if "disks" in line]


def test_names_of_devices_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2J[red]x"
    stats = {"network": [nic(mac=evil, buffer=evil)], "disks": [disk(disk=evil)]}
    lines = text(render.status_table(pair(stats=stats)))
    assert "\x1b" not in "".join(lines)
    assert sum("[red]x" in line for line in lines) == 2


# -- top --------------------------------------------------------------------------------


def test_top_has_the_delay_of_output() -> None:
    head, line = text(render.top_table([pair()]))
    assert "PAUSE ms p50 p99 DELAY ms PAGES" in head
    assert "1.50 2.50 7.2 1000" in line
    assert "dropping" not in line


def test_top_tells_that_packets_are_dropped() -> None:
    stats = {"network": [nic(), nic(dropped_packets=1)], "throttled": True, "dropping": True}
    _, line = text(render.top_table([pair(stats=stats)]))
    assert "protected throttled dropping" in line


def test_top_of_a_pair_without_figures() -> None:
    _, line = text(render.top_table([pair(stats={}) | {"stats": None}]))
    assert line.startswith("web1 a b protected - - - - ")


def test_top_for_programs_has_all_of_it() -> None:
    row = render.top_row(pair(progress={"done_bytes": 1, "total_bytes": 2}))
    assert row["stats"] == STATS["primary"]
    assert row["progress"] == {"done_bytes": 1, "total_bytes": 2}


# -- the first copy ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        (None, ""),
        ({}, ""),
        ({"done_bytes": 0, "total_bytes": 0}, ""),
        (
            {"done_bytes": 256 << 20, "total_bytes": 1 << 30, "sent_bytes": 0},
            "disks 25 % (256 of 1024 MiB of the disks)",
        ),
        ({"total_bytes": 1 << 30}, "disks 0 % (0 of 1024 MiB of the disks)"),
        # more than was known of at the start
        (
            {"done_bytes": 3 << 30, "total_bytes": 1 << 30},
            "disks 100 % (3072 of 1024 MiB of the disks)",
        ),
        (
            {"done_pages": 50, "total_pages": 200, "sent_bytes": 50 * 4096},
            "25 % (50 of 200 pages, 0 MiB sent)",
        ),
    ],
)
def test_progress_is_of_disks_first_and_then_of_memory(steps: Any, shown: str) -> None:
    assert render.progress_text(steps) == shown


def test_top_and_status_show_the_copy_of_disks() -> None:
    steps = {"done_bytes": 256 << 20, "total_bytes": 1 << 30}
    shown = pair(state="syncing", progress=steps) | {"stats": None}
    _, line = text(render.top_table([shown]))
    assert "syncing disks 25 %" in line
    assert "first synchronisation disks 25 % (256 of 1024 MiB of the disks)" in text(
        render.status_table(shown)
    )


def test_the_bar_of_protect_moves_while_disks_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []
    real = progress.Progress.update

    def update(self: Any, task: Any, **fields: Any) -> None:
        seen.append((fields.get("completed"), fields.get("total")))
        real(self, task, **fields)

    monkeypatch.setattr(progress.Progress, "update", update)
    views = [
        pair(state="syncing", progress={"done_bytes": 1 << 28, "total_bytes": 1 << 30}),
        pair(state="syncing", progress={"done_pages": 50, "total_pages": 200}),
        pair(),
    ]
    console = Console(file=io.StringIO(), force_terminal=True)
    answers = iter([{"pairs": [view], "recent": []} for view in views])
    progress.wait(lambda: next(answers), console, 60, sleep=lambda _s: None)
    assert [done / total for done, total in seen if total] == [0.25, 0.25]


def test_pairs_tell_of_nova() -> None:
    pair = dict.fromkeys(("name", "uuid", "active_host", "standby_host", "winner"), "")
    pair |= {"state": "unprotected", "changed_at": 0.0, "reason": ""}
    steps: list[dict[str, Any] | None] = [
        None,
        {"step": "", "reason": "no room"},
        {"step": "evacuate", "reason": "it runs on b"},
    ]
    lines = text(render.pairs_table([{**pair, "nova": nova} for nova in steps]))
    told = "\n".join(lines)
    assert "no room" in told
    assert "Nova is told of it: evacuate; it runs on b" in told
