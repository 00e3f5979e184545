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

"""Filter and weigher on the scheduler's own objects, loaded as the scheduler loads them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import nova.conf
import pytest
from nova import objects
from nova.scheduler import filters, host_manager
from nova.scheduler import weights as nova_weights
from nova.weights import WeighedObject

from nova_pmt.openstack import policy
from nova_pmt.openstack.nova import lookup
from nova_pmt.openstack.nova.filter import OVERHEAD_MIB, PMTStandbyFilter
from nova_pmt.openstack.nova.lookup import Bounds, Server
from nova_pmt.openstack.nova.stats import HostStats
from nova_pmt.openstack.nova.weigher import PMTSpreadWeigher

MEMORY_MIB = 512
GOOD = HostStats(
    agent=True,
    cpu_model="EPYC",
    machine_types=frozenset({"pc", "q35"}),
    backing_free_mib=8192,
)
SERVER = str(uuid.uuid4())


def host(name: str, stats: HostStats = GOOD) -> host_manager.HostState:
    state = host_manager.HostState(name, name, str(uuid.uuid4()))
    state.stats = stats.write()
    return state


def request(
    extra_specs: Mapping[str, str] | None = None,
    hints: Mapping[str, str] | None = None,
    **changes: Any,
) -> objects.RequestSpec:
    spec = objects.RequestSpec(
        instance_uuid=str(uuid.uuid4()),
        flavor=objects.Flavor(memory_mb=MEMORY_MIB, extra_specs=dict(extra_specs or {})),
        scheduler_hints={name: [value] for name, value in (hints or {}).items()},
        requested_destination=None,
        force_hosts=None,
        force_nodes=None,
    )
    for name, value in changes.items():
        setattr(spec, name, value)
    return spec


class Servers:
    """What the scheduler's database has."""

    def __init__(self) -> None:
        self.new: dict[str, str] | None = {}
        self.old: dict[str, str] = {}
        self.there: Server | None = Server("one", "one", "q35")
        self.stats = GOOD
        self.bound = Bounds()
        self.cells: list[str | None] = []
        self.asked = 0

    def new_server_metadata(self, uuid: str) -> dict[str, str] | None:
        self.asked += 1
        return self.new

    def metadata(self, uuid: str) -> dict[str, str]:
        self.asked += 1
        return self.old

    def server(self, uuid: str, cell_uuid: str | None = None) -> Server | None:
        self.asked += 1
        self.cells.append(cell_uuid)
        return self.there

    def bounds(self, uuid: str, server: Server) -> Bounds:
        self.asked += 1
        return self.bound

    def host_stats(self, server: Server) -> Mapping[str, Any]:
        self.asked += 1
        return self.stats.write()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    found = Servers()
    for name in ("new_server_metadata", "metadata", "server", "host_stats", "bounds"):
        monkeypatch.setattr(lookup, name, getattr(found, name))
    return found


def passing(
    spec: objects.RequestSpec,
    *hosts: host_manager.HostState,
    honour: str = "allowed",
    users: tuple[str, ...] = (),
) -> list[str]:
    """Names of those that pass, by the way that the scheduler takes."""
    handler = filters.HostFilterHandler()
    found = handler.get_filtered_objects([PMTStandbyFilter(honour, users)], list(hosts), spec)
    return [state.host for state in found or []]


def test_the_scheduler_loads_both_by_their_paths() -> None:
    path = "nova_pmt.openstack.nova.filter.PMTStandbyFilter"
    handler = filters.HostFilterHandler()
    assert handler.get_matching_classes([path]) == [PMTStandbyFilter]
    weighers = nova_weights.HostWeightHandler()
    path = "nova_pmt.openstack.nova.weigher.PMTSpreadWeigher"
    assert weighers.get_matching_classes([path]) == [PMTSpreadWeigher]


@pytest.mark.parametrize("specs", [{}, {"ft:mode": "off"}, {"hw:cpu_policy": "shared"}])
def test_servers_that_ask_for_nothing_pass_and_cost_no_question(
    servers: Servers, specs: dict[str, str]
) -> None:
    servers.new = {policy.PROPERTY: "pmt"}
    assert passing(request(specs), host("one", HostStats()), host("two")) == ["one", "two"]
    assert servers.asked == 0


def test_a_standby_never_goes_to_its_servers_host(servers: Servers) -> None:
    spec = request({"ft:mode": "pmt"}, {policy.HINT: SERVER})
    assert passing(spec, host("one"), host("two"), host("three")) == ["two", "three"]


