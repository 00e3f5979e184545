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

"""A manager comes to a step of a failover, and then it, an agent or nova-compute is killed.

Each manager stops itself (SIGSTOP) when it comes to the step: so the step is under way for sure
when the victim dies. What is left must bring it to its end: the server ACTIVE where it runs, one
domain that runs, its port and its allocation there, and protected again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nova_pmt import faultpoint
from nova_pmt.lab import LabHost, deployment
from nova_pmt.lab.openstack import leftovers
from nova_pmt.lab.openstack.demo import disagreements
from nova_pmt.lab.openstack.talker import Talker
from tests.integration.protected import STEP_S, Protected

if TYPE_CHECKING:
    from nova_pmt.lab.openstack import Cloud
    from nova_pmt.lab.process import LabProcess

STEPS = [
    step
    for step in faultpoint.STEPS
    if step.startswith("nova.") and step not in ("nova.create", "nova.protect")
]
#: Who is killed at which steps: those at which it has, or may have, a part.
VICTIMS = {
    "manager": STEPS,
    "agent": ["nova.rebind", "nova.free", "nova.evacuate", "nova.settle"],
    "nova-compute": ["nova.free", "nova.evacuate", "nova.await", "nova.delete", "nova.settle"],
}


def managers(cloud: Cloud) -> list[LabProcess]:
    return [cloud.lab.ctl.processes[deployment.manager(number)] for number in cloud.pmt.numbers]


def start_managers(cloud: Cloud, fault: str = "") -> None:
    for number in cloud.pmt.numbers:
        cloud.pmt.start_manager(number, {"NOVA_PMT_FAULT": fault} if fault else None)
    for manager in managers(cloud):
        deployment.wait_ready(manager, STEP_S)


@pytest.fixture
def stopping(cloud: Cloud, web: Protected) -> Iterator[Callable[[str], None]]:
    """Managers that stop at a step; afterwards, whatever happened, such as do not."""
    yield lambda step: start_managers(cloud, f"{step}:stop")
    for host in cloud.lab.computes:
        for name, start in (
            ("nova-pmt-agent", cloud.pmt.start_agent),
            ("nova-compute", cloud.start_compute),
        ):
            if not host.processes[name].alive():
                start(host)
    for number in cloud.pmt.numbers:  # the next test waits for its own
        cloud.pmt.start_manager(number)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STEP_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def stopped(process: LabProcess) -> bool:
    return (
        process.alive() and Path(f"/proc/{process.pid}/stat").read_text().rsplit(")")[1][1] == "T"
    )


def wait_stopped(cloud: Cloud) -> LabProcess:
    deadline = time.monotonic() + STEP_S
    while True:
        for manager in managers(cloud):
            if stopped(manager):
                return manager
        assert time.monotonic() < deadline, "no manager came to the step"
        time.sleep(0.05)


def kill(cloud: Cloud, victim: str, host: LabHost, at: LabProcess) -> None:
    """Let it die; what is not the victim goes on. Each is started again, as systemd does it."""
    if victim == "manager":
        at.kill()
    elif victim == "agent":
        host.processes["nova-pmt-agent"].kill()
        cloud.pmt.start_agent(host)
    else:
        host.processes["nova-compute"].kill()
        cloud.start_compute(host)
    if victim == "manager":
        for number in cloud.pmt.numbers:
            if not cloud.lab.ctl.processes[deployment.manager(number)].alive():
                cloud.pmt.start_manager(number)
    else:
        at.go_on()


@contextlib.contextmanager
def going_on(cloud: Cloud) -> Iterator[None]:
    """Each manager has the fault once: whichever comes to the step from now on goes on at once."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            for manager in managers(cloud):
                with contextlib.suppress(OSError, ValueError, IndexError):  # it ends just now
                    if stopped(manager):
                        manager.go_on()

    thread = threading.Thread(target=look, name="going-on", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("step", "victim"), [(step, victim) for victim, steps in VICTIMS.items() for step in steps]
)
def test_killed_at_a_step(
    cloud: Cloud, web: Protected, stopping: Callable[[str], None], step: str, victim: str
) -> None:
    stopping(step)
    web.wait_protected()
    guest, pair = web.guest(), cloud.pmt.pair(web.uuid)
    assert pair is not None
    boot, before = guest.boot_id(), pair.generation
    first, second = cloud.lab.host(pair.primary_host), cloud.lab.host(pair.standby_host)
    with Talker(guest) as talker:
        killed = time.monotonic()
        os.kill(guest.pid, signal.SIGKILL)
        kill(cloud, victim, first if step == "nova.settle" else second, wait_stopped(cloud))
        with going_on(cloud):
            talker.wait_answer(killed, STEP_S)
            web.wait_on(second.name)
            until(
                lambda: not leftovers.attempt(lambda: disagreements(cloud, web.uuid, second.name))
            )
            web.wait_protected_anew(before)
            assert web.guest().boot_id() == boot
            talker.finish()
            cloud.wait_computes(cloud.lab.computes, STEP_S)
            assert web.running() == [second.name]
            until(lambda: [standby.status for standby in web.standbys()] == ["ACTIVE"])
