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

"""Which NICs there are, and which buffer each of them gets."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from nova_pmt import exception
from nova_pmt.exception import Refusal
from nova_pmt.guest.network import choose
from nova_pmt.guest.network.base import EgressBuffer, Nic
from nova_pmt.guest.network.redirector import RedirectorBuffer

MAC = "52:54:00:00:00:0{}"
MONITOR: Any = object()


@contextlib.contextmanager
def qemu(*arguments: str) -> Iterator[int]:
    """A process with QEMU's command line; that is all that is looked at."""
    process = subprocess.Popen(
        ["sh", "-c", "echo; read _", "qemu-system-x86_64", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()  # before, it may have no command line yet
        yield process.pid
    finally:
        process.communicate()


@pytest.fixture
def vhost_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU has vhost-net open."""
    monkeypatch.setattr(choose, "_uses_vhost", lambda _pid: True)


def interface(number: int, *, alias: bool = True, mac: bool = True, more: str = "") -> str:
    return f"""<interface type='bridge'>
        {f"<mac address='{MAC.format(number)}'/>" if mac else ""}
        <source bridge='br0'/><target dev='vnet{number}'/><model type='virtio'/>{more}
        {f"<alias name='net{number}'/>" if alias else ""}
        </interface>"""


def domain(*interfaces: str) -> str:
    return f"<domain><devices>{''.join(interfaces)}</devices></domain>"


def tap(number: int, vhost: bool, *, as_json: bool) -> tuple[str, str]:
    """As libvirt writes it: JSON since 8.1, and key=value before."""
    if as_json:
        options: dict[str, Any] = {"type": "tap", "fd": "30", "id": f"hostnet{number}"}
        if vhost:
            options |= {"vhost": True, "vhostfd": "32"}
        return "-netdev", json.dumps(options)
    return "-netdev", f"tap,fd=30,id=hostnet{number}" + (",vhost=on,vhostfd=32" if vhost else "")


# -- what there is ----------------------------------------------------------------------


@pytest.mark.usefixtures("vhost_net")
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "key=value"])
def test_each_nic_is_found_with_what_matters_of_it(as_json: bool) -> None:
    xml = domain(
        interface(0, more="<driver name='vhost' queues='4'/>"),
        interface(1, more="<driver name='qemu'/>"),
        interface(2),
    )
    arguments = [tap(0, True, as_json=as_json), tap(1, False, as_json=as_json)]
    with qemu("-name", "guest=web1", *arguments[0], "-device", "x", *arguments[1]) as pid:
        found = choose.nics(xml, pid)
    assert found == (
        Nic("net0", "hostnet0", MAC.format(0), "vnet0", True, queues=4),
        Nic("net1", "hostnet1", MAC.format(1), "vnet1", False),
        # Plugged in later: nothing is known of it, so the worst is taken for true.
        Nic("net2", "hostnet2", MAC.format(2), "vnet2", True),
    )


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "key=value"])
def test_without_vhost_net_open_no_nic_has_it(as_json: bool) -> None:
    with qemu(*tap(0, False, as_json=as_json)) as pid:
        found = choose.nics(domain(interface(0), interface(1)), pid)
    assert [nic.vhost for nic in found] == [False, False]


@pytest.mark.usefixtures("vhost_net")
@pytest.mark.parametrize(
    ("text", "vhost"),
    [
        ('{"type":"tap","id":"hostnet0","vhost":true}', True),
        ('{"type":"tap","id":"hostnet0","vhost":false}', False),
        ('{"type":"tap","id":"hostnet0"}', False),
        ('{"id":"hostnet0","type":"user"}', False),
        ("tap,id=hostnet0,vhost=on", True),
        ("tap,vhost=off,id=hostnet0", False),
        ("id=hostnet0,type=tap", False),
        ("tap,ifname=a=b,id=hostnet0,vhost=on", True),
        # what cannot be read leaves nothing known of hostnet0
        ('{"type":"tap","id":"hostnet0"', True),
        ("", True),
        ("tap,id=hostnet01,vhost=off", True),
    ],
)
def test_all_forms_of_a_netdev_are_read(text: str, vhost: bool) -> None:
    with qemu("-netdev", text) as pid:
        (nic,) = choose.nics(domain(interface(0)), pid)
    assert nic.vhost == vhost


@pytest.mark.usefixtures("vhost_net")
def test_a_command_line_that_ends_with_netdev_is_read() -> None:
    with qemu("-netdev") as pid:
        (nic,) = choose.nics(domain(interface(0)), pid)
    assert nic.vhost


def test_vhost_net_is_found_among_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose._uses_vhost(os.getpid()) is False
    real = os.readlink

    def readlink(path: str) -> str:
        if path.endswith("/1"):
            raise FileNotFoundError("closed just now")
        return "/dev/vhost-net" if path == f"/proc/{os.getpid()}/fd/2" else real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    assert choose._uses_vhost(os.getpid()) is True


def test_an_interface_of_which_libvirt_says_little_is_there_all_the_same() -> None:
    xml = domain(
        interface(0, alias=False, mac=False),
        "<interface type='user'/>",
        interface(2, more="<driver queues='many'/>"),
    )
    found = choose.nics(xml, os.getpid())
    assert [nic.mac for nic in found] == ["?", "?", MAC.format(2)]
    assert [nic.alias for nic in found] == ["?", "?", "net2"]
    assert [nic.tap for nic in found] == ["vnet0", None, "vnet2"]
    assert [nic.queues for nic in found] == [1, 1, 1]


def test_an_alias_that_a_user_chose_is_that_of_the_netdev() -> None:
    xml = domain("<interface type='bridge'><alias name='ua-front'/></interface>")
    (nic,) = choose.nics(xml, os.getpid())
    assert nic.netdev == "hostua-front"


def test_a_guest_without_nics_has_none() -> None:
    assert choose.nics("<domain><devices/></domain>", os.getpid()) == ()
    assert choose.nics("<domain/>", os.getpid()) == ()


# -- what each gets ---------------------------------------------------------------------

NIC = Nic("net0", "hostnet0", MAC.format(0), "vnet0", False)
OTHER = Nic("net1", "hostnet1", MAC.format(1), "vnet1", True)


class Plug(EgressBuffer):
    """A plug-in that refuses what the test says, and remembers what it was asked."""

    refusals: ClassVar[dict[str, Refusal]]
    log: ClassVar[list[tuple[str, str, str]]]

    @classmethod
    def problems(cls, nic: Nic, monitor: Any) -> list[Refusal]:
        assert monitor is MONITOR
        cls.log.append(("problems", cls.name, nic.alias))
        return [cls.refusals[nic.alias]] if nic.alias in cls.refusals else []

    @classmethod
    def recover(cls, nic: Nic, monitor: Any) -> bool:
        cls.log.append(("recover", cls.name, nic.alias))
        return False


Log = list[tuple[str, str, str]]


@pytest.fixture
def log() -> Log:
    return []


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch, log: Log) -> dict[str, type[Plug]]:
    made = {
        name: type(name, (Plug,), {"name": name, "refusals": {}, "log": log})
        for name in ("redirector", "plug", "third")
    }
    monkeypatch.setattr(choose, "_load", made.__getitem__)
    return made


def test_auto_takes_the_first_that_can(kinds: dict[str, type[Plug]], log: Log) -> None:
    assert choose.choose("auto", NIC, MONITOR) is kinds["redirector"]
    assert log == [("problems", "redirector", "net0")]  # the other is not even asked


def test_auto_takes_the_second_when_the_first_cannot(
    kinds: dict[str, type[Plug]], log: Log
) -> None:
    kinds["redirector"].refusals["net1"] = exception.NoEgressBuffer("vhost")
    assert choose.choose("auto", OTHER, MONITOR) is kinds["plug"]
    assert [name for _, name, _ in log] == ["redirector", "plug"]
    assert choose.choose("auto", NIC, MONITOR) is kinds["redirector"]  # each NIC by itself


def test_a_plug_in_that_is_named_is_the_only_one_asked(
    kinds: dict[str, type[Plug]], log: Log
) -> None:
    assert choose.choose("third", NIC, MONITOR) is kinds["third"]
    kinds["plug"].refusals["net0"] = exception.NoEgressBuffer("no sch_plug", cure="modprobe it")
    with pytest.raises(exception.NoEgressBuffer) as caught:
        choose.choose("plug", NIC, MONITOR)
    assert {name for _, name, _ in log} == {"third", "plug"}
    assert caught.value.message == f"interface {NIC.mac}: no sch_plug"
    assert caught.value.cure == "modprobe it"


def test_a_refusal_tells_why_each_cannot(kinds: dict[str, type[Plug]]) -> None:
    kinds["redirector"].refusals["net0"] = exception.NoEgressBuffer("it has vhost", cure="one")
    kinds["plug"].refusals["net0"] = exception.NoEgressBuffer("no sch_plug", cure="two")
    with pytest.raises(exception.NoEgressBuffer) as caught:
        choose.choose("auto", NIC, MONITOR)
    assert caught.value.code == "NO_EGRESS_BUFFER"
    assert caught.value.message == f"interface {NIC.mac}: it has vhost; no sch_plug"
    assert caught.value.cure == exception.NoEgressBuffer.cure  # no single one would do


def test_every_nic_that_cannot_be_held_is_told(kinds: dict[str, type[Plug]]) -> None:
    assert choose.problems("auto", (NIC, OTHER), MONITOR) == []
    for kind in kinds.values():
        kind.refusals["net1"] = exception.NoEgressBuffer(f"not {kind.name}")
    (refusal,) = choose.problems("auto", (NIC, OTHER), MONITOR)
    assert OTHER.mac in refusal.message
    kinds["redirector"].refusals["net0"] = exception.UnsupportedQemu("no filters")
    found = choose.problems("redirector", (NIC, OTHER), MONITOR)
    assert [type(refusal) for refusal in found] == [exception.NoEgressBuffer] * 2
    assert found[0].cure == exception.UnsupportedQemu.cure


def test_recovery_asks_every_buffer_of_every_nic(kinds: dict[str, type[Plug]], log: Log) -> None:
    choose.recover((NIC, OTHER), MONITOR)
    assert sorted(log) == sorted(
        ("recover", name, nic.alias) for name in choose.AUTOMATIC for nic in (NIC, OTHER)
    )


def test_a_buffer_that_cannot_be_taken_off_does_not_keep_the_others_closed(
    kinds: dict[str, type[Plug]], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest whose worker died is cut off until this is done."""

    def fails(cls: type[Plug], nic: Nic, monitor: Any) -> bool:
        if nic is NIC:
            raise exception.GuestError("QEMU refused", code="QMP_ERROR")
        return Plug.recover.__func__(cls, nic, monitor)  # type: ignore[attr-defined]

    monkeypatch.setattr(kinds["redirector"], "recover", classmethod(fails))
    with contextlib.suppress(exception.GuestError):
        choose.recover((NIC, OTHER), MONITOR)
    assert {("recover", "plug", "net0"), ("recover", "redirector", "net1")} <= set(log)


def test_the_plug_ins_are_installed() -> None:
    assert choose._load("redirector") is RedirectorBuffer
    assert issubclass(choose._load("plug"), EgressBuffer)
    for name in choose.AUTOMATIC:
        assert choose._load(name).name == name


def test_a_plug_in_that_is_not_installed_is_told() -> None:
    with pytest.raises(exception.PmtError):
        choose.choose("nothing", NIC, MONITOR)
