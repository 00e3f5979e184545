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

import contextlib
import functools
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from nova_pmt.exception import LabError
from nova_pmt.lab import process, relay


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


def _try(pid: int, *commands: Sequence[str]) -> str:
    """Run commands in the network namespace of ``pid``; what the first that fails says."""
    for command in commands:
        argv = ["nsenter", "-t", str(pid), "-n", *command]
        done = subprocess.run(argv, text=True, capture_output=True, check=False)
        if done.returncode:
            return (done.stderr.strip() or f"{command[0]} failed").splitlines()[0]
    return ""


@functools.cache
def missing(what: Literal["block", "lose"], ctl: int) -> str:
    """Why this machine cannot do what the method of :class:`Link` does; empty: it can.

    :param ctl: PID 1 of a ctl, in which it is tried.
    """
    tried = {
        "block": (_rule("-A", "br-repl"), _rule("-D", "br-repl")),
        "lose": (_loss("-A", "br-repl", 0.1), _loss("-D", "br-repl", 0.1)),
    }
    return _try(ctl, *tried[what])


@functools.cache
def _netem_is_missing(ctl: int) -> bool:
    device = ["dev", "br-repl", "root"]
    return bool(
        _try(
            ctl,
            ["tc", "qdisc", "add", *device, "netem", "delay", "1ms"],
            ["tc", "qdisc", "del", *device],
        )
    )


def _rule(verb: str, port: str, chain: str = "FORWARD", way: str = "-i") -> list[str]:
    return ["ebtables", verb, chain, way, port, "-j", "DROP"]


def _loss(verb: str, device: str, part: float) -> list[str]:
    match = ["-m", "statistic", "--mode", "random", "--probability", str(part)]
    return ["iptables", "-w", verb, "INPUT", "-i", device, *match, "-j", "DROP"]


class Link:
    """One host's cable to one network. Faults act on ctl's end: the host sees its carrier go."""

    def __init__(self, network: Network, index: int, ctl: int, host: int) -> None:
        self.network = network
        self._port = f"{network.name}{index}"
        self._ctl = ctl
        self._host = host
        self._relay: relay.Relay | None = None

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

    def block(self, way: Literal["in", "out"]) -> None:
        """Lose all that comes ``in`` to the host, or goes ``out`` of it; the other way is open.

        :raises LabError: the kernel or ebtables cannot; see :func:`missing`.
        """
        self._demand(*(_rule("-A", self._port, *where) for where in _DIRECTIONS[way]))

    def unblock(self) -> None:
        """Both ways are open again."""
        for where in (*_DIRECTIONS["in"], *_DIRECTIONS["out"]):
            _try(self._ctl, _rule("-D", self._port, *where))

    def lose(self, part: float) -> None:
        """Lose so much of what comes in to the host: 0.1 is each tenth packet, at random.

        :raises LabError: the kernel or iptables cannot; see :func:`missing`.
        """
        problem = _try(self._host, _loss("-A", self.network.name, part))
        if problem:
            raise LabError(problem)

    def keep(self) -> None:
        """Lose nothing of it any more."""
        _try(self._host, ["iptables", "-w", "-F", "INPUT"])

    def disturb(self, *, delay_s: float = 0.0, corrupt: float = 0.0) -> None:
        """Have packets come late, or with a bit changed, in each direction.

        With the kernel's netem; where it has none, with a :class:`~nova_pmt.lab.relay.Relay`.

        :param corrupt: part of the packets, 0 to 1.
        """
        if _netem_is_missing(self._ctl):
            self._put_relay(delay_s, corrupt)
            return
        how = f"root netem delay {delay_s * 1e3:g}ms corrupt {corrupt:.2%}"
        _batch(["tc"], self._ctl, [f"qdisc replace dev {self._port} {how}"])
        _batch(["tc"], self._host, [f"qdisc replace dev {self.network.name} {how}"])

    def settle(self) -> None:
        """Packets are as they were, and at once, again; also when the host has no power."""
        if self._relay is None:
            self.unlimit()
            return
        relay, self._relay = self._relay, None
        relay.close()
        self._take_relay()

    def _put_relay(self, delay_s: float, corrupt: float) -> None:
        inner, outer = f"{self._port}-in", f"{self._port}-out"

        def look() -> tuple[int, socket.socket]:
            return relay.mtu(self._port), relay.open_port(self._port)

        try:
            mtu, near = process.in_network(self._ctl, look)
        except OSError as e:
            raise LabError(f"{self._port} cannot be disturbed: {e}") from e
        with contextlib.ExitStack() as undo:
            undo.callback(near.close)
            lines = [
                f"link set {self._port} nomaster",
                f"link add {inner} mtu {mtu} type veth peer name {outer} mtu {mtu}",
                f"link set {outer} master br-{self.network.name} up",
                f"link set {inner} up",
            ]
            undo.callback(self._take_relay)
            _batch(["ip"], self._ctl, lines)
            far = process.in_network(self._ctl, lambda: relay.open_port(inner))
            self._relay = relay.Relay((near, far), delay_s=delay_s, corrupt=corrupt)
            undo.pop_all()

    def _take_relay(self) -> None:
        back = [f"link del {self._port}-in", f"link set {self._port} master br-{self.network.name}"]
        _batch(["ip"], self._ctl, back, force=True)

    def _demand(self, *commands: Sequence[str]) -> None:
        problem = _try(self._ctl, *commands)
        if problem:
            raise LabError(problem)


#: Chains of ctl's bridges in which a host's packets pass, and which end of the host's cable.
_DIRECTIONS = {
    "in": (("FORWARD", "-o"), ("OUTPUT", "-o")),
    "out": (("FORWARD", "-i"), ("INPUT", "-i")),
}
