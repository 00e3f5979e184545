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

"""Agents, message bus and the operator's command, as an operator uses them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nova_pmt.lab import Disk, Lab, LabGuest, LabHost, deployment
from tests.functional.conftest import Boot
from tests.functional.test_disks import IMAGES, leftovers

WAIT_S = 60.0


@pytest.fixture(scope="module")
def agents(lab: Lab) -> Iterator[Lab]:
    """Agents in every host."""
    for host in lab.computes:
        deployment.start_agent(host)
    deployment.wait_agents(lab)
    yield lab
    for host in lab.computes:
        host.processes["nova-pmt-agent"].stop()


def status(lab: Lab, guest: LabGuest) -> list[dict[str, Any]]:
    """What both agents say about a guest's pair."""
    text = deployment.operate(lab, "status", "-f", "json").stdout
    return [pair for pair in json.loads(text)["pairs"] if pair["uuid"] == guest.uuid]


def eventually(wanted: Callable[[], Any]) -> Any:
    """Ask until there is an answer."""
    deadline = time.monotonic() + WAIT_S
    while not (found := wanted()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.2)
    return found


def primary_view(lab: Lab, guest: LabGuest, state: str) -> dict[str, Any] | None:
    """The primary's view of the pair, when it is in this state."""
    for pair in status(lab, guest):
        if pair["role"] == "primary" and pair["state"] == state:
            return pair
    return None


def protected_after(lab: Lab, guest: LabGuest, generation: int) -> dict[str, Any]:
    """The pair when it is protected again, in a later generation."""

    def later() -> dict[str, Any] | None:
        view = primary_view(lab, guest, "protected")
        return view if view and view["generation"] > generation else None

    return dict(eventually(later))


def test_protect_fail_over_and_protect_again(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one)
    number = guest.boot_id()
    deployment.operate(agents, "check", guest.name, "--standby", two.name)
    deployment.operate(agents, "protect", guest.name, "--standby", two.name)
    assert "protected" in deployment.operate(agents, "status").stdout
    assert guest.name in deployment.operate(agents, "top", "--once").stdout
    os.kill(guest.pid, signal.SIGKILL)
    survivor = guest.on(two)
    eventually(lambda: guest.name in two.guests() and not status(agents, guest))
    assert survivor.boot_id() == number
    deployment.operate(agents, "protect", guest.name, "--standby", one.name)
    deployment.operate(agents, "failover", guest.name, "--yes")
    assert guest.on(one).boot_id() == number
    assert guest.verify().startswith("ok")


def test_a_dead_worker_leaves_the_guest_running_and_is_replaced(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one, disks=(Disk(f"{IMAGES}/dead-worker/a.qcow2", size_mib=56),))
    client = guest.transactions(1)
    deployment.operate(agents, "protect", guest.name, "--standby", two.name)
    view = eventually(lambda: primary_view(agents, guest, "protected"))
    generation = view["generation"]
    client.request()
    os.kill(one.outside_pid(view["worker_pid"]), signal.SIGKILL)
    client.request()  # its answer waits until the agent has decided
    again = protected_after(agents, guest, generation)
    assert again["primary_host"] == one.name
    assert client.verify() == 2
    assert guest.verify().startswith("ok")
    assert guest.name in one.guests()
    deployment.operate(agents, "unprotect", guest.name)
    eventually(lambda: not status(agents, guest))


def test_a_restarted_agent_finds_its_guests_and_synchronises_them_again(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one)
    number = guest.boot_id()
    deployment.operate(agents, "protect", guest.name, "--standby", two.name)
    generation = eventually(lambda: primary_view(agents, guest, "protected"))["generation"]
    for stop, host in (("kill", one), ("stop", two)):  # a crash, and an orderly restart
        getattr(host.processes["nova-pmt-agent"], stop)()
        deployment.start_agent(host)
        deployment.wait_agents(agents)
        found = protected_after(agents, guest, generation)
        generation = found["generation"]
        assert found["primary_host"] == one.name
    assert guest.boot_id() == number
    assert guest.verify().startswith("ok")
    deployment.operate(agents, "unprotect", guest.name)


def test_a_host_that_lost_power_comes_back_to_a_pair_that_went_on_without_it(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one)
    number = guest.boot_id()
    deployment.operate(agents, "protect", guest.name, "--standby", two.name)
    one.power_off()
    try:
        eventually(lambda: "standby_active" in deployment.operate(
            agents, "status", "-f", "json", check=False).stdout)  # fmt: skip
        assert guest.on(two).boot_id() == number
    finally:
        one.power_on()
        deployment.start_agent(one)
        deployment.wait_agents(agents)
    assert guest.name not in one.guests()
    assert guest.on(two).verify().startswith("ok")


