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

"""The lab's three networks: bridges in ctl, one veth pair per host and network.

Nothing is made in the root network namespace. Names in a host: ``mgmt`` and ``repl`` carry the
host's addresses; ``data`` is a port of the host's bridge ``br-data``, to which libvirt adds the
guests' taps. In ctl: bridges ``br-mgmt``, ``br-repl``, ``br-data`` with ports ``mgmt1``, ...
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from nova_pmt.exception import LabError


@dataclass(frozen=True)
class Network:
    """One of the lab's networks; ``prefix`` is the first three numbers of its /24."""

    name: str
    prefix: str
    purpose: str

    def address(self, index: int) -> str:
        """Address of ctl (index 0) or of compute ``index``."""
        return f"{self.prefix}.{10 + index if index else 1}"

    def mac(self, index: int) -> str:
        """The host's card keeps its MAC over power cuts, or its peers' ARP tables were wrong."""
        return "02:00:" + ":".join(f"{int(n):02x}" for n in self.address(index).split("."))


MGMT = Network("mgmt", "10.77.0", "RPC, libvirt, SSH")
REPL = Network("repl", "10.77.1", "replication between the hosts")
DATA = Network("data", "10.77.2", "the guests' network")
NETWORKS = (MGMT, REPL, DATA)

#: What the data network carries at least, so that one guest of a lab may have large frames.
JUMBO = 9000


def _mtu(network: Network, mtu: int) -> int:
    return max(mtu, JUMBO) if network is DATA else mtu


def _batch(command: list[str], pid: int, lines: Iterable[str], force: bool = False) -> None:
    """Feed ``lines`` to ``ip`` or ``tc`` in the network namespace of ``pid`` (one process)."""
    argv = ["nsenter", "-t", str(pid), "-n", *command, *(["-force"] if force else [])]
    argv += ["-batch", "-"]
    text = "\n".join(lines) + "\n"
    done = subprocess.run(argv, input=text, text=True, capture_output=True, check=False)
    if done.returncode and not force:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")


def create_bridges(ctl: int, mtu: int) -> None:
    """The bridges in ctl (PID 1 ``ctl``), with ctl's addresses."""
    lines = ["link set lo up"]
    for net in NETWORKS:
        # Bridges without STP and forward delay pass packets from the first moment on. Without an
        # address of its own a bridge takes one of its ports', and another when hosts come and go.
        lines += [
            f"link add br-{net.name} address {net.mac(0)} mtu {_mtu(net, mtu)} type bridge"
            " stp_state 0 forward_delay 0 mcast_snooping 0",
            f"addr add {net.address(0)}/24 dev br-{net.name}",
            f"link set br-{net.name} up",
        ]
    _batch(["ip"], ctl, lines)


def connect(ctl: int, host: int, index: int, mtu: int) -> None:
    """Plug compute ``index`` (PID 1 ``host``) into all networks."""
    disconnect(ctl, index)
    lines = []
    for net in NETWORKS:
        # The peer's namespace is given by a pid, which the kernel looks up in our pid namespace.
        lines += [
            f"link add {net.name}{index} mtu {_mtu(net, mtu)} type veth"
            f" peer name {net.name} address {net.mac(index)} mtu {_mtu(net, mtu)} netns {host}",
            f"link set {net.name}{index} master br-{net.name} up",
        ]
    _batch(["ip"], ctl, lines)
    _batch(
        ["ip"],
        host,
        [
            "link set lo up",
            f"addr add {MGMT.address(index)}/24 dev {MGMT.name}",
            f"link set {MGMT.name} up",
            f"addr add {REPL.address(index)}/24 dev {REPL.name}",
            f"link set {REPL.name} up",
            f"link add br-data mtu {_mtu(DATA, mtu)} type bridge stp_state 0 forward_delay 0"
            " mcast_snooping 0",
            f"link set {DATA.name} master br-data up",
            "link set br-data up",
        ],
    )


def disconnect(ctl: int, index: int) -> None:
    """Remove the host's links. A dead host's namespace goes only some time later, by itself."""
    _batch(["ip"], ctl, [f"link del {net.name}{index}" for net in NETWORKS], force=True)


class Link:
    """One host's cable to one network. Faults act on ctl's end: the host sees its carrier go."""

    def __init__(self, network: Network, index: int, ctl: int, host: int) -> None:
        self.network = network
        self._port = f"{network.name}{index}"
        self._ctl = ctl
        self._host = host

    def down(self) -> None:
        """Pull the cable: nothing passes, no connection is told."""
        _batch(["ip"], self._ctl, [f"link set {self._port} down"])

    def up(self) -> None:
        """Plug the cable in again."""
        _batch(["ip"], self._ctl, [f"link set {self._port} up"])

    def limit(self, mbit: float) -> None:
        """Let at most ``mbit`` Mbit/s pass in each direction (token bucket, 50 ms of queue)."""
        # Large enough for the 64 KiB segments of TCP offload and for 4 ms between timer ticks.
        burst = max(65536, int(mbit * 1e6 / 8 * 0.004))
        shape = f"root tbf rate {int(mbit * 1000)}kbit burst {burst} latency 50ms"
        _batch(["tc"], self._ctl, [f"qdisc replace dev {self._port} {shape}"])
        _batch(["tc"], self._host, [f"qdisc replace dev {self.network.name} {shape}"])

    def unlimit(self) -> None:
        """Full speed again."""
        _batch(["tc"], self._ctl, [f"qdisc del dev {self._port} root"], force=True)
        _batch(["tc"], self._host, [f"qdisc del dev {self.network.name} root"], force=True)
