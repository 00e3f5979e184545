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
"""A host dies, and Nova follows; the demo shows the same."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nova_pmt.lab.openstack.demo import disagreements
from nova_pmt.lab.openstack.talker import Talker
from tests.integration.protected import STEP_S, Protected

if TYPE_CHECKING:
    from nova_pmt.lab.openstack import Cloud


def test_host_dies(cloud: Cloud, web: Protected) -> None:
    guest, server, pair = web.guest(), web.wait(), cloud.pmt.pair(web.uuid)
    assert pair is not None
    boot, address = guest.boot_id(), cloud.address(server)
    first, second = cloud.lab.host(pair.primary_host), cloud.lab.host(pair.standby_host)
    with Talker(guest) as talker:
        killed = time.monotonic()
        first.power_off(silent=True)
        talker.wait_answer(killed, STEP_S)
        moved = web.wait_on(second.name)
        assert cloud.address(moved) == address
        assert web.guest().boot_id() == boot
        deadline = time.monotonic() + STEP_S
        while wrong := disagreements(cloud, web.uuid, second.name):
            assert time.monotonic() < deadline, wrong
            time.sleep(1)
        cloud.power_on(first)
        cloud.wait_computes([first], STEP_S)
        cloud.pmt.wait_protected(web.uuid, first.name, STEP_S)
        talker.finish()
    assert web.domains().keys() == {first.name, second.name}
