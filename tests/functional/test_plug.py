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

"""The egress buffer ``plug`` on Debian's kernel, in a guest of its own: see ``plug_inside.py``.

This machine's kernel need not have ``sch_plug``. Nothing here needs the lab, libvirt or KVM.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Any, cast

import pytest

from nova_pmt import exception
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network import tapredirect
from nova_pmt.guest.network.base import Nic
from nova_pmt.guest.network.plug import PlugBuffer
from nova_pmt.lab import kernel_guest
from tests.functional.plug_inside import CHECKS

MODULES = (
    *("tun", "veth", "bridge", "ifb"),
    *("sch_prio", "sch_plug", "sch_ingress", "cls_matchall", "cls_u32"),
    *("act_mirred", "act_gact", "act_police"),
)
#: It takes 30 s of one core, and some minutes of a machine that is busy with other things.
TIMEOUT_S = 280


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What each check said; all of them in one boot."""
    image = kernel_guest.build(
        "tests.functional.plug_inside", modules=MODULES, programs=("ip", "tc"), bare=("pyroute2",)
    )
    lines, console = kernel_guest.run(image, timeout_s=TIMEOUT_S)
    print(console)  # pytest shows it with what fails
    return {line["check"]: line for line in lines}


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("name", CHECKS)
def test_plug(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert name in results, f"the guest ended before it; it did {list(results)}"
    result = dict(results[name])
    assert result.pop("ok"), result["error"]
    print(result)


def test_a_kernel_without_it_is_refused_before_anything_is_changed() -> None:
    missing = tapredirect.missing_feature()
    if not missing:
        pytest.skip("this machine's kernel has all that it needs")
    name = f"pmt{os.getpid() % 10**9}"
    with open("/dev/net/tun", "r+b", buffering=0) as tap:
        fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
        nic = Nic("net0", "hostnet0", "02:00:00:00:00:01", name, vhost=True)
        before = os.listdir("/sys/class/net")
        (problem,) = PlugBuffer.problems(nic, cast(Monitor, None))
        assert isinstance(problem, exception.NoEgressBuffer)
        assert "the kernel has no" in problem.message and "sch_plug" in problem.cure
        buffer = PlugBuffer(nic, cast(Monitor, None), "/tmp", 1 << 20)
        with pytest.raises(exception.GuestError):
            buffer.attach()
        buffer.close()
        assert os.listdir("/sys/class/net") == before
        assert PlugBuffer.recover(nic, cast(Monitor, None)) is False