@pytest.mark.parametrize("step", ["failover.loaded", "failover.claimed", "failover.resumed"])
def test_a_worker_that_dies_after_it_won_does_not_lose_the_guest(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot, step: str
) -> None:
    guest = boot(one)
    number = guest.boot_id()
    two.processes["nova-pmt-agent"].stop()
    deployment.start_agent(two, {"NOVA_PMT_FAULT": f"{step}:kill"})
    deployment.wait_agents(agents)
    try:
        deployment.operate(agents, "protect", guest.name, "--standby", two.name)
        os.kill(guest.pid, signal.SIGKILL)
        survivor = guest.on(two)
        eventually(lambda: "running" in two.run(["virsh", "domstate", guest.name]).stdout)
        assert survivor.boot_id() == number
        assert survivor.verify().startswith("ok")
    finally:
        two.processes["nova-pmt-agent"].stop()
        deployment.start_agent(two)
        deployment.wait_agents(agents)
    assert guest.name in two.guests()


def test_bad_input_is_refused_with_a_cure(agents: Lab, one: LabHost, boot: Boot) -> None:
    guest = boot(one)
    for words, code in (
        (("protect", "no-such-domain", "--standby", "compute2"), "UNKNOWN_DOMAIN"),
        (("protect", guest.name, "--standby", "compute1"), "SAME_HOST"),
        (("unprotect", guest.name), "NOT_PROTECTED"),
        (("protect", guest.name, "--standby", "compute7"), "HOST_UNREACHABLE"),
    ):
        result = deployment.operate(agents, *words, check=False)
        assert result.returncode in (3, 4)
        assert f"error {code}" in result.stderr
        assert "cure:" in result.stderr
    assert not status(agents, guest)


def test_protecting_twice_is_refused(agents: Lab, one: LabHost, two: LabHost, boot: Boot) -> None:
    guest = boot(one)
    deployment.operate(agents, "protect", guest.name, "--standby", two.name)
    result = deployment.operate(agents, "protect", guest.name, "--standby", two.name, check=False)
    assert result.returncode == 3
    assert "ALREADY_PROTECTED" in result.stderr
    deployment.operate(agents, "unprotect", guest.name)


def test_too_little_memory_on_the_standby_is_refused(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    guest = boot(one)
    two.run(["mount", "-o", "remount,size=64m", "/dev/shm"])
    try:
        result = deployment.operate(
            agents, "protect", guest.name, "--standby", two.name, check=False
        )
    finally:
        two.run(["mount", "-o", "remount,size=50%", "/dev/shm"])
    assert result.returncode == 3
    assert "TOO_LITTLE_MEMORY" in result.stderr
    assert guest.name not in two.guests()


def test_a_strangers_image_on_the_standby_is_refused_before_anything_changes(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    path = "/var/lib/libvirt/images/refused.qcow2"
    guest = boot(one, disks=(Disk(path),))
    stranger = two.path(path)
    stranger.parent.mkdir(parents=True, exist_ok=True)
    stranger.write_bytes(b"somebody else's")
    try:
        for verb in ("check", "protect"):
            result = deployment.operate(
                agents, verb, guest.name, "--standby", two.name, check=False
            )
            assert result.returncode == 3
            assert "IMAGE_EXISTS" in result.stdout + result.stderr
        assert guest.name not in two.guests()
        assert stranger.read_bytes() == b"somebody else's"
    finally:
        stranger.unlink()
        one.path(path).unlink(missing_ok=True)


def test_disks_and_devices_that_are_plugged_in(
    agents: Lab, one: LabHost, two: LabHost, boot: Boot
) -> None:
    """Protected again by itself, with what is new; then through failovers, each way."""
    disk, plugged = (
        Disk(f"{IMAGES}/agents/{name}.qcow2", size_mib=56) for name in ("a", "plugged")
    )
    guest = boot(one, disks=(disk,), machine="pc")
    mac = "52:54:00:77:00:02"
    one.run(["qemu-img", "create", "-q", "-f", "qcow2", plugged.path, f"{plugged.size_mib}M"])
    client = guest.transactions(1)
    deployment.operate(agents, "protect", guest.name, "--standby", two.name)
    image = (plugged.path, "vdb", "--driver", "qemu", "--subdriver", "qcow2", "--cache", "none")
    nic = ("bridge", "br-data", "--mac", mac, "--model", "virtio")
    for what, words in (("attach-disk", image), ("attach-interface", nic)):
        one.run(["virsh", what, guest.name, *words, "--live"])
        client.request()

    def covered() -> bool:
        stats = (primary_view(agents, guest, "protected") or {}).get("stats") or {}
        nics = {entry["mac"] for entry in stats.get("network", ())}
        disks = {entry["disk"] for entry in stats.get("disks", ())}
        return nics == {guest.spec.mac, mac} and disks == {"vda", "vdb"}

    eventually(covered)
    for here, there in ((one, two), (two, one)):
        assert guest.control("disk write seq 4 8 vdb").startswith("ok")
        os.kill(guest.on(here).pid, signal.SIGKILL)
        client.request()
        assert client.verify() == len(client.answered)
        eventually(lambda: not status(agents, guest))
        deployment.operate(agents, "protect", guest.name, "--standby", here.name)
        assert guest.name in there.guests()
    deployment.operate(agents, "unprotect", guest.name)
    for each in (disk, plugged):  # the standby cleans up after unprotect has ended
        eventually(lambda each=each: not two.path(each.path).exists())
    for host in one, two:
        eventually(lambda host=host: not leftovers(host, guest))
    assert all(one.path(each.path).exists() for each in (disk, plugged))
    client.request()
    assert client.verify() == len(client.answered)
