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

"""Managers decide and repair: three hosts with agents, two managers over one database."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_pmt.agent import presence
from nova_pmt.lab import GuestSpec, Lab, LabGuest, LabHost, deployment
from tests.functional.test_agents import eventually, leftovers

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cloud() -> Iterator[Lab]:
    """Three hosts with agents, and two managers."""
    with Lab(computes=3) as lab:
        # All that is ever logged: test_no_log_has_a_secret looks through it.
        everything = {"default_log_levels": "amqp=DEBUG,oslo.messaging=DEBUG,oslo_messaging=DEBUG"}
        deployment.configure(
            lab, debug=True, extra={**deployment.WITH_MANAGERS, "DEFAULT": everything}
        )
        deployment.start_managers(lab, 2)
        for host in lab.computes:
            deployment.start_agent(host)
        deployment.wait_agents(lab)
        yield lab


@pytest.fixture
def guest(cloud: Lab) -> Iterator[LabGuest]:
    """A guest of the first host; wherever it is at the end, it is ended there."""
    spec = GuestSpec(f"managed-{time.monotonic_ns():x}")
    guest = cloud.computes[0].boot(spec).wait_ready(120)
    yield guest
    deployment.operate(cloud, "unprotect", guest.name, check=False)
    for host in cloud.computes:
        if host.powered and guest.name in host.guests():
            guest.on(host).destroy()
        if host.powered:  # a standby cleans up after unprotect has ended
            eventually(lambda host=host: not leftovers(host, guest))


def pair(lab: Lab, guest: LabGuest) -> dict[str, Any]:
    """The guest's pair, as the managers know it."""
    rows = json.loads(deployment.operate(lab, "pairs", "-f", "json").stdout)["pairs"]
    return next((dict(row) for row in rows if row["uuid"] == guest.uuid), {})


def protected_again(lab: Lab, guest: LabGuest, generation: int) -> dict[str, Any]:
    """The pair when it is protected in a later generation."""

    def later() -> dict[str, Any] | None:
        row = pair(lab, guest)
        good = row and row["state"] == "protected" and row["generation"] > generation
        return row if good else None

    return dict(eventually(later))


def protect(lab: Lab, guest: LabGuest, standby: LabHost) -> int:
    """Protect it; the generation, once the managers know."""
    deployment.operate(lab, "protect", guest.name, "--standby", standby.name)
    return int(protected_again(lab, guest, 0)["generation"])


def test_a_guest_that_failed_over_is_protected_again_by_itself(cloud: Lab, guest: LabGuest) -> None:
    number = guest.boot_id()
    one, two, _ = cloud.computes
    generation = protect(cloud, guest, two)
    os.kill(guest.pid, signal.SIGKILL)
    found = protected_again(cloud, guest, generation)
    assert found["primary_host"] == two.name
    assert found["standby_host"] == one.name, "it holds what is left of the old arrangement"
    assert guest.on(two).boot_id() == number
    assert guest.on(two).verify().startswith("ok")
    events = json.loads(deployment.operate(cloud, "events", guest.name, "-f", "json").stdout)
    steps = [event["new"] for event in events["events"] if event["kind"] != "refused"]
    assert steps[0] == "checking"
    assert [step for step in steps if step in ("failing_over", "standby_active")] == [
        "failing_over",
        "standby_active",
    ]


def test_a_standby_whose_host_is_gone_is_made_elsewhere(cloud: Lab, guest: LabGuest) -> None:
    _, two, three = cloud.computes
    generation = protect(cloud, guest, two)
    two.power_off(silent=True)
    try:
        found = protected_again(cloud, guest, generation)
        assert found["standby_host"] == three.name
        assert guest.verify().startswith("ok")
    finally:
        two.power_on()
        deployment.start_agent(two)
        deployment.wait_agents(cloud)
    eventually(lambda: guest.name not in two.guests())


def test_a_host_that_comes_back_gives_up_what_it_lost(cloud: Lab, guest: LabGuest) -> None:
    """It stood still, its guest in the middle of its run, while the standby went on."""
    one, two, _ = cloud.computes
    number = guest.boot_id()
    generation = protect(cloud, guest, two)
    one.freeze()
    try:
        eventually(lambda: pair(cloud, guest)["state"] == "standby_active" or
                   pair(cloud, guest)["primary_host"] == two.name)  # fmt: skip
        assert guest.on(two).boot_id() == number
    finally:
        one.thaw()
    eventually(lambda: guest.name not in one.guests() or pair(cloud, guest)["state"] == "protected")
    found = protected_again(cloud, guest, generation)
    assert found["primary_host"] == two.name
    assert guest.on(two).boot_id() == number


