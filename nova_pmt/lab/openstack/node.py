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
"""A compute host's part of the cloud: Open vSwitch, OVN's controller, nova-compute."""

from __future__ import annotations

from collections.abc import Mapping

from nova_pmt.lab import network
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.openstack import settings
from nova_pmt.lab.openstack.control import ENVIRONMENT, wait_for

_SOCKET = "/run/openvswitch/db.sock"


def configure(host: LabHost, nova: settings.Settings) -> None:
    """Write nova.conf and make Nova's directories; once in the host's life."""
    settings.write(host.disk_path(settings.NOVA_CONFIG), nova)
    for name in ("instances", "locks"):
        directory = host.disk_path(f"{settings.NOVA_DIRECTORY}/{name}")
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)  # QEMU's user goes through it


def start_network(host: LabHost) -> None:
    """Open vSwitch and OVN's controller; the lab's own bridge for guests goes.

    The datapath is in user space: kernels of test machines often have no module for it.
    """
    database = host.disk / "openvswitch" / "conf.db"
    host.path("/run/openvswitch").mkdir(exist_ok=True)
    host.path("/run/ovn").mkdir(exist_ok=True)
    if not database.exists():
        database.parent.mkdir(parents=True)
        schema = "/usr/share/openvswitch/vswitch.ovsschema"
        host.run(["ovsdb-tool", "create", str(database), schema])
    host.spawn(
        "ovsdb-server",
        [
            *("ovsdb-server", str(database), f"--remote=punix:{_SOCKET}"),
            *("--remote=ptcp:6640:127.0.0.1", "--pidfile=/run/openvswitch/ovsdb-server.pid"),
            "-vconsole:warn",
        ],
    )
    wait_for(host.path(_SOCKET).exists, f"ovsdb-server on {host.name}")
    external = {
        "system-id": host.name,
        "hostname": host.name,
        "rundir": "/run/openvswitch",
        "ovn-remote": f"tcp:{network.MGMT.address(0)}:6642",
        "ovn-encap-type": "geneve",
        "ovn-encap-ip": host.mgmt_ip,
        "ovn-bridge-datapath-type": "netdev",
        "ovn-bridge-mappings": f"{settings.PHYSICAL}:{settings.PROVIDER_BRIDGE}",
        "ovn-monitor-all": "true",
        "ovn-remote-probe-interval": "5000",
    }
    host.run(
        [
            *("ovs-vsctl", "--no-wait", "--", "init", "--", "set", "open_vswitch", "."),
            *(f"external_ids:{name}={_quoted(value)}" for name, value in external.items()),
            # Checksums of veth and virtio are partial; without it connection tracking drops them.
            "other_config:userspace-tso-enable=true",
        ]
    )
    host.run(["sh", "-c", "ip link set data nomaster && ip link del br-data"])
    host.spawn(
        "ovs-vswitchd",
        [
            *("ovs-vswitchd", f"unix:{_SOCKET}", "--pidfile=/run/openvswitch/ovs-vswitchd.pid"),
            "-vconsole:warn",
        ],
    )
    bridge = settings.PROVIDER_BRIDGE
    host.run(
        [
            *("ovs-vsctl", "--timeout=60", "--may-exist", "add-br", "br-int", "--"),
            *("set", "bridge", "br-int", "datapath_type=netdev", "fail-mode=secure", "--"),
            *("--may-exist", "add-br", bridge, "--"),
            *("set", "bridge", bridge, "datapath_type=netdev", "--"),
            *("--may-exist", "add-port", bridge, network.DATA.name),
        ],
        timeout=90,
    )
    host.spawn(
        "ovn-controller",
        [
            *("ovn-controller", f"unix:{_SOCKET}", "--pidfile=/run/ovn/ovn-controller.pid"),
            "-vconsole:warn",
        ],
    )


def _quoted(value: str) -> str:
    return f'"{value}"'


def start_compute(host: LabHost, program: str, env: Mapping[str, str] | None = None) -> None:
    """Start nova-compute, or what stands for it."""
    argv = [program, "--config-file", settings.NOVA_CONFIG]
    host.spawn("nova-compute", argv, {**ENVIRONMENT, **(env or {})})
