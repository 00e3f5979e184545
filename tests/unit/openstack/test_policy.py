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

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nova_pmt.openstack import policy
from nova_pmt.openstack.policy import ACTIVE_MODES, MODE, PROPERTY, STANDBY, Wish, wish

WORDS = st.one_of(st.sampled_from(["", "off", "allowed", "PMT ", *ACTIVE_MODES]), st.text())
NUMBERS = st.one_of(st.integers(-5, 10**9).map(str), st.text(), st.sampled_from(["20", "1e3"]))


@pytest.mark.parametrize("asked", ["", "off", "pmt", "kemari", "auto"])
def test_a_flavor_that_forbids_it_is_the_last_word(asked: str) -> None:
    found = wish({MODE: "off"}, {PROPERTY: asked}, "always")
    assert (found.mode, found.possible) == ("off", False)
    assert bool(found.ignored) == (asked not in ("", "off"))


@pytest.mark.parametrize("mode", ACTIVE_MODES)
def test_a_flavor_that_demands_it_cannot_be_talked_out_of_it(mode: str) -> None:
    assert wish({MODE: mode}, {}).mode == mode
    found = wish({MODE: mode}, {PROPERTY: "off"})
    assert found.mode == mode
    assert f"{MODE}={mode}" in found.ignored
    assert not wish({MODE: mode}, {PROPERTY: mode}).ignored


def test_where_the_flavor_allows_it_the_property_decides() -> None:
    assert wish({MODE: "allowed"}, {PROPERTY: "pmt"}) == Wish("pmt", possible=True)
    for metadata in ({}, {PROPERTY: "off"}):
        found = wish({MODE: "allowed"}, metadata)
        assert (found.wanted, found.prepared, found.ignored) == (False, True, "")


def test_a_flavor_that_says_nothing_leaves_it_to_the_option() -> None:
    found = wish({}, {PROPERTY: "pmt"})
    assert not found.prepared
    assert "the flavor has no ft:mode" in found.ignored
    assert wish({}, {PROPERTY: "pmt"}, "always").mode == "pmt"
    assert wish({}, {}, "always").possible
    assert not wish({MODE: "allowed"}, {PROPERTY: "pmt"}, "never").prepared
    assert wish({MODE: "pmt"}, {}, "never").mode == "pmt", "the option is about properties"


def test_what_is_no_mode_is_told_and_ignored() -> None:
    assert "is none of" in wish({MODE: "allowed"}, {PROPERTY: "yes"}).ignored
    assert "is none of" in wish({MODE: "on"}, {}).ignored
    assert not wish({MODE: "on"}, {PROPERTY: "pmt"}, "always").prepared


def test_numbers_of_the_flavor_reach_the_agents() -> None:
    specs = {MODE: "pmt", "ft:interval_ms": "40", "ft:max_pause_ms": "9", "ft:cache_mib": "256"}
    assert wish(specs, {}).options() == {
        "interval_ms": 40.0,
        "max_pause_ms": 9.0,
        "cache_limit_mib": 256.0,
    }
    assert wish({MODE: "pmt"}, {}).options() == {}
    bad = wish({MODE: "pmt", "ft:interval_ms": "1", "ft:cache_mib": "much"}, {})
    assert bad.options() == {}
    assert "ft:interval_ms=1" in bad.ignored
    assert "ft:cache_mib=much" in bad.ignored


def test_a_standby_is_never_protected_itself() -> None:
    assert wish({MODE: "pmt"}, {STANDBY: "x", PROPERTY: "pmt"}, "always") == Wish()


@given(
    specs=st.dictionaries(st.sampled_from([MODE, *policy.BOUNDS]), WORDS | NUMBERS),
    metadata=st.dictionaries(st.sampled_from([PROPERTY, "name"]), WORDS),
    honour=st.sampled_from(["allowed", "always", "never", "?"]),
)
def test_whatever_is_written_there_the_flavor_decides(
    specs: dict[str, str], metadata: dict[str, str], honour: str
) -> None:
    found = wish(specs, metadata, honour)
    flavor = specs.get(MODE, "").strip().lower()
    if flavor in ACTIVE_MODES:
        assert found.mode == flavor
    if found.wanted and flavor not in ACTIVE_MODES:
        assert metadata[PROPERTY].strip().lower() == found.mode
        assert flavor == "allowed" or (not flavor and honour == "always")
    for name, value in zip(
        policy.BOUNDS, (found.interval_ms, found.max_pause_ms, found.cache_mib), strict=True
    ):
        low, high = policy.BOUNDS[name]
        assert value is None or low <= value <= high
