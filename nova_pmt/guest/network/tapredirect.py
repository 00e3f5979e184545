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

"""The way from a guest's tap to our IFB: an ingress qdisc, and a filter that redirects.

What a guest sends comes in on its tap. The kernel asks the filters of the tap's ingress before it
gives a packet to the bridge or to Open vSwitch; ours gives every packet to the IFB. What the IFB
lets out goes on where it was taken, past all filters (drivers/net/ifb.c, ``tc_skip_classify``), and
past chains of nftables' netdev family.

So a filter behind ours never sees a packet while ours is there, and a filter before ours that has a
packet pass lets it out unheld. The only filters that can be lived with are before ours and either
drop a packet or leave it to the next; that is what Open vSwitch makes of Neutron's bandwidth limits
(``police`` with ``conform-exceed drop/continue``). With none there ours gets preference 1, which
nothing can come before.

A redirection whose IFB is down or gone drops (net/sched/act_mirred.c): closed, as it should be.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from socket import htons
from typing import Any

from nova_pmt.guest.network import plugqdisc, rtnetlink
from nova_pmt.guest.network.rtnetlink import Request, Rtnl, absent, attributes, request

_IFNAMSIZ = 16
_IFF_UP = 0x1
_ETH_P_ALL = 0x0003
_TC_H_INGRESS = 0xFFFFFFF1
#: Filters of the ingress hook, whether its qdisc is "ingress" or "clsact".
_INGRESS_FILTERS = 0xFFFFFFF2
_INGRESS_HANDLE = 0xFFFF0000
_TCA_INGRESS_BLOCK = 13
_TCMSG_BYTES = 20
#: Handle of our filter ("pmt"), a matchall.
_OURS = 0x706D74
_MAX_PREFERENCE = 0xFFFF
#: What an action may decide: drop the packet; leave it to the next filter.
_HARMLESS = {2, 0xFFFFFFFF}
_NOTE = re.compile(r"nova_pmt holds what (\S+) sends \(index (\d+), ingress (made|found)\)")
_CLONE_NEWNET = 0x40000000


# -- interfaces -----------------------------------------------------------------------------


def ifb_name(tap: str) -> str:
    """Name of our IFB for a tap; at most 15 characters, and no other tap's.

    ``vnet0`` has ``pmt-vnet0``, Neutron's ``tap12345678-90`` has ``pmt12345678-90``.
    """
    name = f"pmt-{tap}"
    if len(name) < _IFNAMSIZ:
        return name
    if tap.startswith("tap"):
        return f"pmt{tap[3:]}"
    return f"pmt_{hashlib.blake2b(tap.encode(), digest_size=5).hexdigest()}"


@dataclass(frozen=True)
class Link:
    """A network interface of this host.

    :param taken: packets that an IFB took and must pass on; :param passed: that it passed on.
    """

    name: str
    index: int
    kind: str
    alias: str
    mtu: int
    up: bool
    has_xdp: bool
    taken: int
    passed: int


def link(rtnl: Rtnl, name: str) -> Link | None:
    """The interface of that name; None when there is none."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    try:
        answers = rtnl.ask(_link_request(rtnetlink.RTM_GETLINK, IFLA_IFNAME=name))
    except OSError as error:
        if absent(error):
            return None
        raise
    found = _decoded(ifinfmsg, answers[0])
    counts = found.get_attr("IFLA_STATS64") or {}
    return Link(
        name=name,
        index=found["index"],
        kind=found.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "",
        alias=found.get_attr("IFLA_IFALIAS") or "",
        mtu=found.get_attr("IFLA_MTU") or 0,
        up=bool(found["flags"] & _IFF_UP),
        has_xdp=bool(found.get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED")),
        taken=counts.get("rx_packets", 0) - counts.get("rx_dropped", 0),
        passed=counts.get("tx_packets", 0),
    )


def _decoded(kind: Any, answer: bytes) -> Any:
    """pyroute2's object for a message that came without its header."""
    message = kind((len(answer) + 16).to_bytes(4, "little") + bytes(12) + answer)
    message.decode()
    return message


def _link_request(kind: int, flags: int = 0, index: int = 0, **attrs: Any) -> Request:
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    message["attrs"] = list(attrs.items())
    return request(message, kind, flags | rtnetlink.NLM_F_ACK)


def create_ifb(name: str, mtu: int) -> Request:
    """Make an IFB; it is down."""
    return _link_request(
        rtnetlink.RTM_NEWLINK,
        rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL,
        IFLA_IFNAME=name,
        IFLA_MTU=mtu,
        IFLA_LINKINFO={"attrs": [("IFLA_INFO_KIND", "ifb")]},
    )


def delete_link(index: int) -> Request:
    """Take an interface away, with all that is in its queue."""
    return _link_request(rtnetlink.RTM_DELLINK, index=index)


def set_up(index: int, up: bool) -> Request:
    """Switch an interface on, or off: then what is in its queue is dropped."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    message["flags"], message["change"] = (_IFF_UP if up else 0), _IFF_UP
    return request(message, rtnetlink.RTM_NEWLINK, rtnetlink.NLM_F_ACK)


def is_up(rtnl: Rtnl, index: int) -> bool:
    """Whether an interface is there, and on; without pyroute2."""
    ask = rtnetlink.plain(rtnetlink.RTM_GETLINK, rtnetlink.NLM_F_ACK, index, 0, 0)
    try:
        (answer,) = rtnl.ask(ask)
    except OSError as error:
        if absent(error):
            return False
        raise
    return bool(int.from_bytes(answer[8:12], "little") & _IFF_UP)  # ifinfomsg.ifi_flags


def quiet(name: str) -> None:
    """The host shall not talk over our IFB: its packets would count as the guest's."""
    with (
        contextlib.suppress(OSError),
        open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as f,
    ):
        f.write("1")


@dataclass(frozen=True)
class Note:
    """What our IFB's alias tells the next worker, and people: whose packets it holds.

    :param made: the tap's ingress qdisc is ours, to be taken away again.
    """

    tap: str
    index: int
    made: bool

    def request(self, ifb: int) -> Request:
        made = "made" if self.made else "found"
        text = f"nova_pmt holds what {self.tap} sends (index {self.index}, ingress {made})"
        return _link_request(rtnetlink.RTM_NEWLINK, index=ifb, IFLA_IFALIAS=text)


def note_of(ifb: Link, tap: str) -> Note | None:
    """The note on our IFB; None when a worker died before it wrote one.

    :raises FileExistsError: it is not our IFB for that tap.
    """
    found = _NOTE.fullmatch(ifb.alias)
    if ifb.kind == "ifb" and not ifb.alias:
        return None
    if ifb.kind != "ifb" or found is None or found[1] != tap:
        raise FileExistsError(errno.EEXIST, f"interface {ifb.name} is there, and not ours")
    return Note(found[1], int(found[2]), found[3] == "made")


# -- the ingress qdisc ----------------------------------------------------------------------


def _tc_request(kind: int, flags: int, **fields: Any) -> Request:
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    message = tcmsg()
    for name, value in fields.items():
        message[name] = value
    return request(message, kind, flags | rtnetlink.NLM_F_ACK)


def has_ingress(rtnl: Rtnl, index: int) -> bool:
    """Whether an interface has an ingress qdisc, ours or another's.

    :raises OSError: EBUSY when it shares its filters with other interfaces.
    """
    # NLM_F_ECHO: otherwise only those who listen to traffic control are answered.
    ask = _tc_request(
        rtnetlink.RTM_GETQDISC, rtnetlink.NLM_F_ECHO, index=index, parent=_TC_H_INGRESS
    )
    try:
        answers = rtnl.ask(ask)
    except OSError as error:
        if absent(error):
            return False
        raise
    for answer in answers:
        kinds = {kind for kind, _ in attributes(memoryview(answer)[_TCMSG_BYTES:])}
        if _TCA_INGRESS_BLOCK in kinds:
            raise OSError(errno.EBUSY, "it shares its filters with others (ingress_block)")
    return bool(answers)


def create_ingress(index: int) -> Request:
    """Give an interface an ingress qdisc; "ingress", with which nobody can have egress filters."""
    return _tc_request(
        rtnetlink.RTM_NEWQDISC,
        rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL,
        index=index,
        parent=_TC_H_INGRESS,
        handle=_INGRESS_HANDLE,
        attrs=[("TCA_KIND", "ingress")],
    )


def delete_ingress(index: int) -> Request:
    return _tc_request(
        rtnetlink.RTM_DELQDISC,
        0,
        index=index,
        parent=_TC_H_INGRESS,
        handle=_INGRESS_HANDLE,
        attrs=[("TCA_KIND", "ingress")],
    )


# -- filters --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filter:
    """A filter of an interface's ingress.

    :param info: preference and protocol, as in ``tcmsg``.
    :param target: index of the interface to which ours redirects; 0: that one is gone.
    :param harmless: another's, that drops packets or leaves them to the next filter.
    """

    kind: str
    info: int
    ours: bool = False
    target: int = 0
    harmless: bool = False

    @property
    def preference(self) -> int:
        return self.info >> 16


def filters(rtnl: Rtnl, index: int) -> list[Filter]:
    """The filters of an interface's ingress."""
    ask = rtnetlink.plain(
        rtnetlink.RTM_GETTFILTER, rtnetlink.NLM_F_DUMP, index, 0, _INGRESS_FILTERS, 0
    )
    found = []
    for answer in rtnl.ask(ask):
        from pyroute2.netlink.rtnl.tcmsg import tcmsg

        message = _decoded(tcmsg, answer)
        # A preference is told once for itself, without options, then with each of its filters.
        if message["handle"] or message.get_attr("TCA_OPTIONS"):
            found.append(_understood(message))
    return found


def _understood(message: Any) -> Filter:
    kind, info = str(message.get_attr("TCA_KIND")), int(message["info"])
    if kind not in ("matchall", "basic"):
        return Filter(kind, info)
    actions = list(_actions(message, f"TCA_{kind.upper()}_ACT"))
    if kind == "matchall" and message["handle"] == _OURS:
        for action, options in actions:
            if action == "mirred":
                return Filter(kind, info, True, options.get_attr("TCA_MIRRED_PARMS")["ifindex"])
    verdicts = {verdict for action in actions for verdict in _verdicts(*action)}
    # Without an action a packet that matches passes.
    return Filter(kind, info, harmless=bool(verdicts) and verdicts <= _HARMLESS)


def _actions(message: Any, name: str) -> Iterator[tuple[str, Any]]:
    for _, action in (message.get_nested("TCA_OPTIONS", name) or {"attrs": []})["attrs"]:
        yield str(action.get_attr("TCA_ACT_KIND")), action.get_attr("TCA_ACT_OPTIONS")


def _verdicts(kind: str, options: Any) -> set[int]:
    """What an action may decide of a packet; of one that we do not know, anything."""
    if kind == "gact" and not options.get_attr("TCA_GACT_PROB"):
        return {options.get_attr("TCA_GACT_PARMS")["action"] & 0xFFFFFFFF}
    if kind == "police":
        conforms = options.get_attr("TCA_POLICE_RESULT") or 0
        return {options.get_attr("TCA_POLICE_TBF")["action"] & 0xFFFFFFFF, conforms & 0xFFFFFFFF}
    return {0}


def obstacle(found: list[Filter], before: int = _MAX_PREFERENCE) -> str:
    """What among the filters would let packets out, or not see them any more; empty: nothing.

    :param before: look at the filters before this preference.
    """
    for one in found:
        if not one.ours and not one.harmless and one.preference < before:
            return (
                f"there is a filter '{one.kind}' (preference {one.preference}) that may do other "
                "than drop packets or leave them to the next filter"
            )
    if max((one.preference for one in found), default=0) >= _MAX_PREFERENCE:
        return "there is no preference left behind its filters"
    return ""


def _filter_message(index: int, info: int) -> Any:
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    message = tcmsg()
    message["index"] = index
    message["parent"] = _INGRESS_FILTERS
    message["handle"] = _OURS
    message["info"] = info
    message["attrs"] = [("TCA_KIND", "matchall")]
    return message


def create_filter(index: int, found: list[Filter], target: int) -> tuple[Request, Filter]:
    """Send what comes in on an interface to ``target``, behind the filters that are there."""
    from pyroute2.netlink.rtnl.tcmsg import cls_matchall

    preference = max((one.preference for one in found), default=0) + 1
    made = Filter("matchall", preference << 16 | htons(_ETH_P_ALL), True, target)
    message = _filter_message(index, made.info)
    # pyroute2 has a redirection "steal" packets: one that fails does not let them pass.
    action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target}
    options = cls_matchall.get_parameters({"action": action})
    message["attrs"].append(("TCA_OPTIONS", options))
    flags = rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL | rtnetlink.NLM_F_ACK
    return request(message, rtnetlink.RTM_NEWTFILTER, flags), made