def test_one_manager_of_two_is_enough(cloud: Lab, guest: LabGuest) -> None:
    _, two, _ = cloud.computes
    number = guest.boot_id()
    generation = protect(cloud, guest, two)
    victim = cloud.ctl.processes["nova-pmt-manager-1"]
    victim.kill()
    try:
        os.kill(guest.pid, signal.SIGKILL)
        assert protected_again(cloud, guest, generation)["primary_host"] == two.name
        assert guest.on(two).boot_id() == number
    finally:
        del cloud.ctl.processes["nova-pmt-manager-1"]
        deployment.start_manager(cloud, 1)


def test_nobody_goes_on_while_nobody_can_be_asked(cloud: Lab, guest: LabGuest) -> None:
    _, two, _ = cloud.computes
    number = guest.boot_id()
    generation = protect(cloud, guest, two)
    managers = [p for tag, p in cloud.ctl.processes.items() if tag.startswith("nova-pmt-manager")]
    for manager in managers:
        manager.signal(signal.SIGSTOP)
    try:
        assert guest.verify().startswith("ok"), "protection goes on without them"
        os.kill(guest.pid, signal.SIGKILL)
        eventually(lambda: two.processes["nova-pmt-agent"].said("ARBITER_UNAVAILABLE"))
        state = two.run(["virsh", "domstate", guest.name]).stdout
        assert "running" not in state
    finally:
        for manager in managers:
            manager.go_on()
    assert protected_again(cloud, guest, generation)["primary_host"] == two.name
    assert guest.on(two).boot_id() == number


def open_to_others(top: Path) -> list[str]:
    """What is below a directory that others than owner and group can read, change or list."""
    found = []
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        if not directory.stat().st_mode & stat.S_IXOTH:
            continue  # nobody else gets in
        for path in directory.iterdir():
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                waiting.append(path)
                mode &= ~stat.S_IXOTH
            if mode & 0o007 and not stat.S_ISLNK(mode):
                found.append(f"{path} {stat.filemode(mode)}")
    return found


def test_what_is_on_the_hosts_is_for_its_owner_alone(cloud: Lab, guest: LabGuest) -> None:
    """Sockets, device states, records, the managers' database: while it is protected."""
    _, two, _ = cloud.computes
    protect(cloud, guest, two)
    seen = 0
    for host in cloud.hosts:
        for name in ("/run/nova_pmt", "/var/lib/nova_pmt"):
            top = host.path(name)
            if top.exists():
                seen += 1
                # nova-compute, another user, reads what the agent says of itself.
                public = f"{top / presence.FILE} -rw-r--r--"
                assert set(open_to_others(top)) <= {public}
    assert seen >= 4


def test_no_log_has_a_secret(cloud: Lab, guest: LabGuest) -> None:
    """The bus's password and the hosts' keys, although everything is logged (debug)."""
    one, two, _ = cloud.computes
    generation = protect(cloud, guest, two)
    os.kill(guest.pid, signal.SIGKILL)
    protected_again(cloud, guest, generation)
    secrets = [cloud.transport_url.split("@")[0].rpartition(":")[2]]
    for host in (one, two):
        secrets += host.path("/etc/nova_pmt/tls/key.pem").read_text().splitlines()[1:-1]
    assert min(map(len, secrets)) > 8
    logs = [path for path in cloud.ctl.log_directory.rglob("*") if path.is_file()]
    for host in cloud.hosts:
        top = host.path("/var/log/nova_pmt")
        logs += [path for path in top.rglob("*") if path.is_file()]
    text = "".join(path.read_text(errors="replace") for path in logs if "rabbit" not in path.name)
    assert "DEBUG" in text
    assert [secret for secret in secrets if secret in text] == []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert not [secret for secret in secrets if secret in words]


def test_a_host_is_emptied_for_maintenance_with_nothing_lost(cloud: Lab, guest: LabGuest) -> None:
    one, two, three = cloud.computes
    number = guest.boot_id()
    generation = protect(cloud, guest, two)
    connection = guest.connect()
    try:
        connection.sendall(b"before")
        assert connection.recv(16) == b"before"
        done = deployment.operate(cloud, "evacuate-host", one.name)
        assert "1 guests moved, 0 left" in done.stdout
        assert f"moves, {one.name} -> {two.name}" in done.stderr
        connection.sendall(b"after")
        assert connection.recv(16) == b"after", "the same connection"
        assert guest.on(two).boot_id() == number
        assert guest.name not in one.guests() or pair(cloud, guest)["standby_host"] != one.name
        found = protected_again(cloud, guest, generation)
        assert found["primary_host"] == two.name
        assert found["standby_host"] == three.name, "a host in maintenance gets no standby"
    finally:
        connection.close()
        deployment.operate(cloud, "maintenance", one.name, "off")
