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


"""A failover in Nova: what the managers do, on computes with our driver."""

from __future__ import annotations

from typing import Any
from unittest import mock

from tests.functional_nova.cloud import Cloud, LibvirtDriver  # isort: skip - first of Nova

from nova import context, objects

from nova_pmt import exception
from nova_pmt.openstack.computeapi import ComputeAPI
from nova_pmt.openstack.nova import bus
from nova_pmt.openstack.nova.standbys import Note


class FailoverTest(Cloud):
    def test_the_running_guest_is_adopted(self) -> None:
        server, standby, domain = self.pair()
        self._run_periodics()
        assert [self.status(one) for one in (server, standby)] == [("ACTIVE", "a"), ("ACTIVE", "b")]
        self.fails_over(server["id"])
        self.force("a", True)
        self._delete_server_allocations(standby["id"])
        with (
            mock.patch.object(LibvirtDriver, "spawn") as spawn,
            mock.patch.object(LibvirtDriver, "power_off") as power_off,
        ):
            server = self.evacuate(server)
        assert not spawn.called
        assert not power_off.called
        assert self.domain("b", server["id"]) is domain
        assert domain.info()[0] == 1
        assert len(self.providers(server)) == 2
        self._run_periodics()
        self._delete_server(standby)
        assert self.domain("b", server["id"]) is domain
        assert list(self.driver("b").notes) == []
        # The source comes back: what it has left is destroyed, and Nova's books are right.
        self.restart_compute_service("a")
        self.equip("a")
        assert self.driver("a").list_instance_uuids() == []
        self.force("a", False)
        assert list(self.providers(server)) == [self.compute_rp_uuids["b"]]
        self._run_periodics()
        assert self.status(server) == ("ACTIVE", "b")
        self._delete_server(server)
        assert self.domain("b", server["id"]) is None
        assert self.driver("b").list_instance_uuids() == []

    def test_a_source_that_lives_is_put_right_without_a_restart(self) -> None:
        server, standby, domain = self.pair()
        self.fails_over(server["id"])
        self.force("a", True)
        server = self.evacuate(server)
        self._delete_server(standby)
        transport = bus.transport(self.driver("a")._conf)
        ComputeAPI(transport, timeout_s=30).finish_evacuations("a")
        self.force("a", False)
        assert list(self.providers(server)) == [self.compute_rp_uuids["b"]]
        assert self.domain("a", server["id"]) is None
        assert self.domain("b", server["id"]) is domain
        # And once more: the server's new standby is on a, which must outlive the same call.
        again = self.standby_of(server, host="a")
        waiting = self.waits("a", server, primary="b")
        ComputeAPI(transport, timeout_s=30).finish_evacuations("a")
        assert self.domain("a", server["id"]) is waiting
        assert self.status(again) == ("ACTIVE", "a")

    def test_a_new_standby_outlives_the_end_of_an_old_evacuation(self) -> None:
        server, standby, _ = self.pair()
        self.fails_over(server["id"])
        self.force("a", True)
        server = self.evacuate(server)
        self._delete_server(standby)
        self.domain("a", server["id"]).destroy()  # its agent did so, when it had lost the pair
        self.domain("a", server["id"]).undefine()
        # (Nova does not schedule to a host that is forced down: the note is written as spawn does.)
        note = Note("00000000-0000-0000-0000-000000000001", server["id"])
        self.driver("a").notes.write(note)
        waiting = self.waits("a", server, primary="b")
        self.restart_compute_service("a")
        self.equip("a")
        assert self.domain("a", server["id"]) is waiting
        assert list(self.providers(server)) == [self.compute_rp_uuids["b"]]
        assert self.driver("a").list_instance_uuids() == [note.standby]

    def test_a_domain_that_waits_is_not_adopted_and_not_touched(self) -> None:
        server, _, domain = self.pair()
        self.force("a", True)
        with mock.patch("nova_pmt.openstack.nova.driver.SETTLE_S", 0.1):
            self.evacuation_fails(server)
        assert self.domain("b", server["id"]) is domain
        assert domain.info()[0] == 1
        assert "still waits" in self.fault(server)

    def test_an_evacuation_waits_for_the_agent_to_decide(self) -> None:
        server, _, domain = self.pair()
        self.force("a", True)
        looks = []

        def sleep(_: float) -> None:
            looks.append(_)
            if len(looks) == 3:
                self.goes_on("b", server["id"])

        self.driver("b").domains._sleep = sleep
        self.evacuate(server)
        assert self.domain("b", server["id"]) is domain

    def test_a_pair_that_may_still_go_on_is_not_booted_anew(self) -> None:
        server, _, _ = self.pair()
        self.stops_waiting("b", server["id"])
        self.force("a", True)
        self.evacuation_fails(server)
        assert "may still go on" in self.fault(server)
        assert self.domain("b", server["id"]) is None

    def test_without_managers_answer_nothing_is_booted_anew(self) -> None:
        server = self.protected()
        self.agents.broken = exception.HostUnreachable("no answer")
        self.force("a", True)
        self.evacuation_fails(server)
        assert "no nova-pmt-manager tells" in self.fault(server)

    def test_a_server_without_a_pair_is_evacuated_as_ever(self) -> None:
        server = self.protected()
        self.force("a", True)
        self.evacuate(server)
        assert self.domain("b", server["id"]) is not None

    def test_an_unprotected_server_is_evacuated_as_ever(self) -> None:
        server = self.boot("a")
        self.force("a", True)
        self.agents.broken = exception.HostUnreachable("never asked")
        self.evacuate(server)
        assert self.domain("b", server["id"]) is not None

    def test_a_standby_deleted_too_early_leaves_the_guest_alone(self) -> None:
        server, standby, domain = self.pair()
        self.fails_over(server["id"])
        self._delete_server(standby)
        assert self.domain("b", server["id"]) is domain
        self._run_periodics()
        assert domain.info()[0] == 1
        self.force("a", True)
        self.evacuate(server)
        assert self.domain("b", server["id"]) is domain
        assert list(self.driver("b").notes) == []

    def test_a_guest_that_went_on_elsewhere_is_not_started_again(self) -> None:
        server, _, domain = self.pair()
        self.fails_over(server["id"])
        self.domain("a", server["id"]).destroy()
        self.tells("a", pairs={})
        self.api.post_server_action(server["id"], {"reboot": {"type": "HARD"}})
        self._wait_for_state_change(server, "ERROR")
        assert "it runs on b" in self.fault(server)
        assert self.domain("a", server["id"]).info()[0] == 5
        assert domain.info()[0] == 1

    # -- helpers --------------------------------------------------------------------------

    def evacuation_fails(self, server: dict[str, Any]) -> None:
        """It is refused before anything is changed: record and ports stay as they were."""
        self.api.post_server_action(server["id"], {"evacuate": {"host": "b"}})
        self._wait_for_migration_status(server, ["failed"])
        self._wait_for_server_parameter(server, {"status": "ACTIVE", "OS-EXT-STS:task_state": None})
        assert self.api.get_server(server["id"])["OS-EXT-SRV-ATTR:host"] == "a"

    def fault(self, server: dict[str, Any]) -> str:
        """What ``openstack server event show`` says."""
        found = objects.InstanceFault.get_latest_for_instance(
            context.get_admin_context(), server["id"]
        )
        return str(found.message)
