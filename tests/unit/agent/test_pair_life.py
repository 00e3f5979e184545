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

"""The life of a pair: who claims, who is destroyed, who begins again."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from nova_pmt import exception
from tests.unit.agent.rig import DISK, UUID, Rig, eventually


def test_protect_starts_a_standby_and_then_a_primary_that_knows_where_it_listens(rig: Rig) -> None:
    pair = rig.api.protect("a", UUID, "b", options={"interval_ms": 20, "max_pause_ms": 2.5})
    assert pair["state"] in ("syncing", "protected")
    assert (pair["primary_host"], pair["standby_host"], pair["role"]) == ("a", "b", "primary")
    eventually(lambda: rig.a.state() == rig.b.state() == "protected")
    assert rig.a.spec("primary")["options"] == {"interval_ms": 20, "max_pause_ms": 2.5}
    assert rig.b.spec("standby")["domain_xml"] == "<domain/>"
    assert rig.a.spec("primary")["pair"] == rig.b.spec("standby")["pair"]


def test_the_standby_is_asked_about_and_told_of_the_disks(rig: Rig) -> None:
    other = {**DISK, "name": "vdb", "path": "/vdb.qcow2", "format": "qcow2", "readonly": True}
    rig.a.host.disks = [dict(DISK), other]
    rig.protect()
    assert rig.b.host.checked_disks == [[DISK, other]]
    assert rig.b.spec("standby")["disks"] == [DISK, other]


def test_a_guest_without_disks_needs_none(rig: Rig) -> None:
    rig.a.host.disks = []
    rig.protect()
    assert rig.b.host.checked_disks == [[]]
    assert rig.b.spec("standby")["disks"] == []


def test_a_standby_host_that_cannot_take_the_disks_is_refused(rig: Rig) -> None:
    rig.b.host.standby_refusals = [exception.TooLittleDisk("4 GiB are missing")]
    with pytest.raises(exception.TooLittleDisk):
        rig.protect()
    assert rig.a.state() is None
    assert rig.a.recorder.events == rig.b.recorder.events == []


def test_generations_grow_with_the_time_so_that_they_grow_across_hosts(rig: Rig) -> None:
    before = int(time.time())
    rig.protect()
    assert rig.generation() >= before
    assert rig.b.parts.generations.last(UUID) == rig.generation()


def test_a_generation_that_was_decided_before_is_never_used_again(rig: Rig) -> None:
    now = int(time.time())
    rig.arbiter.challenge(UUID)
    for generation in range(now, now + 5):
        rig.arbiter.claim(UUID, generation, "standby")
    rig.protect()
    assert rig.generation() >= now + 5


def test_unprotect_leaves_the_guest_running_and_nothing_else(rig: Rig) -> None:
    rig.protect()
    assert rig.api.unprotect("a", UUID)["state"] == "unprotected"
    assert rig.a.host.state() == "running"
    eventually(lambda: rig.b.recent() == "unprotected")
    assert rig.b.host.state() is None
    assert rig.a.record() is None
    assert rig.b.record() is None


def test_a_primary_worker_that_dies_is_claimed_for_and_its_guest_is_protected_again(
    rig: Rig,
) -> None:
    rig.protect()
    first = rig.generation()
    rig.a.host.define(state="paused")  # it died in a pause
    rig.a.kill_worker()
    eventually(lambda: rig.a.state() == "protected" and rig.generation() > first)
    assert rig.arbiter.winner(UUID, first) == "primary"
    assert ("recover", UUID) in rig.a.host.calls
    assert rig.a.host.state() == "running"
    states = rig.a.recorder.states()
    assert [s for s in states if s in ("primary_alone", "reprotecting")][:2] == [
        "primary_alone",
        "reprotecting",
    ]


def test_a_primary_whose_claim_is_lost_is_destroyed(rig: Rig) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    rig.arbiter.claim(UUID, rig.generation(), "standby")
    rig.a.kill_worker()
    eventually(lambda: rig.a.recent() == "standby_active")
    assert ("destroy", UUID) in rig.a.host.calls
    assert rig.a.host.state() == "shut"
    assert rig.a.record() is None


def test_a_host_that_cannot_be_tidied_keeps_no_pair_open(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(uuid: str) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(rig.a.host, "tidy", failing)
    rig.b.behave(standby="hold")
    rig.protect()
    rig.arbiter.claim(UUID, rig.generation(), "standby")
    rig.a.kill_worker()
    eventually(lambda: rig.a.recent() == "standby_active")


def test_no_claim_is_made_for_a_guest_that_died_so_that_its_standby_goes_on(rig: Rig) -> None:
    rig.b.behave(claim_delay_s=0.05)
    rig.protect()
    generation = rig.generation()
    rig.a.host.define(state="shut")
    rig.a.kill_worker()
    eventually(lambda: rig.b.recent() == "standby_active")
    eventually(lambda: rig.a.recent() == "standby_active")
    assert rig.arbiter.winner(UUID, generation) == "standby"
    assert rig.b.host.state() == "running"
    assert ("tidy", UUID) in rig.a.host.calls  # a QEMU that was killed leaves its sockets


def test_without_an_answer_from_libvirt_no_claim_is_made_and_the_state_says_so(rig: Rig) -> None:
    rig.b.behave(claim_delay_s=0.3)
    rig.protect()
    rig.a.host.broken = exception.GuestError("libvirt does not answer")
    rig.a.kill_worker()
    eventually(lambda: rig.a.state() == "undecided")
    eventually(lambda: rig.b.recent() == "standby_active")
    rig.a.host.broken = None
    eventually(lambda: rig.a.recent() == "standby_active")
    assert rig.a.host.state() == "shut"


def test_an_arbiter_that_does_not_answer_is_asked_until_it_does(rig: Rig) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    hidden = rig.arbiter_path.with_name("hidden")
    rig.arbiter_path.rename(hidden)
    rig.a.kill_worker()
    view = eventually(
        lambda: rig.a.state() == "undecided" and rig.api.status("a", UUID)["pairs"][0]
    )
    assert view["last_error"]["code"] == "ARBITER_UNAVAILABLE"
    hidden.rename(rig.arbiter_path)
    eventually(lambda: "primary_alone" in rig.a.recorder.states())


def test_a_standby_worker_that_dies_is_cleaned_up_after_and_the_primary_asks_again(
    rig: Rig,
) -> None:
    rig.protect()
    first = rig.generation()
    rig.b.kill_worker()
    eventually(lambda: rig.a.state() == "protected" and rig.generation() > first)
    assert ("cleanup_standby", UUID) in rig.b.host.calls
    eventually(lambda: rig.b.state() == "protected")


def test_a_standby_whose_worker_died_after_it_won_goes_on(rig: Rig) -> None:
    rig.b.behave(claim_delay_s=0.0, standby="die_after_claim")
    rig.protect()
    rig.a.host.broken = exception.GuestError("libvirt does not answer")
    rig.a.kill_worker()
    eventually(lambda: rig.b.recent() == "standby_active")
    assert rig.b.host.state() == "running"
    assert "it had won" in rig.b.parts.pairs.recent()[0]["reason"]


def test_a_standby_that_won_without_a_loaded_state_is_reported_as_an_error(rig: Rig) -> None:
    rig.b.behave(claim_delay_s=0.0, standby="die_after_claim")
    rig.b.host.loaded = False
    rig.protect()
    rig.a.host.broken = exception.GuestError("libvirt does not answer")
    rig.a.kill_worker()
    eventually(lambda: rig.b.recent() == "error")
    assert "start the server again" in rig.b.parts.pairs.recent()[0]["reason"]
    eventually(lambda: ("error", "nova_pmt.pair.error") in [e[:2] for e in rig.b.recorder.events])


def test_attempts_to_protect_again_back_off_and_are_visible(stopped_rig: Rig) -> None:
    rig = stopped_rig
    rig.a.timing = replace(rig.a.timing, resync_s=0.02, resync_max_s=60)
    rig.start()
    rig.protect()
    rig.b.host.standby_refusals = [exception.TooLittleMemory("1 GiB is missing on b")]
    rig.b.kill_worker()

    def waiting() -> dict | None:
        pairs = rig.api.status("a", UUID)["pairs"]
        return next((p for p in pairs if p["attempts"] >= 4 and p["next_attempt_s"]), None)

    pair = eventually(waiting)
    assert pair["state"] == "primary_alone"
    assert pair["last_error"]["code"] == "TOO_LITTLE_MEMORY"
    wait_s = min(0.02 * 2 ** pair["attempts"], 60)
    assert f"next attempt in {wait_s:g} s" in pair["reason"]
    assert rig.a.host.state() == "running"
    rig.b.host.standby_refusals = []
    eventually(lambda: rig.a.state() == "protected")


def test_unprotect_ends_the_attempts_to_protect_again(stopped_rig: Rig) -> None:
    rig = stopped_rig
    rig.a.timing = replace(rig.a.timing, resync_s=60)
    rig.start()
    rig.protect()
    rig.b.kill_worker()
    eventually(lambda: rig.api.status("a", UUID)["pairs"][0]["next_attempt_s"])
    assert rig.api.unprotect("a", UUID)["state"] == "unprotected"
    assert rig.a.record() is None


def test_without_resync_the_guest_runs_on_alone_and_can_be_protected_anew(
    stopped_rig: Rig,
) -> None:
    rig = stopped_rig
    rig.a.resync = False
    rig.start()
    rig.protect()
    rig.a.kill_worker()
    eventually(lambda: rig.a.recent() == "primary_alone")
    eventually(lambda: rig.b.recent() == "cancelled")
    rig.protect()


def test_no_switchover_begins_while_the_arbiter_cannot_be_asked(rig: Rig) -> None:
    rig.protect()
    away = rig.arbiter_path.rename(rig.arbiter_path.with_name("away"))
    with pytest.raises(exception.ArbiterUnavailable):
        rig.api.failover("a", UUID)
    assert rig.api.status("a", UUID)["pairs"][0]["state"] == "protected"
    away.rename(rig.arbiter_path)
    assert rig.api.failover("a", UUID)["state"] == "standby_active"


def test_switchover_moves_the_guest_and_tells_where_it_runs(rig: Rig) -> None:
    rig.protect()
    done = rig.api.failover("a", UUID)
    assert (done["state"], done["active_host"]) == ("standby_active", "b")
    assert done["details"] == {"switchover_ms": 12}
    assert rig.b.host.state() == "running"
    assert rig.a.host.state() == "shut"
    recent = eventually(lambda: rig.api.status("b", UUID)["recent"])[0]
    assert (recent["state"], recent["primary_host"]) == ("standby_active", "a")


def test_five_moves_back_and_forth(rig: Rig) -> None:
    here, there = rig.a, rig.b
    for _ in range(5):
        rig.api.protect(here.name, UUID, there.name)
        eventually(lambda h=here, t=there: h.state() == t.state() == "protected")
        rig.api.failover(here.name, UUID)
        eventually(lambda h=here, t=there: h.state() is None and t.state() is None)
        here, there = there, here
    assert here is rig.b
    assert rig.b.host.state() == "running"


def test_takeover_needs_force_while_the_primary_is_healthy(rig: Rig) -> None:
    rig.protect()
    with pytest.raises(exception.PrimaryHealthy) as refused:
        rig.api.failover("b", UUID)
    assert "--host a" in refused.value.cure
    done = rig.api.failover("b", UUID, force=True)
    assert done["active_host"] == "b"
    eventually(lambda: rig.a.recent() == "standby_active")
    assert rig.a.host.state() == "shut"


def test_a_restarted_agent_finds_its_guest_and_protects_it_again(rig: Rig) -> None:
    rig.protect()
    first = rig.generation()
    rig.a.stop()
    assert rig.a.record() is not None
    assert rig.a.host.state() == "running"
    rig.a.start()
    eventually(lambda: rig.a.state() == "protected" and rig.generation() > first)


def test_a_restarted_agent_destroys_a_guest_whose_standby_went_on(rig: Rig) -> None:
    rig.b.behave(claim_delay_s=0.0)
    rig.protect()
    rig.a.crash()
    eventually(lambda: rig.b.recent() == "standby_active")
    assert rig.a.host.state() == "running"  # the stale copy
    rig.a.start()
    eventually(lambda: rig.a.recent() == "standby_active")
    assert rig.a.host.state() == "shut"
    assert rig.a.record() is None


def test_a_restarted_agent_claims_before_it_begins_again(rig: Rig) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    first = rig.generation()
    rig.a.crash()
    rig.a.start()
    eventually(lambda: rig.arbiter.winner(UUID, first) == "primary")


def test_a_restarted_agent_forgets_a_guest_that_is_gone(rig: Rig) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    first = rig.generation()
    rig.a.crash()
    rig.a.host.define(state="shut")
    rig.a.start()
    eventually(lambda: rig.a.recent() == "ended")
    assert rig.arbiter.winner(UUID, first) is None


def test_a_restarted_agent_remembers_that_protection_is_not_wanted(rig: Rig) -> None:
    rig.protect()
    entry = rig.a.parts.pairs.get(UUID)
    assert entry is not None
    entry.want("unprotected")
    rig.a.crash()
    rig.a.start()
    eventually(lambda: rig.a.recent() == "unprotected")


def test_a_restarted_agent_cleans_up_a_standby_and_the_primary_asks_again(rig: Rig) -> None:
    rig.protect()
    first = rig.generation()
    rig.b.crash()
    rig.b.start()
    assert ("cleanup_standby", UUID) in rig.b.host.calls
    eventually(lambda: rig.a.state() == "protected" and rig.generation() > first)


@pytest.mark.parametrize(
    ("mode", "code"), [("die_at_once", "WORKER_DIED"), ("refuse", "CERTIFICATE_REFUSED")]
)
def test_a_primary_worker_that_cannot_start_is_undone_worker_first_standby_last(
    rig: Rig, mode: str, code: str
) -> None:
    rig.a.behave(primary=mode)
    order: list[str] = []
    release = rig.a.parts.api.release_standby
    start = rig.a.parts.supervisor.start

    def released(*args: object, **kwargs: object) -> dict:
        order.append("release")
        return release(*args, **kwargs)  # type: ignore[arg-type]

    def started(spec, on_event, on_exit):
        def ended(outcome) -> None:
            order.append("worker ended")
            on_exit(outcome)

        return start(spec, on_event, ended)

    rig.a.parts.api.release_standby = released  # type: ignore[method-assign]
    rig.a.parts.supervisor.start = started  # type: ignore[method-assign]
    with pytest.raises(exception.PmtError) as failed:
        rig.api.protect("a", UUID, "b")
    assert failed.value.code == code
    assert order == ["worker ended", "release"]
    assert rig.a.record() is None
    assert rig.a.host.state() == "running"
    eventually(lambda: rig.b.recent() == "cancelled")
    assert rig.b.host.state() is None


def test_a_primary_worker_that_does_not_begin_in_time_is_ended(stopped_rig: Rig) -> None:
    rig = stopped_rig
    rig.a.timing = replace(rig.a.timing, worker_start_s=0.3)
    rig.start()
    rig.a.behave(primary="mute")
    with pytest.raises(exception.WorkerDied, match="did not begin"):
        rig.api.protect("a", UUID, "b")
    assert rig.a.recent() == "unprotected"
    eventually(lambda: rig.b.recent() == "cancelled")


def test_a_standby_worker_that_cannot_start_fails_protect_and_leaves_nothing(rig: Rig) -> None:
    rig.b.behave(standby="die_at_once")
    with pytest.raises(exception.WorkerDied):
        rig.api.protect("a", UUID, "b")
    assert rig.a.record() is None
    eventually(lambda: rig.b.record() is None)
    rig.b.behave()
    rig.protect()


def test_every_change_is_notified_with_where_it_came_from(rig: Rig) -> None:
    rig.protect()
    rig.api.unprotect("a", UUID)
    eventually(lambda: rig.a.recorder.states()[-1:] == ["unprotected"])
    events = rig.a.recorder.events
    assert rig.a.recorder.states() == ["starting", "syncing", "protected", "unprotected"]
    level, kind, payload = events[2]
    assert (level, kind) == ("info", "nova_pmt.pair.protected")
    assert payload["nova_pmt_object.name"] == "PairPayload"
    assert payload["nova_pmt_object.version"] == "1.0"
    data = payload["nova_pmt_object.data"]
    assert (data["uuid"], data["state"], data["previous_state"]) == (UUID, "protected", "syncing")
    assert (data["host"], data["primary_host"], data["standby_host"]) == ("a", "a", "b")
    assert data["at"].endswith("Z")
    assert events[0][2]["nova_pmt_object.data"]["previous_state"] is None


def test_a_pair_that_is_over_does_not_stand_in_the_way_of_the_next(rig: Rig) -> None:
    rig.protect()
    rig.api.failover("a", UUID)
    assert rig.api.protect("b", UUID, "a")["primary_host"] == "b"


def test_a_standby_of_an_older_generation_makes_room_for_a_newer_one(rig: Rig) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    rig.a.kill_worker()  # its standby still waits for the arbiter when it is replaced
    first = rig.generation()
    eventually(lambda: rig.a.state() == "protected" and rig.generation() > first)
    assert rig.b.spec("standby")["pair"]["generation"] == rig.generation()


def test_an_older_generation_than_what_was_seen_is_refused(rig: Rig) -> None:
    rig.protect()
    pair = {**rig.b.spec("standby")["pair"], "generation": 7}
    with pytest.raises(exception.PairMismatch):
        rig.api.prepare_standby("b", pair=pair, domain_xml="<domain/>", layout=[{}])
    assert rig.a.state() == rig.b.state() == "protected"


def test_a_standby_is_released_only_up_to_its_generation(rig: Rig) -> None:
    rig.protect()
    generation = rig.generation()
    assert rig.api.release_standby("b", uuid=UUID, generation=generation - 1) == {"gone": True}
    assert rig.b.state() == "protected"
    assert rig.api.release_standby("b", uuid=UUID, generation=generation) == {"gone": True}
    assert rig.b.record() is None


@pytest.mark.parametrize("kind", [exception.GuestError, RuntimeError])
@pytest.mark.parametrize("where", ["broken", "stuck"])
def test_a_standby_that_cannot_be_cleaned_up_is_told_of_and_tried_again(
    rig: Rig, where: str, kind: type[Exception]
) -> None:
    rig.protect()
    setattr(rig.b.host, where, kind("libvirt does not answer"))
    rig.b.kill_worker()
    eventually(lambda: rig.b.state() == "undecided")
    entry = rig.b.parts.pairs.get(UUID)
    assert entry is not None
    assert "libvirt does not answer" in entry.reason
    assert rig.b.host.state() == "waiting"
    assert rig.b.record() is not None
    setattr(rig.b.host, where, None)
    eventually(lambda: rig.b.recent() == "cancelled")


def test_an_agent_that_stops_leaves_the_clean_up_to_its_next_life(rig: Rig) -> None:
    rig.protect()
    rig.b.host.stuck = exception.GuestError("domain web1 cannot be ended")
    rig.b.kill_worker()
    eventually(lambda: rig.b.state() == "undecided")
    rig.b.stop()
    assert rig.b.record() is not None
    rig.b.host.stuck = None
    rig.b.start()
    eventually(lambda: rig.b.recent() == "cancelled")


def test_a_standby_whose_worker_died_before_it_claimed_goes_on(rig: Rig) -> None:
    rig.b.behave(standby="die_after_load")
    rig.protect()
    generation = rig.generation()
    rig.a.host.broken = exception.GuestError("libvirt does not answer")  # as good as dead
    rig.a.kill_worker()
    eventually(lambda: rig.b.recent() == "standby_active")
    assert rig.arbiter.winner(UUID, generation) == "standby"
    assert rig.b.host.state() == "running"
    rig.a.host.broken = None
    eventually(lambda: rig.a.recent() == "standby_active")
    assert rig.a.host.state() == "shut"


def test_a_primary_that_lives_is_before_a_standby_whose_worker_died(rig: Rig) -> None:
    rig.b.behave(standby="die_after_load")
    rig.protect()
    generation = rig.generation()
    rig.a.kill_worker()
    eventually(lambda: rig.arbiter.winner(UUID, generation) == "primary")
    eventually(lambda: ("cleanup_standby", UUID) in rig.b.host.calls)
    rig.b.behave()
    eventually(lambda: rig.a.state() == "protected" and rig.generation() > generation)
    assert rig.a.host.state() == "running"
    assert ("destroy", UUID) not in rig.a.host.calls


def test_a_standby_that_has_loaded_waits_for_an_arbiter_that_is_away(rig: Rig) -> None:
    rig.b.behave(standby="die_after_load")
    rig.protect()
    away = rig.arbiter_path.rename(rig.arbiter_path.with_name("away"))
    rig.a.host.broken = exception.GuestError("libvirt does not answer")
    rig.a.kill_worker()
    eventually(lambda: rig.b.state() == "undecided")
    assert rig.b.host.state() == "loaded"
    away.rename(rig.arbiter_path)
    eventually(lambda: rig.b.recent() == "standby_active")
    assert rig.b.host.state() == "running"


def test_a_copy_that_somebody_started_where_its_standby_was_is_told_of_and_left(rig: Rig) -> None:
    """It may be the stale one, or the one that an operator moved here: not for us to say."""
    rig.protect()
    generation = rig.generation()
    rig.b.crash()
    eventually(lambda: rig.arbiter.winner(UUID, generation) == "primary")
    rig.b.host.define()  # by libvirt, when its host came back
    rig.b.start()
    eventually(lambda: rig.b.recent() == "error")
    assert "a copy that is not the standby" in rig.b.parts.pairs.recent()[-1]["reason"]
    assert ("destroy", UUID) not in rig.b.host.calls
    assert rig.a.host.state() == rig.b.host.state() == "running"


def test_nothing_is_said_of_a_guest_that_runs_until_it_is_known_who_won(
    stopped_rig: Rig,
) -> None:
    rig = stopped_rig
    rig.b.timing = replace(rig.b.timing, follow_s=60)
    rig.start()
    rig.b.behave(standby="hold")
    rig.protect()
    generation = rig.generation()
    rig.a.host.broken = exception.GuestError("libvirt does not answer")  # it does not claim
    rig.a.kill_worker()
    rig.b.crash()
    rig.b.host.define()
    rig.b.start()
    eventually(lambda: rig.b.state() == "undecided")
    assert rig.b.host.state() == "running"
    rig.a.host.broken = None
    eventually(lambda: rig.arbiter.winner(UUID, generation) == "primary")
    eventually(lambda: rig.b.recent() == "error")
    assert rig.b.host.state() == "running"


def test_a_guest_that_runs_and_that_nobody_has_won_is_left_alone_in_the_end(rig: Rig) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    rig.a.crash()
    rig.b.crash()
    rig.b.host.define()  # by an operator: both hosts were lost
    rig.b.start()
    eventually(lambda: rig.b.recent() == "standby_active")
    assert rig.b.host.state() == "running"
    assert ("destroy", UUID) not in rig.b.host.calls


def test_a_guest_that_went_on_and_lost_its_agent_stays(rig: Rig) -> None:
    rig.protect()
    rig.arbiter.claim(UUID, rig.generation(), "standby")
    rig.b.crash()
    rig.b.host.define()
    rig.b.start()
    eventually(lambda: rig.b.recent() == "standby_active")
    assert rig.b.host.state() == "running"


def test_an_error_that_nobody_thought_of_does_not_end_the_watch_over_a_primary(rig: Rig) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    rig.a.host.broken = RuntimeError("libvirtd is being restarted")
    rig.a.kill_worker()
    view = eventually(
        lambda: rig.a.state() == "undecided" and rig.api.status("a", UUID)["pairs"][0]
    )
    assert view["last_error"]["code"] == exception.GuestError.code
    assert view["reason"] == "RuntimeError: libvirtd is being restarted"
    rig.a.host.broken = None
    eventually(lambda: "primary_alone" in rig.a.recorder.states())


def test_a_guest_that_stands_still_is_let_run_whatever_its_recovery_fails_with(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    rig.a.host.define(state="paused")
    recover, failures = rig.a.host.recover, [FileNotFoundError("/proc/7"), OSError("no libvirtd")]

    def failing(uuid: str) -> None:
        if failures:
            raise failures.pop()
        recover(uuid)

    monkeypatch.setattr(rig.a.host, "recover", failing)
    rig.a.kill_worker()
    eventually(lambda: "primary_alone" in rig.a.recorder.states())
    assert rig.a.host.state() == "running"
    assert not failures


def test_a_guest_that_lost_is_destroyed_whatever_that_fails_with(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.b.behave(standby="hold")
    rig.protect()
    rig.arbiter.claim(UUID, rig.generation(), "standby")
    destroy, failures = rig.a.host.destroy, [OSError("libvirtd is being restarted")]

    def failing(uuid: str) -> None:
        if failures:
            raise failures.pop()
        destroy(uuid)

    monkeypatch.setattr(rig.a.host, "destroy", failing)
    rig.a.kill_worker()
    eventually(lambda: rig.a.recent() == "standby_active")
    assert rig.a.host.state() == "shut"
    assert "undecided" in rig.a.recorder.states()


def test_a_full_disk_is_a_failed_attempt_to_protect_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.protect()
    first = rig.generation()
    number, failures = rig.a.parts.generations.next, [OSError(28, "No space left on device")]
    reasons: list[str] = []

    def failing(uuid: str) -> int:
        if failures:
            raise failures.pop()
        entry = rig.a.parts.pairs.get(UUID)
        reasons.append(str(entry and entry.last_error))
        return number(uuid)

    monkeypatch.setattr(rig.a.parts.generations, "next", failing)
    rig.b.kill_worker()
    eventually(lambda: rig.a.state() == "protected" and rig.generation() > first)
    assert "No space left on device" in reasons[0]


def test_a_pair_is_over_also_when_its_record_cannot_be_removed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.protect()

    def failing(uuid: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(rig.a.parts.pairs._store, "remove", failing)
    assert rig.api.unprotect("a", UUID)["state"] == "unprotected"
    assert rig.a.state() is None


def test_a_generation_that_was_perhaps_not_announced_is_announced_before_it_is_claimed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent died between writing its record and asking the arbiter to begin."""
    rig.b.behave(standby="hold")
    rig.protect()
    rig.a.crash()
    path = rig.a.path / "pairs" / f"{UUID}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "reprotecting"}))
    asked: list[str] = []
    begin, claim = rig.arbiter.begin, rig.arbiter.claim
    monkeypatch.setattr(rig.arbiter, "begin", lambda one: asked.append("begin") or begin(one))
    monkeypatch.setattr(
        rig.arbiter, "claim", lambda *args, **more: asked.append("claim") or claim(*args, **more)
    )
    rig.a.start()
    eventually(lambda: "claim" in asked)
    assert asked[:2] == ["begin", "claim"]


def test_a_new_standbys_host_is_taken_also_while_an_attempt_with_the_old_one_is_under_way(
    rig: Rig,
) -> None:
    rig.protect()
    entry = rig.a.parts.pairs.get(UUID)
    assert entry is not None
    with pytest.raises(exception.NotReady, match="it gets no new standby"):
        rig.api.move_standby("a", UUID, "b")  # it is protected
    rig.b.host.refusals = [exception.TooLittleMemory("b is full")]
    rig.b.kill_worker()
    eventually(lambda: rig.a.state() == "primary_alone")
    with entry.changed:
        entry.next_attempt = None  # as while an attempt is under way
        rig.b.host.refusals = []
        rig.a.service.move_standby(UUID, "b")  # type: ignore[union-attr]
        assert entry.next_standby == "b"
    eventually(lambda: rig.a.state() == "protected")
    assert entry.next_standby is None
