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

"""What managers ask of Nova, Placement and Neutron, as it goes over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import requests_mock
from keystoneauth1 import fixture, session
from keystoneauth1.identity import v3

from nova_pmt import exception
from nova_pmt.openstack import policy
from nova_pmt.openstack.clients import STANDBY_NAME, OpenStack, Server

KEYSTONE, NOVA = "http://keystone/v3", "http://nova/v2.1"
PLACEMENT, NEUTRON = "http://placement", "http://neutron"
UUID, PORT = "11111111-0000-4000-8000-000000000001", "22222222-0000-4000-8000-000000000002"


class Http:
    """Services that answer what they are told; tokens say who asks: the project's name."""

    def __init__(self, mock: requests_mock.Mocker) -> None:
        self.mock = mock
        mock.get(KEYSTONE, json={"version": fixture.V3Discovery(KEYSTONE)})
        mock.post(f"{KEYSTONE}/auth/tokens", json=self._login)
        version = {"id": "v2.1", "status": "CURRENT", "version": "2.96", "min_version": "2.1"}
        links = [{"rel": "self", "href": NOVA}]
        mock.get(NOVA, json={"version": {**version, "links": links}})
        mock.get(f"{NOVA}/", json={"version": {**version, "links": links}})
        self.cloud = OpenStack(self.session("service"), session_of=self.session)

    def _login(self, request: Any, context: Any) -> dict[str, Any]:
        scope = request.json()["auth"]["scope"]["project"]
        context.headers["X-Subject-Token"] = f"token-of-{scope['id']}"
        token = fixture.V3Token(user_id="us", project_id=scope["id"])
        for kind, url in (("compute", NOVA), ("placement", PLACEMENT), ("network", NEUTRON)):
            token.add_service(kind).add_standard_endpoints(internal=url, public=url)
        return dict(token)

    def session(self, project: str) -> Any:
        auth = v3.Password(
            KEYSTONE, user_id="us", password="secret", project_id=project, unscoped=False
        )
        return session.Session(auth)

    def asked(self, method: str, url: str) -> list[Any]:
        return [
            one
            for one in self.mock.request_history
            if one.method == method and one.url.partition("?")[0] == url
        ]


@pytest.fixture
def http() -> Any:
    with requests_mock.Mocker() as mock:
        yield Http(mock)


def server(uuid: str = UUID, **changes: Any) -> dict[str, Any]:
    return {
        "id": uuid,
        "name": "web",
        "tenant_id": "project",
        "user_id": "owner",
        "status": "ACTIVE",
        "OS-EXT-SRV-ATTR:host": "a",
        "OS-EXT-STS:task_state": None,
        "metadata": {"ft": "pmt"},
        "flavor": {"original_name": "small", "extra_specs": {"ft:mode": "allowed"}},
        "image": {"id": "image"},
        **changes,
    }


# -- servers ----------------------------------------------------------------------------


def test_a_server_is_what_nova_says(http: Http) -> None:
    http.mock.get(f"{NOVA}/servers/{UUID}", json={"server": server()})
    found = http.cloud.server(UUID)
    assert found is not None and found.settled
    assert (found.host, found.flavor, found.image) == ("a", "small", "image")
    assert (found.metadata, found.extra_specs) == ({"ft": "pmt"}, {"ft:mode": "allowed"})
    (request,) = http.asked("GET", f"{NOVA}/servers/{UUID}")
    assert request.headers["OpenStack-API-Version"] == "compute 2.94"


def test_a_server_that_is_not_there_is_none_and_deleting_it_is_no_error(http: Http) -> None:
    gone = {"itemNotFound": {"message": "no such server", "code": 404}}
    http.mock.get(f"{NOVA}/servers/{UUID}", status_code=404, json=gone)
    http.mock.post(f"{NOVA}/servers/{UUID}/action", status_code=404, json=gone)
    http.mock.delete(f"{PLACEMENT}/allocations/{UUID}", status_code=404)
    assert http.cloud.server(UUID) is None
    http.cloud.delete(UUID)
    http.cloud.free(UUID)


