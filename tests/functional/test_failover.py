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

"""A guest that loses its host goes on, from a whole checkpoint, on the other one."""

from __future__ import annotations

import os
import signal
import time

import pytest

from nova_pmt.lab import LabGuest, LabHost
from nova_pmt.lab.witness import Witness
from tests.functional.conftest import Boot
from tests.functional.pairs import WorkerPair, protect


def kill_qemu(guest: LabGuest) -> float:
    """SIGKILL; returns when (CLOCK_MONOTONIC)."""
    now = time.monotonic()
    os.kill(guest.pid, signal.SIGKILL)
    return now


def fail_over(guest: LabGuest, pair: WorkerPair, to: LabHost) -> LabGuest:
    """Kill QEMU, see the standby go on from the last commit, and check what the guest says."""
    boot = guest.boot_id()
    with Witness(to, guest.uuid) as witness:
        witness.wait_found()
        kill_qemu(guest)
        event = pair.standby.state("standby_active", "cancelled", "error")
        assert event["state"] == "standby_active", event
        pair.primary.state("standby_active")
        survivor = guest.on(to)
        assert survivor.boot_id() == boot
        assert survivor.verify().startswith("ok")
        assert witness.lost_ticks() == 0
        running = event["details"]["running_at"]
        before, after = witness.last_before(running), witness.first_after(running)
        assert before is not None
        assert after is not None
        # From there, and not from somewhere else. (A tick is 10 ms; we may look late.)
        assert after.counter <= before.counter + 20 + (after.at - running) * 100
    return survivor


@pytest.mark.parametrize(
    ("machine", "vcpus", "shared", "vga"),
    [
        ("q35", 1, True, False),
        ("pc", 2, True, True),
        ("q35", 2, False, True),
        ("pc", 1, False, False),
    ],
)
def test_guest_goes_on_and_can_reboot(
    one: LabHost, two: LabHost, boot: Boot, machine: str, vcpus: int, shared: bool, vga: bool
) -> None:
    guest = boot(one, machine=machine, vcpus=vcpus, shared_memory=shared, vga=vga)
    with protect(guest, two) as pair:
        pair.protected().rounds(20)
        survivor = fail_over(guest, pair, two)
    if not vga:  # once for each machine; a reboot under TCG takes a while
        before = survivor.boot_id()
        survivor.reboot()
        assert survivor.boot_id() != before


def test_domain_started_by_plain_virsh_is_protected(one: LabHost, two: LabHost, boot: Boot) -> None:
    """Private memory, no monitor of ours: as any domain is that nobody prepared."""
    guest = boot(one, shared_memory=False, second_monitor=False, persistent=True)
    with protect(guest, two) as pair:
        pair.protected().rounds(10)
        fail_over(guest, pair, two)
    with two.libvirt() as connection:
        domain = connection.lookupByUUIDString(guest.uuid)
        assert domain.isPersistent()
        assert "incoming" not in domain.XMLDesc(2)  # VIR_DOMAIN_XML_INACTIVE: can be started anew


def test_five_failovers_back_and_forth(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    here, there = one, two
    for _ in range(5):
        with protect(guest, there) as pair:
            pair.protected().rounds(5)
            guest = fail_over(guest, pair, there)
        here, there = there, here
    assert guest.host is two


def test_planned_switchover_loses_nothing(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    with protect(guest, two) as pair, Witness(two, guest.uuid) as witness:
        pair.protected().rounds(10)
        counter = guest.counter()
        pair.primary.command("switchover")
        event = pair.standby.state("standby_active")
        assert event["details"]["planned"] is True
        pair.primary.state("standby_active")
        survivor = guest.on(two)
        assert survivor.counter() > counter  # not one tick taken back
        assert survivor.verify().startswith("ok")
        assert witness.lost_ticks() == 0
    assert guest.name not in one.guests()


def test_power_cut_of_the_primary_host(one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    number = guest.boot_id()
    with protect(guest, two) as pair:
        pair.protected().rounds(10)
        one.power_off()
        event = pair.standby.state("standby_active")
        assert event["details"]["epoch"] > 10
    try:
        survivor = guest.on(two)
        assert survivor.boot_id() == number
        assert survivor.verify().startswith("ok")
    finally:
        one.power_on()


def test_guest_that_shuts_down_on_purpose_is_not_failed_over(
    one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one)
    with protect(guest, two) as pair:
        pair.protected().rounds(3)
        one.run(["virsh", "destroy", guest.name])
        assert pair.primary.state("ended", "standby_active")["state"] == "ended"
        assert pair.standby.state("cancelled", "standby_active")["state"] == "cancelled"
    assert guest.name not in two.guests()
