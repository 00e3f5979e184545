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

"""The cache follows the state and keeps its limit; the pause does not contain the transfer."""

from __future__ import annotations

import time
from dataclasses import replace

from nova_pmt.lab import LabHost, Workload
from tests.functional.conftest import BUSY, Boot
from tests.functional.pairs import protect


def test_after_a_burst_the_cache_is_back_under_a_quarter_within_30_rounds(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    quiet = Workload(buffer_mib=192)
    guest = boot(one, memory_mib=512, workload=quiet)
    with protect(guest, two, options={"interval_ms": 100}) as pair:
        pair.protected().rounds(10)
        for _ in range(8):  # a busy machine spreads a burst over several rounds
            guest.control("burst 40000")
            stats = pair.rounds(pair.primary.stats["rounds"] + 10)
            if stats["pages"]["max"] >= 20_000:
                break
        assert stats["pages"]["max"] >= 20_000
        peak = max(stats["cache"]["peak_mib"], 1)
        assert peak >= 60
        # 30 rounds after the last large one; statistics come every 0.5 s, that is every 5 rounds
        pair.rounds(stats["rounds"] + 40)
        small = pair.primary.wait_stats(lambda now: now["cache"]["backed_mib"] < peak / 4)
        assert small["rounds"] < stats["rounds"] + 100
        assert small["cache"]["peak_mib"] >= peak


def test_the_limit_holds_and_everything_still_gets_through(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    """40,000 pages are 156 MiB; the cache may have 16."""
    guest = boot(one, memory_mib=512, workload=Workload(buffer_mib=192))
    options = {"interval_ms": 50, "cache_limit_mib": 16}
    with protect(guest, two, options=options) as pair:
        pair.protected().rounds(5)
        guest.control("burst 40000")
        for _ in range(8):
            time.sleep(0.5)
            cache = pair.primary.stats["cache"]
            assert cache["peak_mib"] <= cache["limit_mib"] == 16
        done = pair.primary.stats["committed"]
        pair.primary.wait_stats(lambda stats: stats["committed"] > done + 5)
        pair.primary.command("switchover")
        pair.standby.state("standby_active")
        assert guest.on(two).verify().startswith("ok")


def test_a_slow_link_throttles_and_leaves_the_pause_alone(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    """Figures are for `nova-pmt-bench link`; here: it throttles, within the limit, and commits."""
    # Whole pages, of which no delta can be made.
    guest = boot(one, workload=replace(BUSY, buffer_mib=8, dirty_full=True))
    options = {"interval_ms": 50, "cache_limit_mib": 16}
    with protect(guest, two, options=options) as pair:
        fast = pair.protected().rounds(40)
        one.link("repl").limit(100)
        try:
            pair.primary.wait_stats(lambda stats: stats["throttled_rounds"] >= 5)
            slow = pair.rounds(pair.primary.stats["rounds"] + 10)
        finally:
            one.link("repl").unlimit()
        assert slow["cache"]["peak_mib"] <= 16
        assert slow["commit_ms"]["max"] > 3 * fast["commit_ms"]["p50"]
        # the transfer of 6 MB alone takes 500 ms on that link: it is not in any pause
        assert slow["pause_ms"]["p50"] < 100
        pair.primary.command("switchover")
        pair.standby.state("standby_active")
        assert guest.on(two).verify().startswith("ok")