def delete_filter(index: int, one: Filter) -> Request:
    """Take away a filter of ours."""
    message = _filter_message(index, one.info)
    return request(message, rtnetlink.RTM_DELTFILTER, rtnetlink.NLM_F_ACK)


# -- what the kernel can do -----------------------------------------------------------------


class _Missing(Exception):
    pass


def missing_feature() -> str:
    """What this host's kernel cannot do that the buffer needs; empty: it can.

    Found by doing it, in a network namespace that is gone afterwards. That it can is remembered.
    """
    try:
        _try_features()
    except _Missing as error:
        return str(error)
    return ""


@functools.cache
def _try_features() -> None:
    found: list[str] = []

    def attempt() -> None:  # in a thread, since its network namespace cannot be given back
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET):
            number = ctypes.get_errno()
            found.append(f"no network namespace can be made to try it: {os.strerror(number)}")
            return
        step = ""
        try:
            with Rtnl() as rtnl:
                step = "no interfaces of type 'ifb'"
                rtnl.call(create_ifb("pmt-probe", 1500))
                ifb = link(rtnl, "pmt-probe")
                assert ifb is not None
                step = "no queueing discipline 'prio'"
                prio, plug, *more = plugqdisc.construction(ifb.index, 1)
                rtnl.call(prio)
                step = "no queueing discipline 'plug'"
                rtnl.call(plug, *more)
                step = "no queueing discipline 'ingress'"
                loopback = 1
                rtnl.call(create_ingress(loopback))
                step = "no filter 'matchall' with action 'mirred'"
                rtnl.call(create_filter(loopback, [], ifb.index)[0])
        except OSError as error:
            found.append(f"the kernel has {step}: {error.strerror}")

    with ThreadPoolExecutor(1, "plug-probe") as thread:
        thread.submit(attempt).result()
    if found:
        raise _Missing(found[0])
