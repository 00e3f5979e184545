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


"""Protected servers, their standby servers and all others, through Nova's API."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from unittest import mock

import nova.conf
from nova import exception as nova_exception
from nova.tests import fixtures as nova_fixtures

from nova_pmt import exception
from nova_pmt.openstack import policy
from nova_pmt.standby.domainxml import QEMU_NS
from tests.functional_nova.cloud import Cloud, LibvirtDriver


class ServersTest(Cloud):
    def directory_of(self, server: dict[str, Any]) -> Path:
        return Path(nova.conf.CONF.instances_path) / server["id"]

    def fault(self, server: dict[str, Any]) -> str:
        return str(self.api.get_server(server["id"])["fault"]["message"])

    def test_a_standby_server_has_no_domain_and_makes_what_the_agents_one_needs(self) -> None:
        server = self.protected(networks="auto")
        with mock.patch.object(self.driver("b").vif_driver, "plug") as plug:
            standby = self.standby_of(server)
        assert self.driver("b").list_instance_uuids() == []
        ports = [one["port_id"] for one in self.api.get_port_interfaces(server["id"])]
        assert len(ports) == 1
        assert [call.args[1]["id"] for call in plug.call_args_list] == ports
        assert {call.args[0].uuid for call in plug.call_args_list} == {server["id"]}
        assert self.directory_of(server).is_dir()
        self.waits("b", server)
        assert self.driver("b").list_instance_uuids() == [standby["id"]]
        self._run_periodics()
        assert self.status(standby) == ("ACTIVE", "b")
        assert self.status(server) == ("ACTIVE", "a")
        # An operator may look at it, but not stop or move it.
        self.api.post_server_action(standby["id"], {"os-stop": None})
        self._wait_for_server_parameter(standby, {"OS-EXT-STS:task_state": None})
        self._wait_until_fault(standby, "cannot be stopped")
        assert self.status(standby) == ("ACTIVE", "b")
        # Its end: the agent ends the domain, then all is taken away.
        with mock.patch.object(self.driver("b").vif_driver, "unplug") as unplug:
            self._delete_server(standby)
        assert self.agents.asked("release_standby") == [("b", server["id"])]
        assert [call.args[1]["id"] for call in unplug.call_args_list] == ports
        assert not self.directory_of(server).exists()
        assert self.domain("b", server["id"]) is None
        assert list(self.driver("b").notes) == []
        assert self.domain("a", server["id"]) is not None

    def _wait_until_fault(self, server: dict[str, Any], text: str) -> None:
        actions = self.api.get_instance_actions(server["id"])
        stop = next(one for one in actions if one["action"] == "stop")
        path = f"/servers/{server['id']}/os-instance-actions/{stop['request_id']}"
        for _ in range(120):
            events = self.api.api_get(path).body["instanceAction"]["events"]
            if any(event["result"] == "Error" for event in events):
                assert any(text in str(event.get("details")) for event in events)
                return
            time.sleep(0.5)
        raise AssertionError(f"nobody said {text!r}")

    def test_what_fails_is_undone(self) -> None:
        server = self.protected(networks="auto")
        driver = self.driver("b")
        failure = nova_exception.VirtualInterfacePlugException("no bridge")
        with (
            mock.patch.object(driver.vif_driver, "plug", side_effect=failure),
            mock.patch.object(driver.vif_driver, "unplug") as unplug,
        ):
            body = self._build_server(host="b", networks="none")
            body["metadata"] = {policy.STANDBY: server["id"]}
            created = self.api.post_server({"server": body})
            self._wait_for_state_change(created, "ERROR")
        assert unplug.called
        assert not self.directory_of(server).exists()
        assert list(driver.notes) == []

    def test_a_standby_is_not_on_the_host_of_its_server(self) -> None:
        server = self.protected()
        body = self._build_server(host="a", networks="none")
        body["metadata"] = {policy.STANDBY: server["id"]}
        created = self.api.post_server({"server": body})
        self._wait_for_state_change(created, "ERROR")
        assert list(self.driver("a").notes) == []
        assert self.domain("a", server["id"]).info()[0] == 1

    def test_a_user_cannot_make_a_standby_of_another_ones_server(self) -> None:
        server = self.protected()
        self.driver("b").standbys._users = frozenset({"somebody else"})
        mine = self.boot("b", metadata={policy.STANDBY: server["id"]})
        assert self.domain("b", mine["id"]).info()[0] == 1
        assert list(self.driver("b").notes) == []
        assert self.driver("b").list_instance_uuids() == [mine["id"]]
        self._delete_server(mine)
        assert self.domain("b", mine["id"]) is None
        assert self.domain("a", server["id"]).info()[0] == 1

    def test_a_protected_server_is_unprotected_before_it_stops(self) -> None:
        server, standby, _ = self.pair()
        order = []
        plain = LibvirtDriver.power_off

        def power_off(*args: Any, **kwargs: Any) -> None:
            order.append(("power_off", list(self.agents.calls)))
            plain(*args, **kwargs)

        with mock.patch.object(LibvirtDriver, "power_off", power_off):
            self._stop_server(server)
        assert order == [("power_off", [("unprotect", "a", server["id"])])]
        assert self.domain("b", server["id"]) is None  # the agents did that
        self._start_server(server)
        assert self.status(standby) == ("ACTIVE", "b")
        self._delete_server(server)
        self._delete_server(standby)
        assert self.driver("a").list_instance_uuids() == []
        assert self.driver("b").list_instance_uuids() == []

    def test_a_protected_server_is_unprotected_before_it_is_given_a_volume(self) -> None:
        cinder = self.useFixture(nova_fixtures.CinderFixture(self))
        server, standby, _ = self.pair()
        order = []

        def attach(*args: Any, **kwargs: Any) -> None:
            order.append(("attach", list(self.agents.calls)))

        volume = cinder.IMAGE_BACKED_VOL
        with mock.patch.object(LibvirtDriver, "attach_volume", attach):
            self.api.post_server_volume(server["id"], {"volumeAttachment": {"volumeId": volume}})
            self._wait_for_instance_action_event(
                server, "attach_volume", "compute_attach_volume", "success"
            )
        assert order == [("attach", [("unprotect", "a", server["id"])])]
        assert self.status(server) == ("ACTIVE", "a")
        # A standby server gets none.
        self.api.post_server_volume(
            standby["id"], {"volumeAttachment": {"volumeId": cinder.SWAP_OLD_VOL}}
        )
        event = self._wait_for_instance_action_event(
            standby, "attach_volume", "compute_attach_volume", "error"
        )
        assert "raise refused(" in event["traceback"]
        assert self.status(standby) == ("ACTIVE", "b")

    def test_protection_that_does_not_end_keeps_the_server_running(self) -> None:
        server, _, _ = self.pair()
        self.agents.broken = exception.HostUnreachable("no answer within 180 s")
        self.api.post_server_action(server["id"], {"os-stop": None})
        self._wait_until_fault(server, "no answer within 180 s")
        assert self.status(server) == ("ACTIVE", "a")
        assert self.domain("a", server["id"]).info()[0] == 1

    def test_domains_are_ready_for_protection_where_the_flavor_allows_it(self) -> None:
        (self.directory / "qmp").mkdir()
        made: list[str] = []
        plain = LibvirtDriver._get_guest_xml

        def record(driver: Any, *args: Any, **kwargs: Any) -> str:
            made.append(plain(driver, *args, **kwargs))
            return made[-1]

        created: list[str] = []
        create = LibvirtDriver._create_guest_with_network

        def keep(driver: Any, context: Any, xml: str, *args: Any, **kwargs: Any) -> Any:
            created.append(xml)
            return create(driver, context, xml, *args, **kwargs)

        with (
            mock.patch.object(LibvirtDriver, "_get_guest_xml", record),
            mock.patch.object(LibvirtDriver, "_create_guest_with_network", keep),
        ):
            self.boot("a", networks="auto")
            self.boot("a", networks="auto", flavor_id=self.flavor(mode="off"))
            assert created == made  # byte for byte
            server = self.boot("a", networks="auto", flavor_id=self.flavor(mode="allowed"))
        root = ET.fromstring(created[-1])
        assert root.find("memoryBacking/source").attrib == {"type": "memfd"}
        assert root.find("memoryBacking/access").attrib == {"mode": "shared"}
        assert [one.get("name") for one in root.iterfind("devices/interface/driver")] == ["qemu"]
        arguments = [one.get("value") for one in root.iter(f"{{{QEMU_NS}}}arg")]
        path = f"{self.directory}/qmp/{server['id']}.sock"
        assert arguments == ["-qmp", f"unix:{path},server=on,wait=off"]

    def test_hosts_tell_of_themselves(self) -> None:
        self._run_periodics()
        stats = self.driver("a").get_available_resource("a")["stats"]
        assert stats["pmt_agent"] == "up"
        assert stats["pmt_machine_types"] == "pc,q35"
        assert stats["pmt_backing_free_mib"] == "1024"
        uuid = self.compute_rp_uuids["a"]
        assert "CUSTOM_PMT" in self._get_provider_traits(uuid)
        self.agent_dies("a")
        self._run_periodics()
        assert "CUSTOM_PMT" not in self._get_provider_traits(uuid)
        assert self.driver("a").get_available_resource("a")["stats"]["pmt_agent"] == "down"
