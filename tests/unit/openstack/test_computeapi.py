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


from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oslo_messaging._drivers import impl_fake

from nova_pmt import exception
from nova_pmt.openstack import settings
from nova_pmt.openstack.computeapi import ComputeAPI
from nova_pmt.openstack.nova import bus


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[Any]:
    impl_fake.FakeExchangeManager.cleanup()
    (tmp_path / "x.conf").write_text("[DEFAULT]\ntransport_url = fake://\n")
    yield bus.transport(settings.load(str(tmp_path / "x.conf")))
    impl_fake.FakeExchangeManager.cleanup()


def test_managers_reach_a_hosts_nova_compute(transport: Any) -> None:
    done: list[str] = []

    def replug(uuid: str) -> None:
        if uuid == "other":
            raise exception.NotProtected("b has no standby of server other")
        done.append(uuid)

    server = bus.server(transport, "b", bus.Endpoint(lambda: done.append("finished"), replug))
    server.start()
    try:
        api = ComputeAPI(transport, timeout_s=10)
        api.finish_evacuations("b")
        api.replug("b", "uuid")
        assert done == ["finished", "uuid"]
        with pytest.raises(exception.NotProtected):
            api.replug("b", "other")
    finally:
        server.stop()
        server.wait()


def test_a_host_without_our_configuration_has_no_bus(tmp_path: Path) -> None:
    assert bus.transport(settings.load(str(tmp_path / "none.conf"))) is None
