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

"""Which NICs a guest has, and which egress buffer holds what each of them sends."""

from __future__ import annotations

import itertools
import json
import os
import xml.etree.ElementTree as ET

from nova_pmt import exception
from nova_pmt.exception import Refusal
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network.base import EgressBuffer, Nic
from nova_pmt.plugins import load_class

NAMESPACE = "nova_pmt.egress_buffers"
#: ``auto`` asks them in this order.
AUTOMATIC = ("redirector", "plug")


def _option(text: str, name: str) -> str:
    """An option of one ``-netdev`` argument, which libvirt writes as JSON since 8.1 or so."""
    if text.startswith("{"):
        try:
            value = json.loads(text).get(name, "")
        except ValueError:
            return ""
        return {True: "on", False: "off"}.get(value, str(value))
    return dict(part.partition("=")[::2] for part in text.split(",")).get(name, "")


def _vhost_of(pid: int) -> dict[str, bool]:
    """What QEMU's command line says of each netdev; nothing of what was plugged in later."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        arguments = file.read().decode(errors="replace").split("\0")
    return {
        _option(value, "id"): _option(value, "vhost") == "on"
        for key, value in itertools.pairwise(arguments)
        if key == "-netdev"
    }


def _uses_vhost(pid: int) -> bool:
    """Whether QEMU has vhost-net open for any NIC."""
    directory = f"/proc/{pid}/fd"
    for entry in os.listdir(directory):
        try:
            if os.readlink(f"{directory}/{entry}") == "/dev/vhost-net":
                return True
        except OSError:
            continue
    return False


def nics(xml: str, pid: int) -> tuple[Nic, ...]:
    """The network interfaces of a running domain.

    :param xml: its live XML.
    :param pid: its QEMU's.
    """
    vhost = _vhost_of(pid)
    any_vhost = _uses_vhost(pid)
    found = []
    for interface in ET.fromstring(xml).iterfind("devices/interface"):
        alias, mac = interface.find("alias"), interface.find("mac")
        target, driver = interface.find("target"), interface.find("driver")
        name = (alias.get("name") if alias is not None else None) or "?"
        netdev = f"host{name}"
        queues = driver.get("queues", "1") if driver is not None else "1"
        found.append(
            Nic(
                alias=name,
                netdev=netdev,
                mac=(mac.get("address") if mac is not None else None) or "?",
                tap=target.get("dev") if target is not None else None,
                vhost=any_vhost and vhost.get(netdev, True),
                queues=int(queues) if queues.isdigit() else 1,
            )
        )
    return tuple(found)


def _load(name: str) -> type[EgressBuffer]:
    return load_class(NAMESPACE, name, EgressBuffer)  # type: ignore[type-abstract]


def choose(wanted: str, nic: Nic, monitor: Monitor) -> type[EgressBuffer]:
    """The buffer for a NIC.

    :param wanted: ``auto`` or a plug-in's name.
    :raises nova_pmt.exception.Refusal: none can hold what it sends.
    """
    refusals: list[Refusal] = []
    for name in AUTOMATIC if wanted == "auto" else (wanted,):
        kind = _load(name)
        problems = kind.problems(nic, monitor)
        if not problems:
            return kind
        refusals += problems
    raise exception.NoEgressBuffer(
        f"interface {nic.mac}: " + "; ".join(refusal.message for refusal in refusals),
        cure=refusals[0].cure if len(refusals) == 1 else None,
    )


def problems(wanted: str, found: tuple[Nic, ...], monitor: Monitor) -> list[Refusal]:
    """Why what these NICs send cannot be held; empty when it can."""
    refusals: list[Refusal] = []
    for nic in found:
        try:
            choose(wanted, nic, monitor)
        except Refusal as refusal:
            refusals.append(refusal)
    return refusals


def recover(found: tuple[Nic, ...], monitor: Monitor) -> None:
    """Take every buffer off that a dead worker left. The guest may go on unprotected.

    :raises nova_pmt.exception.GuestError: one of them stays; the others are off.
    """
    failure: exception.GuestError | None = None
    for nic in found:
        for name in AUTOMATIC:
            try:
                _load(name).recover(nic, monitor)
            except exception.GuestError as error:
                failure = failure or error
    if failure is not None:
        raise failure
