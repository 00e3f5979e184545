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

"""What the figures say of the published findings, and of what ``auto`` is to do.

A load that waits for its answers does more where protection is better, and has more to send. So
what is sent is compared for the same amount of work. Where a finding names no link it is of 1
Gbit/s, or of the first that was measured.

Each finding is a comparison of means of the same run; whether it holds is computed, never typed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nova_pmt.evaluation.study.cell import PLAIN
from nova_pmt.evaluation.study.figures import Table

#: Scenarios that are I/O-intensive.
IO = ("database", "sessions", "disk", "build", "mixed")
#: The link at which findings that name one are looked at, in Mbit/s.
GIGABIT = 1000
#: Of Kemari's pause, at 5,000 dirty pages.
HEAVY_PAUSE = 1 / 8
#: Scenarios of a database, and what of unprotected throughput is asked for in them.
DATABASES = ("database", "sessions")
DATABASE_SHARE = 0.5
IDLE_BANDWIDTH, LOADED = 1.2, 1.1
#: Most bytes on the wire for a dirty byte, with codecs.
SENT = {"web": 0.35, "database": 0.35, "mixed": 0.35, "uniform": 0.6}
#: Rounds that quantiles need to be compared.
LEAST_ROUNDS = 20


@dataclass(frozen=True)
class Finding:
    """A statement, and whether these figures bear it out.

    :param values: what was compared, for people.
    :param holds: None where it was not measured.
    """

    statement: str
    values: str
    holds: bool | None


def findings(table: Table) -> list[Finding]:
    """All that can be said of what was measured."""
    parts = (_published, _auto, _codecs, _database)
    return [finding for part in parts for finding in part(table)]


def _compare(
    table: Table,
    statement: str,
    scenario: str,
    link: int,
    figure: str,
    first: str,
    second: Sequence[str],
    factor: float = 1.0,
) -> Finding:
    """Whether the first's figure is at most ``factor`` of the best (least) of the second's."""
    named = {name: table.mean(scenario, name, link, figure) for name in (first, *second)}
    values = ", ".join(
        f"{name} {'-' if value is None else format(value, '.3g')}" for name, value in named.items()
    )
    if figure.startswith(("pause", "output_delay")):
        # A quantile of a few rounds says nothing.
        for name in named:
            if (table.mean(scenario, name, link, "rounds") or 0) < LEAST_ROUNDS:
                return Finding(statement, f"{values}; {name} had too few rounds", None)
    one, others = named[first], [named[name] for name in second]
    known = [value for value in others if value is not None]
    if one is None or len(known) < len(others):
        return Finding(statement, values, None)
    return Finding(statement, values, one <= factor * min(known))


def _published(table: Table) -> Iterator[Finding]:
    link = GIGABIT if GIGABIT in table.links else table.links[0]
    if "idle" in table.scenarios:
        yield _compare(
            table,
            "idle: Kemari sends less than PMT at a fixed interval (Mbit/s)",
            "idle", link, "mbit_per_s", "kemari", ("pmt",),
        )  # fmt: skip
    for scenario in IO:
        if scenario in table.scenarios:
            yield _compare(
                table,
                f"{scenario}: PMT sends less than Kemari for what is done (KiB a unit)",
                scenario, link, "kib_per_work", "pmt", ("kemari",),
            )  # fmt: skip
    for scenario in table.scenarios:
        yield _compare(
            table,
            f"{scenario}: PMT's pause is shorter than Kemari's (p50, ms)",
            scenario, link, "pause_p50_ms", "pmt", ("kemari",),
        )  # fmt: skip
    if "heavy" in table.scenarios and GIGABIT in table.links:
        yield _compare(
            table,
            "5,000 dirty pages at 1 Gbit/s: PMT's pause is at most 1/8 of Kemari's (p50, ms)",
            "heavy", GIGABIT, "pause_p50_ms", "pmt", ("kemari",), HEAVY_PAUSE,
        )  # fmt: skip


def _auto(table: Table) -> Iterator[Finding]:
    link = GIGABIT if GIGABIT in table.links else table.links[0]
    others = ("pmt", "kemari")
    for scenario in table.scenarios:
        if scenario == "idle":
            yield _compare(
                table,
                "idle: auto sends at most 1.2 times what Kemari does (Mbit/s)",
                scenario, link, "mbit_per_s", "auto", ("kemari",), IDLE_BANDWIDTH,
            )  # fmt: skip
            continue
        for figure, what in (
            ("kib_per_work", "KiB sent for a unit of what is done"),
            ("pause_p50_ms", "pause p50, ms"),
        ):
            yield _compare(
                table,
                f"{scenario}: auto at most 1.1 times the better of both ({what})",
                scenario, link, figure, "auto", others, LOADED,
            )  # fmt: skip
        yield _compare(
            table,
            f"{scenario}: auto's output delay is above neither's (p50, ms)",
            scenario, link, "output_delay_p50_ms", "auto", others,
        )  # fmt: skip


def _codecs(table: Table) -> Iterator[Finding]:
    link = GIGABIT if GIGABIT in table.links else table.links[0]
    for scenario, most in SENT.items():
        if scenario in table.scenarios:
            sent = table.mean(scenario, "pmt", link, "sent_per_dirty_byte")
            plain = table.mean(scenario, PLAIN, link, "sent_per_dirty_byte")
            values = ", ".join(
                f"{name} {'-' if value is None else format(value, '.3g')}"
                for name, value in (("pmt", sent), (PLAIN, plain))
            )
            yield Finding(
                f"{scenario}: with codecs PMT sends at most {most:g} bytes for a dirty byte",
                values,
                None if sent is None else sent <= most,
            )
    if PLAIN not in table.strategies:
        return
    for scenario in table.scenarios:
        yield _compare(
            table,
            f"{scenario}: with codecs PMT's commits take no longer (p50, ms)",
            scenario, link, "commit_p50_ms", "pmt", (PLAIN,),
        )  # fmt: skip


def _database(table: Table) -> Iterator[Finding]:
    for scenario in [name for name in DATABASES if name in table.scenarios]:
        for link in table.links:
            for strategy in table.strategies:
                share = table.mean(scenario, strategy, link, "throughput_ratio")
                if share is None and strategy == PLAIN:
                    continue  # measured at one link only
                yield Finding(
                    f"{scenario}, {strategy}, {link_name(link)}: at least half of the unprotected "
                    "throughput",
                    "not measured" if share is None else f"{share:.2f}",
                    None if share is None else share >= DATABASE_SHARE,
                )


def link_name(mbit: int) -> str:
    """For people."""
    if not mbit:
        return "no limit"
    return f"{mbit // 1000} Gbit/s" if mbit % 1000 == 0 else f"{mbit} Mbit/s"