def test_a_standby_is_deleted_also_where_nova_keeps_deleted_servers(http: Http) -> None:
    http.mock.post(f"{NOVA}/servers/{UUID}/action", status_code=204)
    http.cloud.delete(UUID)
    (request,) = http.asked("POST", f"{NOVA}/servers/{UUID}/action")
    assert request.json() == {"forceDelete": None}


def test_all_pages_are_read(http: Http) -> None:
    pages = [[server("a" * 36), server("b" * 36)], [server("c" * 36)], []]
    http.mock.get(f"{NOVA}/servers/detail", [{"json": {"servers": page}} for page in pages])
    assert [one.uuid[0] for one in http.cloud.servers()] == ["a", "b", "c"]
    asked = http.asked("GET", f"{NOVA}/servers/detail")
    assert [one.qs.get("marker") for one in asked] == [None, ["b" * 36], ["c" * 36]]
    assert all(one.qs["all_tenants"] == ["1"] for one in asked)


def test_a_strangers_server_is_no_standby_whatever_it_is_called(http: Http) -> None:
    mark = {policy.STANDBY: UUID}
    found = [
        server("a" * 36, user_id="us", metadata=mark),
        server("b" * 36, user_id="stranger", metadata=mark),
        server("c" * 36, user_id="us", metadata={}),
        server("d" * 36, user_id="us", metadata={policy.STANDBY: "another"}),
    ]
    http.mock.get(f"{NOVA}/servers/detail", [{"json": {"servers": s}} for s in (found, [])])
    assert [one.uuid[0] for one in http.cloud.standbys(UUID)] == ["a"]


@pytest.mark.parametrize("owner", ["service", "owner"])
def test_who_pays_for_a_standby_is_an_option(http: Http, owner: str) -> None:
    cloud = OpenStack(http.session("service"), quota_owner=owner, session_of=http.session)
    flavors = {"flavors": [{"id": "7", "name": "small"}, {"id": "8", "name": "large"}]}
    http.mock.get(f"{NOVA}/flavors/detail", json=flavors)
    http.mock.post(f"{NOVA}/servers", json={"server": {"id": "s" * 36, "links": []}})
    wanted = Server(UUID, project_id="project", flavor="small", image="image", zone="north")
    assert cloud.create_standby(wanted) == "s" * 36
    (request,) = http.asked("POST", f"{NOVA}/servers")
    payer = "project" if owner == "owner" else "service"
    assert request.headers["X-Auth-Token"] == f"token-of-{payer}"
    body = request.json()
    assert body["server"]["flavorRef"] == "7"
    assert body["server"]["name"] == STANDBY_NAME + UUID
    assert body["server"]["metadata"] == {policy.STANDBY: UUID}
    assert body["server"]["networks"] == "none"
    assert body["server"]["availability_zone"] == "north"
    assert body["os:scheduler_hints"] == {policy.HINT: UUID}


def test_a_flavor_that_is_gone_has_a_cure(http: Http) -> None:
    http.mock.get(f"{NOVA}/flavors/detail", json={"flavors": []})
    with pytest.raises(exception.NovaRefused, match="no flavor 'small' any more") as caught:
        http.cloud.create_standby(Server(UUID, flavor="small"))
    assert "resize" in caught.value.cure


def test_evacuation_names_the_host_and_is_not_newer_than_2_94(http: Http) -> None:
    http.mock.post(f"{NOVA}/servers/{UUID}/action", json={})
    http.cloud.evacuate(UUID, "b")
    http.cloud.reset_active(UUID)
    evacuate, reset = http.asked("POST", f"{NOVA}/servers/{UUID}/action")
    assert evacuate.json() == {"evacuate": {"host": "b"}}
    assert evacuate.headers["OpenStack-API-Version"] == "compute 2.94"
    assert reset.json() == {"os-resetState": {"state": "active"}}


