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
"""A protected server, and what is to be true of one."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from nova_pmt.exception import LabError
from nova_pmt.lab import LabGuest

if TYPE_CHECKING:
    from nova_pmt.lab.openstack import Cloud

#: For one step of an operation, in seconds.
STEP_S = 600.0


class Protected:
    """A server with the property ``ft=pmt``."""

    def __init__(self, cloud: Cloud, uuid: str) -> None:
        self.cloud = cloud
        self.uuid = uuid

    @classmethod
    def create(cls, cloud: Cloud, name: str, **options: Any) -> Protected:
        """A new one; returns when it is protected and answers."""
        options.setdefault("metadata", {"ft": "pmt"})
        created = cloud.create(name, "ft-allowed", **options)
        found = cls(cloud, str(created.id))
        cloud.wait_server(found.uuid, timeout=STEP_S)
        found.guest().wait_ready(STEP_S)
        found.wait_protected()
        return found

    def guest(self) -> LabGuest:
        """What runs in it, where it runs now."""
        return self.cloud.guest(self.cloud.server(self.uuid))

    def act(self, action: str, *arguments: Any, **options: Any) -> Any:
        """One of openstacksdk's calls with a server, as its owner."""
        return getattr(self.cloud.demo.compute, action)(self.uuid, *arguments, **options)

    def wait(self, status: str = "ACTIVE", host: str | None = None) -> Any:
        """Until it has a status."""
        return self.cloud.wait_server(self.uuid, status, host, STEP_S)

    def wait_on(self, host: str) -> Any:
        """Until Nova has it ACTIVE there; it may be in ERROR before: managers try again."""
        deadline = time.monotonic() + STEP_S
        while True:
            server = self.cloud.ask_server(self.uuid, STEP_S)
            seen = (server.status, server.task_state, server.compute_host)
            if seen == ("ACTIVE", None, host):
                return server
            assert time.monotonic() < deadline, seen
            time.sleep(0.25)

    def wait_protected(self) -> None:
        """Until it is ACTIVE, answers, and has a standby that its host sends checkpoints to."""
        self.wait()
        self.cloud.pmt.wait_protected(self.uuid, timeout=STEP_S)
        self.guest().wait_ready(STEP_S)

    def generation(self) -> int:
        """Changes with each new protection."""
        pair = self.cloud.pmt.pair(self.uuid)
        return pair.generation if pair else 0

    def wait_protected_anew(self, before: int) -> None:
        """As :meth:`wait_protected`, of a protection that began after generation ``before``."""
        self.cloud.pmt.wait_pair(
            self.uuid,
            lambda pair: pair.state == "protected" and pair.generation > before,
            "protected anew",
            STEP_S,
        )
        self.wait_protected()

    def wait_unprotected(self) -> None:
        """Until it has no standby."""
        self.cloud.pmt.wait_pair(
            self.uuid, lambda pair: pair.state == "unprotected", "unprotected", STEP_S
        )

    def wait_without_standby(self) -> None:
        """Until it has no standby server either."""
        deadline = time.monotonic() + STEP_S
        while self.standbys():
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def wait_task_over(self, uuid: str) -> None:
        """Until Nova has begun what it was asked for with a server, and is at nothing any more."""
        time.sleep(2)
        deadline = time.monotonic() + STEP_S
        while self.cloud.ask_server(uuid, STEP_S).task_state:
            assert time.monotonic() < deadline
            time.sleep(0.25)

    def stays_protected(self, generation: int) -> None:
        """It is, with the protection that it had, for as long as managers take to think of it."""
        for _ in range(6):
            time.sleep(1)
            pair = self.cloud.pmt.pair(self.uuid)
            assert pair is not None
            assert (pair.state, pair.generation) == ("protected", generation)
        assert len(self.standbys()) == 1

    def standbys(self) -> list[Any]:
        """Its standby servers in Nova."""
        servers = self.cloud.admin.compute.servers(all_projects=True)
        return [s for s in servers if s.metadata.get("pmt:protects") == self.uuid]

    def domains(self) -> dict[str, str]:
        """Hosts with a domain of it, and its state: ``running``, ``paused``, ..."""
        found = {}
        for host in self.cloud.lab.computes:
            done = host.run(["virsh", "domstate", self.uuid], check=False)
            if done.returncode == 0:
                found[host.name] = done.stdout.strip()
        return found

    def running(self) -> list[str]:
        """Hosts on which it runs; it stands still for each checkpoint, so it is looked at anew."""
        deadline = time.monotonic() + STEP_S
        while True:
            found = [host for host, state in self.domains().items() if state == "running"]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def sound(self) -> bool:
        """It is protected now."""
        with contextlib.suppress(Exception):
            pair = self.cloud.pmt.pair(self.uuid)
            server = self.cloud.server(self.uuid)
            return (
                pair is not None
                and pair.state == "protected"
                and server.status == "ACTIVE"
                and not server.task_state
            )
        return False

    def remove(self) -> None:
        """Delete it, whatever state it is in."""
        from openstack.exceptions import SDKException

        with contextlib.suppress(LabError, SDKException):
            self.cloud.admin.compute.delete_server(self.uuid, force=True)
            self.cloud.wait_gone(self.uuid, STEP_S)