@pytest.mark.parametrize(
    ("stats", "why"),
    [
        (HostStats(), "no nova-pmt-agent that is alive"),
        (HostStats(True, cpu_model="EPYC", backing_free_mib=600), "has 600 MiB free"),
        (HostStats(True, cpu_model="Xeon", backing_free_mib=8192), "its CPU is Xeon"),
        (
            HostStats(True, "", "EPYC", frozenset({"pc"}), backing_free_mib=8192),
            "no machine type q35",
        ),
    ],
)
def test_a_host_that_cannot_hold_a_standby_is_left_out_with_one_line(
    servers: Servers, caplog: pytest.LogCaptureFixture, stats: HostStats, why: str
) -> None:
    spec = request({"ft:mode": "pmt"}, {policy.HINT: SERVER})
    with caplog.at_level(logging.DEBUG, "nova_pmt"):
        assert passing(spec, host("two", stats), host("three")) == ["three"]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("nova_pmt")]
    assert len(lines) == 1
    assert why in lines[0]
    assert SERVER in lines[0] and "two" in lines[0]


def zoned(name: str, zone: str) -> host_manager.HostState:
    made = host(name)
    made.aggregates = [objects.Aggregate(metadata={"availability_zone": zone} if zone else {})]
    return made


def test_a_standby_goes_where_an_evacuation_could_follow(
    servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    """Else Nova could never be told that the server runs there."""
    servers.bound = Bounds("north", frozenset({"four"}))
    spec = request({}, {policy.HINT: SERVER})
    hosts = [zoned("two", "north"), zoned("three", "south"), zoned("four", "north"), host("five")]
    with caplog.at_level(logging.DEBUG, "nova_pmt"):
        assert passing(spec, *hosts) == ["two"]
    assert "three: it is not in availability zone north" in caplog.text
    assert "four: another server of the server's anti-affinity group" in caplog.text
    servers.bound = Bounds("nova")
    assert passing(spec, *hosts) == ["five"], "the zone of hosts that are in none"


def test_a_standby_stays_in_its_servers_cell(servers: Servers) -> None:
    mine, other = objects.CellMapping(uuid=str(uuid.uuid4())), str(uuid.uuid4())
    servers.there = Server("one", "one", "q35", mine)
    near, far = host("two"), host("three")
    near.cell_uuid, far.cell_uuid = mine.uuid, other
    assert passing(request({}, {policy.HINT: SERVER}), near, far) == ["two"]


def test_room_is_counted_with_what_qemu_needs_itself(servers: Servers) -> None:
    spec = request({}, {policy.HINT: SERVER})
    exact = HostStats(True, backing_free_mib=MEMORY_MIB + OVERHEAD_MIB)
    short = HostStats(True, backing_free_mib=MEMORY_MIB + OVERHEAD_MIB - 1)
    assert passing(spec, host("two", exact), host("three", short)) == ["two"]


def test_a_server_without_a_host_has_no_standby(servers: Servers) -> None:
    servers.there = None
    assert passing(request({}, {policy.HINT: SERVER}), host("two")) == []


def test_a_protected_server_goes_where_an_agent_lives_and_another_host_has_room(
    servers: Servers,
) -> None:
    spec = request({"ft:mode": "pmt"})
    full = HostStats(True, backing_free_mib=100)
    assert passing(spec, host("one"), host("two"), host("three", HostStats())) == ["one", "two"]
    # A host without room for a standby may have the server, if another one has the room.
    assert passing(spec, host("one", full), host("two")) == ["one"]
    assert passing(spec, host("one", full), host("two", full)) == []
    assert passing(spec, host("one")) == []


def test_the_property_counts_where_the_flavor_allows_it(servers: Servers) -> None:
    spec = request({"ft:mode": "allowed"})
    assert passing(spec, host("one", HostStats())) == ["one"]
    servers.new = {policy.PROPERTY: "pmt"}
    assert passing(spec, host("one", HostStats())) == []
    assert passing(request({}), host("one", HostStats()), honour="always") == []


def test_a_pair_needs_two_hosts_that_have_the_same_cpu(servers: Servers) -> None:
    spec = request({"ft:mode": "pmt"})
    other = HostStats(True, cpu_model="Xeon", backing_free_mib=8192)
    silent = HostStats(True, backing_free_mib=8192)
    assert passing(spec, host("one"), host("two", other)) == []
    assert passing(spec, host("one"), host("two", other), host("three")) == ["one", "three"]
    # One that does not tell its model may be like any.
    assert passing(spec, host("one"), host("two", other), host("three", silent)) == [
        *("one", "two", "three")
    ]


def test_the_machine_type_of_the_image_is_one_that_the_standbys_host_must_have(
    servers: Servers,
) -> None:
    image = objects.ImageMeta(properties=objects.ImageMetaProps(hw_machine_type="q35"))
    spec = request({"ft:mode": "pmt"}, image=image)
    old = HostStats(True, "", "EPYC", frozenset({"pc"}), backing_free_mib=8192)
    assert passing(spec, host("one"), host("two", old)) == ["two"]


def test_where_nothing_passes_one_line_says_why(
    servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nova_pmt"):
        assert passing(request({"ft:mode": "pmt"}), host("one"), host("two", HostStats())) == []
    (line,) = (record for record in caplog.records if record.name.startswith("nova_pmt"))
    assert "no host passes: of 2 candidates 1 have a live agent" in line.getMessage()
    assert f"{MEMORY_MIB + OVERHEAD_MIB} MiB" in line.getMessage()


def test_a_server_that_is_there_moves_although_no_third_host_is(servers: Servers) -> None:
    servers.new, servers.old = None, {policy.PROPERTY: "pmt"}
    spec = request({"ft:mode": "allowed"})
    assert passing(spec, host("two")) == ["two"]
    assert passing(spec, host("two", HostStats())) == [], "it shall be protected there, too"


def test_a_server_passes_to_the_host_of_its_standby_whatever_that_host_tells(
    servers: Servers,
) -> None:
    servers.new, servers.old = None, {policy.PROPERTY: "pmt"}
    named = objects.Destination(host="two")
    spec = request({"ft:mode": "pmt"}, requested_destination=named)
    assert passing(spec, host("two", HostStats())) == ["two"]


def test_a_host_that_was_named_for_a_new_server_needs_an_agent(servers: Servers) -> None:
    named = objects.Destination(host="two")
    spec = request({"ft:mode": "pmt"}, requested_destination=named)
    assert passing(spec, host("two")) == ["two"]
    assert passing(spec, host("two", HostStats())) == []
    assert passing(request({"ft:mode": "pmt"}, force_hosts=["two"]), host("two")) == ["two"]


def test_a_rebuild_stays_where_it_is(servers: Servers) -> None:
    spec = request({"ft:mode": "pmt"}, {"_nova_check_type": "rebuild"})
    assert passing(spec, host("one", HostStats())) == ["one"]


def test_the_mark_of_a_standby_does_not_excuse_a_users_server(servers: Servers) -> None:
    servers.new = {policy.STANDBY: SERVER}
    assert passing(request({"ft:mode": "pmt"}), host("one", HostStats())) == []


def test_only_the_managers_user_has_standbys(servers: Servers) -> None:
    hints = {policy.HINT: SERVER}
    hosts = host("one"), host("two")
    assert passing(request({}, hints, user_id="manager"), *hosts, users=("manager",)) == ["two"]
    assert passing(request({}, hints, user_id="mallory"), *hosts, users=("manager",)) == []
    assert passing(request({}, hints), *hosts, users=("manager",)) == []


def test_where_the_server_runs_is_asked_of_the_database_not_of_old_notes(servers: Servers) -> None:
    # It failed over from "two"; the scheduler has not heard from there since.
    stale = host("two")
    stale.instances[SERVER] = objects.Instance(uuid=SERVER)
    assert passing(request({}, {policy.HINT: SERVER}), host("one"), stale) == ["two"]
    assert servers.cells == [stale.cell_uuid]


def test_the_servers_host_is_compared_with_also_where_it_is_no_candidate(servers: Servers) -> None:
    other = HostStats(True, cpu_model="Xeon", backing_free_mib=8192)
    spec = request({}, {policy.HINT: SERVER})
    assert passing(spec, host("two", other), host("three")) == ["three"]
    assert servers.asked == 3


def test_standbys_are_spread_and_prefer_the_fast_network() -> None:
    hosts = [
        host("two", HostStats(True, standbys=2, replication_mbit=100_000)),
        host("three", HostStats(True, standbys=1, replication_mbit=1_000)),
        host("four", HostStats(True, standbys=1, replication_mbit=25_000)),
    ]

    def order(spec: objects.RequestSpec) -> list[str]:
        handler = nova_weights.HostWeightHandler()
        found: list[WeighedObject] = handler.get_weighed_objects([PMTSpreadWeigher()], hosts, spec)
        return [weighed.obj.host for weighed in found]

    assert order(request({}, {policy.HINT: SERVER})) == ["four", "three", "two"]
    assert order(request({})) == ["two", "three", "four"], "no say in other servers"


def test_what_a_host_says_comes_back_from_text() -> None:
    stats = HostStats(True, "1.0", "EPYC", frozenset({"pc", "q35"}), 4096, 3, 10_000)
    assert HostStats.read(stats.write()) == stats
    assert HostStats.read(None) == HostStats.read({"pmt_standbys": "many"}) == HostStats()


def test_filters_are_enabled_by_name() -> None:
    group = nova.conf.CONF.filter_scheduler
    paths = [
        "nova.scheduler.filters.all_filters",
        "nova_pmt.openstack.nova.filter.PMTStandbyFilter",
    ]
    nova.conf.CONF.set_override("available_filters", paths, "filter_scheduler")
    nova.conf.CONF.set_override(
        "enabled_filters", ["ComputeFilter", "PMTStandbyFilter"], "filter_scheduler"
    )
    try:
        classes = filters.HostFilterHandler().get_matching_classes(group.available_filters)
        assert PMTStandbyFilter in classes
    finally:
        nova.conf.CONF.clear_override("available_filters", "filter_scheduler")
        nova.conf.CONF.clear_override("enabled_filters", "filter_scheduler")