def test_a_service_is_forced_down_and_let_up(http: Http) -> None:
    service = {"id": "s1", "binary": "nova-compute", "state": "up", "forced_down": True}
    http.mock.get(f"{NOVA}/os-services", json={"services": [service]})
    http.mock.put(f"{NOVA}/os-services/s1", json={"service": service})
    found = http.cloud.service("a")
    assert found is not None and found.up and found.forced_down
    http.cloud.force_down(found.uuid, False)
    (request,) = http.asked("PUT", f"{NOVA}/os-services/s1")
    assert request.json() == {"forced_down": False}
    http.mock.get(f"{NOVA}/os-services", json={"services": []})
    assert http.cloud.service("z") is None


# -- ports ------------------------------------------------------------------------------


def ports(http: Http, **changes: Any) -> str:
    port = {"id": PORT, "binding:host_id": "a", "binding:vnic_type": "normal", **changes}
    http.mock.get(f"{NEUTRON}/v2.0/ports", json={"ports": [port]})
    return f"{NEUTRON}/v2.0/ports/{PORT}"


@pytest.mark.parametrize("there", [False, True])
def test_a_port_gets_a_second_binding_which_becomes_the_active_one(http: Http, there: bool) -> None:
    url = ports(http)
    http.mock.post(f"{url}/bindings", status_code=409 if there else 201, json={})
    http.mock.put(f"{url}/bindings/b/activate", json={})
    http.mock.delete(f"{url}/bindings/a", status_code=404 if there else 204)
    assert http.cloud.rebind(UUID, "b") == 1
    verbs = [one.method for one in http.mock.request_history if one.url.startswith(url)]
    assert verbs == ["POST", "PUT", "DELETE"]
    (made,) = http.asked("POST", f"{url}/bindings")
    assert made.json()["binding"]["host"] == "b"


@pytest.mark.parametrize("status", [403, 404])
def test_where_neutron_has_one_binding_only_that_is_changed(http: Http, status: int) -> None:
    url = ports(http)
    http.mock.post(f"{url}/bindings", status_code=status)
    http.mock.put(url, json={})
    assert http.cloud.rebind(UUID, "b") == 1
    (request,) = http.asked("PUT", url)
    assert request.json() == {"port": {"binding:host_id": "b"}}


def test_a_port_that_is_bound_there_is_left_alone(http: Http) -> None:
    ports(http, **{"binding:host_id": "b"})
    assert http.cloud.rebind(UUID, "b") == 0


# -- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"status_code": 400}, exception.NovaRefused),
        ({"status_code": 403}, exception.NovaRefused),
        ({"status_code": 409}, exception.NovaRefused),
        ({"status_code": 429}, exception.NovaUnavailable),
        ({"status_code": 500}, exception.NovaUnavailable),
        ({"status_code": 503}, exception.NovaUnavailable),
        ({"exc": requests.exceptions.ConnectTimeout}, exception.NovaUnavailable),
        ({"exc": requests.exceptions.ConnectionError}, exception.NovaUnavailable),
    ],
)
def test_a_refusal_and_an_outage_are_told_apart(
    http: Http, answer: dict[str, Any], expected: type[exception.PmtError]
) -> None:
    http.mock.get(f"{NOVA}/servers/{UUID}", **answer)
    http.mock.get(f"{NEUTRON}/v2.0/ports", **answer)
    http.mock.delete(f"{PLACEMENT}/allocations/{UUID}", **answer)
    calls = (http.cloud.server, http.cloud.free, lambda uuid: http.cloud.rebind(uuid, "b"))
    for call in calls:
        with pytest.raises(expected) as caught:
            call(UUID)
        assert "secret" not in str(caught.value)


def test_credentials_that_do_not_fit_are_an_outage_not_a_refusal(http: Http) -> None:
    http.mock.post(f"{KEYSTONE}/auth/tokens", status_code=401, json={})
    with pytest.raises(exception.NovaUnavailable) as caught:
        OpenStack(http.session("other")).servers()
    assert "secret" not in str(caught.value)
