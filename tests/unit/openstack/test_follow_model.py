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

"""Whatever happens, in whatever order: when it is over, each server is as it is to be.

Rules are what users, operators, hosts, services and managers do. Some calls fail, lose their answer
or kill the manager; notifications come or do not. At the end all is put right, time passes, and one
server runs, with at most one standby, where Nova, Neutron and Placement say.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nova_pmt.manager.db import migration
from nova_pmt.openstack import policy
from nova_pmt.openstack.follow import LEASE_S, MAX_BACKOFF_S
from tests.unit.manager.connect import connect
from tests.unit.openstack.cloud import HOSTS, UUID
from tests.unit.openstack.test_follow import World


class Life(RuleBasedStateMachine):
    """Of one server."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = connect("sqlite://")
        self.engine.ask(migration.upgrade)
        self.world = World(self.engine)
        self.cloud = self.world.cloud
        self.managers = [self.world.follower, self.world.manager()]
        self.cloud.boot()
        self.world.go_on(10)  # it is protected: else little of what follows would concern it

    def teardown(self) -> None:
        try:
            self._end()
        finally:
            self.engine.close()

    # -- what happens -------------------------------------------------------------------

    def _there(self) -> bool:
        return UUID in self.cloud.servers_

    def _idle(self) -> bool:
        """Nova lets users do something with it: its guest runs where Nova says."""
        server = self.cloud.servers_.get(UUID)
        if server is None or server.host in self.cloud.dead | self.cloud.forced:
            return False
        return self.cloud.runs.get(UUID) == server.host

    @rule(seconds=st.sampled_from([2, 10, 40]), number=st.integers(0, 1))
    def time_passes(self, seconds: int, number: int) -> None:
        """One manager alone, the other one stands still."""
        running = [self.managers[number]]
        self.world.go_on(seconds, *running)

    @rule()
    def both_managers_are_at_it(self) -> None:
        self.world.go_on(10, *self.managers)

    @precondition(lambda self: self._there())
    @rule(calls=st.integers(0, 25), kind=st.sampled_from(["fail", "lost", "kill"]))
    def it_fails_over_and_a_call_goes_wrong(self, calls: int, kind: str) -> None:
        self.cloud.trouble = (calls, kind)
        if self.cloud.waits.get(UUID) not in self.cloud.dead:
            self.cloud.fail_over()

    @rule(number=st.integers(0, 1))
    def a_notification_comes(self, number: int) -> None:
        self.managers[number].touch(UUID)

    @rule(calls=st.integers(0, 12), kind=st.sampled_from(["fail", "lost", "kill"]))
    def a_call_goes_wrong(self, calls: int, kind: str) -> None:
        self.cloud.trouble = (calls, kind)

    @rule(number=st.integers(0, 1))
    def a_manager_is_started_again(self, number: int) -> None:
        self.managers[number] = self.world.manager()

    @precondition(lambda self: self._there())
    @rule(asked=st.sampled_from([{}, {policy.PROPERTY: "pmt"}, {policy.PROPERTY: "kemari"}]))
    def a_property_is_set(self, asked: dict[str, str]) -> None:
        self.cloud.change(metadata=asked)

    @precondition(lambda self: self._idle())
    @rule(to=st.sampled_from(HOSTS))
    def it_is_migrated(self, to: str) -> None:
        cloud = self.cloud
        if to in cloud.dead | cloud.forced:
            return
        cloud._end(UUID)  # as the driver's guard does
        cloud.change(host=to)
        cloud.allocations[UUID] = {to}
        cloud.runs[UUID] = cloud.bound[UUID] = to

    @precondition(lambda self: self._idle())
    @rule(flavor=st.sampled_from(["small", "large"]))
    def it_is_resized(self, flavor: str) -> None:
        self.cloud._end(UUID)
        self.cloud.change(flavor=flavor)

    @precondition(lambda self: self._idle())
    @rule(status=st.sampled_from(["SHUTOFF", "PAUSED", "SHELVED", "ACTIVE"]))
    def it_is_stopped_or_started(self, status: str) -> None:
        if status not in ("PAUSED", "ACTIVE"):
            self.cloud._end(UUID)
        self.cloud.change(status=status)

    @precondition(lambda self: self._idle())
    @rule(task=st.sampled_from(["", "image_uploading", "powering-off"]))
    def nova_is_at_it(self, task: str) -> None:
        self.cloud.change(task_state=task)

    @precondition(lambda self: self._there())
    @rule(dies=st.booleans(), heard=st.booleans())
    def it_fails_over(self, dies: bool, heard: bool) -> None:
        if self.cloud.waits.get(UUID) in self.cloud.dead:
            return
        if self.cloud.fail_over(dies=dies) and heard:
            self.managers[0].claimed(UUID)

    @rule(host=st.sampled_from(HOSTS))
    def a_host_comes_back(self, host: str) -> None:
        self.cloud.come_back(host)

    @rule(host=st.sampled_from(HOSTS), room=st.integers(0, 2))
    def there_is_more_or_less_room(self, host: str, room: int) -> None:
        self.cloud.room[host] = max(room, self.cloud._used(host))

    @precondition(lambda self: self._idle())
    @rule()
    def it_is_deleted(self) -> None:
        self.cloud.remove()

    # -- what holds ---------------------------------------------------------------------

    @invariant()
    def nova_never_makes_a_second_copy_or_ends_the_first(self) -> None:
        if self._there():
            assert UUID in self.cloud.runs
        for call in ("second", "powers"):
            assert call not in self.cloud.calls

    def _end(self) -> None:
        cloud: Any = self.cloud
        cloud.trouble = None
        for host in HOSTS:
            cloud.room[host] = 4
            cloud.come_back(host)
        if self._there():
            if cloud.servers_[UUID].task_state:
                cloud.change(task_state="")
            if cloud.runs[UUID] == cloud.servers_[UUID].host:
                cloud.change(status="ACTIVE")
        managers = self.managers
        self.world.go_on(LEASE_S + 3 * MAX_BACKOFF_S, *managers, stride=25.0)
        assert cloud.forced == set()
        assert self.world.notes.forced() == {}
        if not self._there():
            assert (cloud.servers_, cloud.allocations) == ({}, {})
            assert self.world.notes.notes() == []
            return
        server = cloud.servers_[UUID]
        assert cloud.runs[UUID] == server.host == cloud.bound[UUID]
        assert cloud.allocations[UUID] == {server.host}
        assert (server.status, server.task_state) == ("ACTIVE", "")
        if policy.wish(server.extra_specs, server.metadata).wanted:
            self.world.demand_protected()
            assert self.world.database.pair(UUID).strategy == server.metadata[policy.PROPERTY]  # type: ignore[union-attr]
        else:
            assert (self.world.standbys(), cloud.waits) == ([], {})


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=20,
    stateful_step_count=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
