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

"""Hosts that die at once, in small: everything is decided, once, and mended."""

from __future__ import annotations

from pathlib import Path

import pytest

from nova_pmt import exception
from nova_pmt.bench import managers
from nova_pmt.bench.managers import Options


class Quiet:
    def progress(self, *_: object) -> None:
        pass


SMALL = Options(pairs=60, hosts=10, dead=2, seed=3)


@pytest.fixture(scope="module")
def row() -> dict[str, object]:
    return managers.run(SMALL, Quiet())[0]  # type: ignore[arg-type]


def test_each_side_that_lost_its_peer_is_answered(row: dict[str, object]) -> None:
    affected = len(managers.claims(SMALL, managers.arrange(SMALL)))
    assert affected > 5
    assert (row["affected"], row["decided"], row["lost"]) == (affected, affected, 0)
    assert len(row["decided_s"]) == affected  # type: ignore[arg-type]


def test_all_that_broke_is_protected_again(row: dict[str, object]) -> None:
    both_dead = sum(
        primary < SMALL.dead and standby < SMALL.dead
        for _, primary, standby in managers.arrange(SMALL)
    )
    assert row["repaired"] == row["affected"]
    assert row["states"]["protected"] == SMALL.pairs  # type: ignore[index]
    assert both_dead < SMALL.pairs


def test_a_seed_gives_the_same_again() -> None:
    pairs = managers.arrange(SMALL)
    assert pairs == managers.arrange(SMALL)
    assert managers.claims(SMALL, pairs) == managers.claims(SMALL, pairs)
    assert pairs != managers.arrange(Options(pairs=60, hosts=10, dead=2, seed=4))


def test_both_sides_of_a_pair_never_ask_in_the_simulation() -> None:
    asked = managers.claims(SMALL, managers.arrange(SMALL))
    assert len({claim.uuid for claim in asked}) == len(asked)


def test_a_database_that_is_in_use_is_refused(tmp_path: Path) -> None:
    options = Options(pairs=3, hosts=3, dead=1, connection=f"sqlite:///{tmp_path}/used.sqlite")
    with managers.database(options) as (engine, _):
        managers.fill(engine, options, managers.arrange(options))
    with pytest.raises(exception.ConfigError, match="pairs in it"), managers.database(options):
        pass


def test_the_plot_is_drawn(row: dict[str, object], tmp_path: Path) -> None:
    managers.plot(row, tmp_path / "managers.svg")
    assert b"<svg" in (tmp_path / "managers.svg").read_bytes()
