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

"""Whatever dies, breaks or lies: one survivor, from a whole checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nova_pmt import faultpoint
from nova_pmt.lab import Disk, Lab, LabGuest, LabHost, deployment
from nova_pmt.lab.certificates import Authority
from nova_pmt.replication import protocol
from tests.functional.conftest import Boot
from tests.functional.pairs import WorkerPair, protect
from tests.functional.test_disks import IMAGES, claim, leftovers, recover
from tests.functional.wire import Proxy

INSECURE = "/etc/nova_pmt/insecure.conf"
STRANGER = "/etc/nova_pmt/stranger.conf"
RELEASE = "/etc/nova_pmt/release.conf"
DISK = Disk(f"{IMAGES}/faults.qcow2", size_mib=56)


def is_running(guest: LabGuest) -> bool:
    """Whether the guest counts."""
    before, deadline = guest.counter(), time.monotonic() + 10
    while guest.counter() <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_paused(host: LabHost, guest: LabGuest) -> None:
    deadline = time.monotonic() + 10
    while host.run(["virsh", "domstate", guest.name]).stdout.strip() != "paused":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def survivor_of(guest: LabGuest, pair: WorkerPair, one: LabHost, two: LabHost) -> LabGuest:
    """The one domain that goes on; fails when both do, or none."""
    primary = pair.primary.state("primary_alone", "standby_active")["state"]
    standby = pair.standby.state("cancelled", "standby_active")["state"]
    assert (primary, standby) in (("primary_alone", "cancelled"), ("standby_active",) * 2)
    survivor, other = (guest, two) if primary == "primary_alone" else (guest.on(two), one)
    assert guest.name not in other.guests()
    return survivor


@pytest.fixture
def with_disk(one: LabHost, two: LabHost, boot: Boot) -> Iterator[LabGuest]:
    """A guest whose disk has something on it."""
    guest = boot(one, disks=(DISK,))
    guest.control("disk write seq 256 4 vda")
    yield guest
    for host in one, two:
        guest.on(host).destroy()
        host.path(DISK.path).unlink(missing_ok=True)


ROUND_STEPS = [step for step in faultpoint.STEPS if step.startswith("round.")]


def test_primary_worker_killed_at_each_step_of_the_round(
    one: LabHost, two: LabHost, with_disk: LabGuest
) -> None:
    """With its host (QEMU dies, too): the standby goes on from a whole checkpoint."""
    guest, here, there = with_disk, one, two
    client = guest.transactions(1)
    for step in ROUND_STEPS:
        with protect(guest, there, primary_env={"NOVA_PMT_FAULT": f"{step}:kill:9"}) as pair:
            pair.primary.wait(lambda event: event["event"] == "gone", 60)
            pair.protected()
            os.kill(guest.pid, signal.SIGKILL)
            event = pair.standby.state("standby_active", "cancelled")
            assert event["state"] == "standby_active", step
        guest = guest.on(there)
        client.request()
        assert client.verify() == len(client.answered), step
        assert guest.verify().startswith("ok"), step
        assert is_running(guest), step
        here, there = there, here


SYNC_STEPS = [step for step in faultpoint.STEPS if step.startswith("sync.")]


def test_primary_worker_killed_in_the_first_synchronisation(
    one: LabHost, two: LabHost, with_disk: LabGuest
) -> None:
    """Nothing is committed, so the standby ends, with its images; the guest never notices."""
    guest = with_disk
    for step in SYNC_STEPS:
        with protect(guest, two, primary_env={"NOVA_PMT_FAULT": f"{step}:kill"}) as pair:
            pair.primary.wait(lambda event: event["event"] == "gone", 60)
            assert pair.standby.state("cancelled", "standby_active")["state"] == "cancelled", step
            claim(pair)
            recover(guest)
        assert is_running(guest), step
        assert guest.name not in two.guests(), step
        assert not leftovers(two, guest), step
        assert not two.path(DISK.path).exists(), step


@pytest.mark.parametrize(
    "step", [step for step in faultpoint.STEPS if step.startswith("switchover.")]
)
def test_primary_worker_killed_in_a_planned_switchover(
    one: LabHost, two: LabHost, boot: Boot, step: str
) -> None:
    """The guest is paused then: the standby goes on, with the final checkpoint if it is whole."""
    guest = boot(one)
    with protect(guest, two, primary_env={"NOVA_PMT_FAULT": f"{step}:kill"}) as pair:
        pair.protected().rounds(3)
        pair.primary.command("switchover")
        pair.primary.wait(lambda event: event["event"] == "gone")
        wait_paused(one, guest)
        pair.standby.state("standby_active")
        one.run(["virsh", "destroy", guest.name])  # what its agent does, having lost the pair
    survivor = guest.on(two)
    assert survivor.verify().startswith("ok")
    assert is_running(survivor)


STANDBY_STEPS = [step for step in faultpoint.STEPS if step.startswith("standby.")]


def test_standby_worker_killed_at_each_step_of_a_commit(
    one: LabHost, two: LabHost, with_disk: LabGuest
) -> None:
    guest = with_disk
    client = guest.transactions(1)
    for step in STANDBY_STEPS:
        often = 150 if step == "standby.staging" else 8  # checkpoint 1 alone is 110 frames
        with protect(guest, two, standby_env={"NOVA_PMT_FAULT": f"{step}:kill:{often}"}) as pair:
            pair.primary.state("primary_alone")
            assert is_running(guest), step
        two.run(["virsh", "destroy", guest.name])  # what the agent of a dead worker does
        client.request()
        assert client.verify() == len(client.answered), step


#: Before it has claimed: a primary that lives goes on.
TAKEOVER_STEPS = ["failover.detected", "failover.disks", "failover.loaded"]


def test_standby_worker_killed_before_it_claims(
    one: LabHost, two: LabHost, with_disk: LabGuest
) -> None:
    guest = with_disk
    for step in TAKEOVER_STEPS:
        with protect(guest, two, standby_env={"NOVA_PMT_FAULT": f"{step}:kill"}) as pair:
            pair.protected().rounds(3)
            one.link("repl").down()
            try:
                pair.standby.wait(lambda event: event["event"] == "gone")
                pair.primary.state("primary_alone")
            finally:
                one.link("repl").up()
        two.run(["virsh", "destroy", guest.name])
        assert is_running(guest), step


def test_a_failure_in_the_pause_leaves_the_guest_running(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one)
    for step in ("round.paused", "round.scanned", "round.copied", "round.saved"):
        with protect(guest, two, primary_env={"NOVA_PMT_FAULT": f"{step}:fail:5"}) as pair:
            assert pair.primary.error()["code"] == "FAULT_INJECTED"
            pair.primary.state("primary_alone")
            pair.standby.state("cancelled")
            assert is_running(guest), step


def test_partition_leaves_exactly_one(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    with protect(guest, two) as pair:
        pair.protected().rounds(5)
        one.link("repl").down()
        try:
            assert is_running(survivor_of(guest, pair, one, two))
        finally:
            one.link("repl").up()


def test_without_peer_and_arbiter_nobody_goes_on(
    lab: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one)
    arbiter = lab.ctl.path(deployment.ARBITER)
    away = arbiter.with_name("away")
    with protect(guest, two) as pair:
        pair.protected().rounds(5)
        arbiter.rename(away)
        one.link("repl").down()
        try:
            assert pair.primary.wait(
                lambda event: event.get("error", {}).get("code") == "ARBITER_UNAVAILABLE"
            )
            pair.standby.wait(
                lambda event: event.get("error", {}).get("code") == "ARBITER_UNAVAILABLE"
            )
            states = [host.run(["virsh", "domstate", guest.name]).stdout for host in (one, two)]
            assert [state.strip() for state in states] == ["paused", "paused"]
        finally:
            away.rename(arbiter)
            one.link("repl").up()
        assert is_running(survivor_of(guest, pair, one, two))


def test_an_operator_may_choose_that_the_primary_goes_on(
    lab: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    """``on_isolation = release``, for who fences otherwise. The standby asks on all the same."""
    for host in lab.computes:
        text = host.path(deployment.CONFIG).read_text()
        text = text.replace("[arbiter]\n", "[arbiter]\non_isolation = release\n")
        host.path(RELEASE).write_text(text)
    guest = boot(one)
    arbiter = lab.ctl.path(deployment.ARBITER)
    away = arbiter.with_name("away")
    with protect(guest, two, config=RELEASE) as pair:
        pair.protected().rounds(5)
        arbiter.rename(away)
        one.link("repl").down()
        try:
            pair.primary.state("primary_alone")
            assert guest.verify().startswith("ok"), "it answers: its output is let go"
            pair.standby.wait(
                lambda event: event.get("error", {}).get("code") == "ARBITER_UNAVAILABLE"
            )
            state = two.run(["virsh", "domstate", guest.name]).stdout.strip()
            assert state == "paused"
            guest.on(two).destroy()  # as who fences otherwise sees to
        finally:
            away.rename(arbiter)
            one.link("repl").up()
        assert is_running(guest)


def _variant(lab: Lab, path: str, tls: str) -> None:
    for host in lab.computes:
        text = host.path(deployment.CONFIG).read_text()
        host.path(path).write_text(f"{text}[tls]\n{tls}\n")


@pytest.mark.parametrize("megabytes", [1, 90, 91.5])
def test_a_flipped_bit_is_found_without_tls(
    lab: Lab, one: LabHost, two: LabHost, boot: Boot, megabytes: float
) -> None:
    """In the first synchronisation and in rounds: thrown away whole, and the primary goes on."""
    _variant(lab, INSECURE, "insecure = true")
    guest = boot(one)
    with (
        Proxy(one, flip_at=int(megabytes * 1e6)) as proxy,
        protect(guest, two, config=INSECURE, endpoint=proxy.endpoint) as pair,
    ):
        codes = {"CHECKPOINT_CORRUPT", "PROTOCOL_MISMATCH"}
        assert pair.primary.error(60)["code"] in codes
        assert pair.standby.error()["code"] in codes
        pair.primary.state("primary_alone")
        pair.standby.state("cancelled")
        assert is_running(guest)
    assert guest.name not in two.guests()


def test_a_flipped_bit_is_found_by_tls(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    with (
        Proxy(one, flip_at=90_000_000) as proxy,
        protect(guest, two, endpoint=proxy.endpoint) as pair,
    ):
        assert pair.primary.error(60)["code"] == "PEER_LOST"
        assert is_running(survivor_of(guest, pair, one, two))


def test_a_checkpoint_cut_short_is_thrown_away(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    with (
        Proxy(one, cut_at=95_000_000) as proxy,
        protect(guest, two, endpoint=proxy.endpoint) as pair,
    ):
        pair.primary.error(60)
        survivor = survivor_of(guest, pair, one, two)
        assert survivor.verify().startswith("ok")
        assert is_running(survivor)


def test_a_certificate_of_another_authority_is_refused(
    lab: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    directory = "/etc/nova_pmt/stranger"
    stranger = Authority()
    names = {host.name: stranger.issue(host.name, [host.repl_ip]) for host in lab.computes}
    stranger.install(one.path(directory), names[one.name])
    files = "\n".join(
        f"{option} = {directory}/{name}.pem"
        for option, name in (("ca_file", "ca"), ("cert_file", "cert"), ("key_file", "key"))
    )
    _variant(lab, STRANGER, "")
    one.path(STRANGER).write_text(f"{one.path(deployment.CONFIG).read_text()}[tls]\n{files}\n")
    guest = boot(one)
    with protect(guest, two, config=STRANGER) as pair:
        error = pair.primary.error()
        assert error["code"] == "CERTIFICATE_REFUSED"
        assert "[tls]" in error["cure"]
        pair.primary.state("error")
    assert is_running(guest)


@pytest.mark.parametrize("changes", [{"generation": 1}, {"primary_host": "compute9"}])
def test_another_pair_or_generation_is_refused(
    one: LabHost, two: LabHost, boot: Boot, changes: dict[str, object]
) -> None:
    guest = boot(one)
    with protect(
        guest,
        two,
        alter_pair=lambda pair: replace(pair, **changes),  # type: ignore[arg-type]
    ) as pair:
        assert pair.standby.error()["code"] == "PAIR_MISMATCH"
        assert pair.primary.error()["code"] == "PAIR_MISMATCH"
        pair.primary.state("error")
    assert is_running(guest)


def test_another_protocol_version_is_refused(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    directory = os.path.join(os.path.dirname(__file__), "other_version")
    with protect(guest, two, primary_env={"PYTHONPATH": directory}) as pair:
        assert pair.standby.error()["code"] == "PROTOCOL_MISMATCH"
        error = pair.primary.error()
        assert error["code"] == "PROTOCOL_MISMATCH"
        assert str(protocol.VERSION) in error["message"]
    assert is_running(guest)


def test_a_standby_that_lies_about_its_checksums_is_found_out(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    """It says that it has what it has not looked at: nothing is let out for that."""
    guest = boot(one)
    number = guest.boot_id()
    directory = os.path.join(os.path.dirname(__file__), "liar")
    with protect(guest, two, standby_env={"PYTHONPATH": directory}) as pair:
        assert "another checksum" in pair.primary.error(60)["message"]
        survivor = survivor_of(guest, pair, one, two)
        assert survivor.boot_id() == number
        assert survivor.verify().startswith("ok")


def test_a_primary_that_takes_long_to_begin_is_not_taken_for_dead(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    """Longer than peer_timeout_ms, between its handshake and its first frame."""
    guest = boot(one)
    directory = os.path.join(os.path.dirname(__file__), "slow_start")
    with protect(guest, two, primary_env={"PYTHONPATH": directory}) as pair:
        pair.protected().rounds(3)
        assert is_running(guest)
