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

"""Nova's API, scheduler and databases with the filter, the weigher and the extra specs."""

from __future__ import annotations

from typing import Any

# The first import of anything of Nova's chooses between threads and eventlet.
import nova.tests.functional  # isort: skip

import pytest
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import base
from nova.virt.libvirt import driver as libvirt_driver

from nova_pmt.openstack import policy
from nova_pmt.openstack.nova.stats import HostStats

EPYC = HostStats(True, "", "EPYC", frozenset({"pc", "q35"}), backing_free_mib=8192)


class PlacingTest(base.ServersTestBase):  # type: ignore[misc]
    """Hosts tell of themselves what the tests want; the driver is Nova's."""

    api_major_version, microversion, ADMIN_API = "v2.1", "2.94", True
    CAST_AS_CALL = False
    REQUIRES_LOCKING = False

    def setUp(self) -> None:
        self.told: dict[str, HostStats] = {}
        super().setUp()
        original = libvirt_driver.LibvirtDriver.get_available_resource

        def telling(driver: Any, nodename: str) -> Any:
            data = original(driver, nodename)
            data["stats"] = self.told.get(nodename, HostStats()).write()
            return data

        self.stub_out(
            "nova.virt.libvirt.driver.LibvirtDriver.get_available_resource",
            telling,
        )

    def __delattr__(self, name: str) -> None:
        # Nova's test cases empty themselves at their end; pytest then takes away what it put in.
        self.__dict__.pop(name, None)

    def _wait_for_server_parameter(
        self, server: Any, expected_params: Any, max_retries: int = 0, **more: Any
    ) -> Any:
        # Nova's own patience is for a machine of one's own.
        return super()._wait_for_server_parameter(
            server, expected_params, max_retries=max(max_retries, 240), **more
        )

    def _setup_scheduler_service(self) -> Any:
        enabled = [*nova.conf.CONF.filter_scheduler.enabled_filters, "PMTStandbyFilter"]
        self.flags(
            available_filters=[
                "nova.scheduler.filters.all_filters",
                "nova_pmt.openstack.nova.filter.PMTStandbyFilter",
            ],
            enabled_filters=enabled,
            weight_classes=[
                "nova.scheduler.weights.all_weighers",
                "nova_pmt.openstack.nova.weigher.PMTSpreadWeigher",
            ],
            group="filter_scheduler",
        )
        return self.start_service("scheduler")

    def hosts(self, **told: HostStats) -> None:
        self.told.update(told)
        for name in told:
            self.start_compute(hostname=name)

    def flavor(self, **extra_specs: str) -> str:
        return str(self._create_flavor(extra_spec={f"ft:{k}": v for k, v in extra_specs.items()}))

    def boot(self, flavor: str, state: str = "ACTIVE", **more: Any) -> dict[str, Any]:
        hints = more.pop("hints", None)
        body = self._build_server(flavor_id=flavor, networks="none", **more.pop("build", {}))
        body.update(more)
        request: dict[str, Any] = {"server": body}
        if hints:
            request["os:scheduler_hints"] = hints
        server = self.api.post_server(request)
        found: dict[str, Any] = self._wait_for_state_change(server, state)
        return found

    def standby(self, server: dict[str, Any], flavor: str, state: str = "ACTIVE") -> dict[str, Any]:
        return self.boot(flavor, state, hints={policy.HINT: server["id"]})

    def test_a_server_and_its_standby_go_to_two_hosts_and_the_server_can_follow(self) -> None:
        self.hosts(a=EPYC, b=EPYC, c=HostStats())
        flavor = self.flavor(mode="allowed")
        server = self.boot(flavor, metadata={policy.PROPERTY: "pmt"})
        host = server["OS-EXT-SRV-ATTR:host"]
        assert host in ("a", "b")
        standby = self.standby(server, flavor)
        other = standby["OS-EXT-SRV-ATTR:host"]
        assert {host, other} == {"a", "b"}
        # Its host dies; whatever the other one's agent tells at that moment, it must pass.
        self.told[other] = HostStats()
        self._run_periodics()
        self.computes[host].stop()
        keep, self.api.microversion = self.api.microversion, "2.53"
        service = self.api.get_services(binary="nova-compute", host=host)[0]
        self.api.put_service(service["id"], {"forced_down": True})
        self.api.microversion = keep
        server = self._evacuate_server(
            server, {"host": other}, expected_host=other, expected_state="ACTIVE"
        )
        # The next standby: the only other host with an agent is where the server was.
        self.told[other] = EPYC
        self._run_periodics()
        refused = self.standby(server, flavor, "ERROR")
        assert "No valid host" in refused["fault"]["message"]

    def test_where_no_other_host_could_have_a_standby_nothing_is_booted(self) -> None:
        self.hosts(a=EPYC, b=HostStats())
        refused = self.boot(self.flavor(mode="pmt"), "ERROR")
        assert "No valid host" in refused["fault"]["message"]
        self.boot(self.flavor(mode="allowed"))

    def test_standbys_are_spread(self) -> None:
        busy = HostStats(True, "", "EPYC", frozenset(), 8192, standbys=3)
        self.hosts(a=EPYC, b=busy, c=EPYC)
        flavor = self.flavor(mode="pmt")
        for _ in range(2):
            server = self.boot(flavor, build={"host": "a"})
            assert self.standby(server, flavor)["OS-EXT-SRV-ATTR:host"] == "c"

    def test_a_standby_goes_where_the_server_could_be_evacuated_to(self) -> None:
        """Not to another zone than the server was asked for in, nor beside one of its group."""
        self.hosts(a=EPYC, b=EPYC, c=EPYC, d=EPYC)
        aggregate = self.api.post_aggregate(
            {"aggregate": {"name": "north", "availability_zone": "north"}}
        )
        for host in "abc":
            self.api.add_host_to_aggregate(aggregate["id"], host)
        flavor = self.flavor(mode="pmt")
        group = self.api.post_server_groups({"name": "apart", "policy": "anti-affinity"})
        servers = [
            self.boot(flavor, availability_zone=f"north:{host}", hints={"group": group["id"]})
            for host in "ab"
        ]
        for server in servers:
            assert self.standby(server, flavor)["OS-EXT-SRV-ATTR:host"] == "c"

    def test_the_api_refuses_extra_specs_that_are_wrong_and_says_why(self) -> None:
        flavor = self._create_flavor()
        for name, value, told in (
            ("ft:mode", "on", "is not one of: pmt, kemari, auto, allowed, off"),
            ("ft:interval_ms", "1", "min value of '5'"),
        ):
            with pytest.raises(client.OpenStackApiException) as refused:
                self.api.post_extra_spec(flavor, {"extra_specs": {name: value}})
            assert refused.value.response.status_code == 400
            assert told in refused.value.response.text
