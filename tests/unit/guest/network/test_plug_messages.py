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

"""What the buffer ``plug`` says to the kernel, and understands of its answers."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

import pytest
from pyroute2.netlink.rtnl.tcmsg import cls_basic, cls_matchall, tcmsg

from nova_pmt.guest.network import plugqdisc, rtnetlink, tapredirect
from nova_pmt.guest.network.plugqdisc import SLOTS, Plugs, Slot
from nova_pmt.guest.network.rtnetlink import Rtnl
from nova_pmt.guest.network.tapredirect import Filter, Link, Note

IFB = 42


def understood(made: bytearray) -> Any:
    """The request as pyroute2 reads it; as much of it as its header says there is."""
    message = tcmsg(bytes(made))
    message.decode()
    assert message["header"]["length"] == len(made)
    return message


# -- plugs ----------------------------------------------------------------------------------


def test_the_root_is_a_prio_with_a_plug_in_each_band() -> None:
    prio, *plugs = (understood(made) for made in plugqdisc.construction(IFB, 1000))
    assert len(plugs) == SLOTS
    assert prio["parent"] == 0xFFFFFFFF and prio.get_attr("TCA_KIND") == "prio"
    assert prio.get_attr("TCA_OPTIONS")["bands"] == SLOTS
    for band, made in enumerate(plugs, 1):
        assert made["index"] == IFB
        assert made["parent"] == prio["handle"] | band
        assert made.get_attr("TCA_KIND") == "plug"
        assert made.get_attr("TCA_OPTIONS")["limit"] == 1000
        flags = made["header"]["flags"]
        assert flags & rtnetlink.NLM_F_CREATE and flags & rtnetlink.NLM_F_EXCL
    assert len({made["handle"] for made in plugs} | {prio["handle"]}) == SLOTS + 1


def test_a_cut_is_one_change_of_the_priority_map() -> None:
    handle = understood(plugqdisc.construction(IFB, 1)[0])["handle"]
    for slot, made in enumerate(Plugs(IFB).turn_to):
        message = understood(made)
        assert (message["index"], message["handle"], message["parent"]) == (IFB, handle, 0)
        assert message["header"]["type"] == rtnetlink.RTM_NEWQDISC
        assert message["header"]["flags"] == rtnetlink.NLM_F_REQUEST | rtnetlink.NLM_F_ACK
        options = message.get_attr("TCA_OPTIONS")
        assert options["bands"] == SLOTS
        assert list(bytes(made)[-16:]) == [slot] * 16


def test_plugs_are_told_by_their_handles_what_to_do() -> None:
    plugs = Plugs(IFB)
    handles = [understood(made)["handle"] for made in plugqdisc.construction(IFB, 1)[1:]]
    actions = {"BUFFER": 0, "RELEASE_ONE": 1, "RELEASE_INDEFINITE": 2, "LIMIT": 3}
    for slot, handle in enumerate(handles):
        told = {
            "BUFFER": plugs.release[slot][0],
            "RELEASE_ONE": plugs.release[slot][1],
            "RELEASE_INDEFINITE": plugs.open[slot],
            "LIMIT": plugs.limit(slot, 4096 + slot),
        }
        for action, made in told.items():
            message = understood(made)
            assert message["handle"] == handle
            assert message.get_attr("TCA_OPTIONS")["action"] == actions[action]
        assert understood(told["LIMIT"]).get_attr("TCA_OPTIONS")["limit"] == 4096 + slot


def test_limits_stay_within_what_the_kernel_can_count() -> None:
    plugs = Plugs(IFB)
    for wanted, given in ((-5, 0), (1 << 40, 0xFFFFFFFF)):
        assert understood(plugs.limit(0, wanted)).get_attr("TCA_OPTIONS")["limit"] == given


def attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", len(content) + 4, kind) + content + b"\0" * (-len(content) % 4)


def a_class(band: int, released: int, packets: int, held: int, dropped: int) -> bytes:
    """A class of our prio as the kernel tells it (see gnet_stats_basic, gnet_stats_queue)."""
    root = understood(plugqdisc.construction(IFB, 1)[0])["handle"]
    child = understood(plugqdisc.construction(IFB, 1)[1 + band])["handle"]
    stats = attribute(1, struct.pack("=QI4x", released, 1))
    stats += attribute(3, struct.pack("=5I", packets, held, dropped, 0, 0))
    head = struct.pack("=B3xiIII", 0, IFB, root | (band + 1), root, child)
    return head + attribute(1, b"prio\0") + attribute(7 | 0x8000, stats)


def test_counters_are_read_from_one_dump() -> None:
    slots = [Slot() for _ in range(SLOTS)]
    dump = [a_class(band, 10 * band, band, 100 * band, band % 3) for band in range(SLOTS)]
    assert plugqdisc.read_classes(dump, slots)
    assert slots[5] == Slot(released_bytes=50, packets=5, held_bytes=500, dropped_packets=2)


def test_counters_of_other_than_our_plugs_are_no_counters() -> None:
    slots = [Slot() for _ in range(SLOTS)]
    dump = [a_class(band, 0, 0, 0, 0) for band in range(SLOTS)]
    assert not plugqdisc.read_classes([], slots)
    assert not plugqdisc.read_classes(dump[:-1], slots)
    other = bytearray(dump[3])
    struct.pack_into("=I", other, 16, 0)  # the band's default queue instead of our plug
    assert not plugqdisc.read_classes([*dump[:3], bytes(other), *dump[4:]], slots)


# -- rtnetlink ------------------------------------------------------------------------------


def test_the_kernel_is_asked_and_its_words_are_understood() -> None:
    """The real one; no privileges are needed to ask."""
    with Rtnl() as rtnl:
        loopback = tapredirect.link(rtnl, "lo")
        assert loopback is not None and loopback.name == "lo" and not loopback.has_xdp
        assert tapredirect.is_up(rtnl, loopback.index) == loopback.up
        assert not tapredirect.is_up(rtnl, 0x7FFFFFF0)
        assert tapredirect.link(rtnl, "pmt-is-not-here") is None
        assert not tapredirect.has_ingress(rtnl, loopback.index)
        assert tapredirect.filters(rtnl, loopback.index) == []


def test_the_first_of_several_faults_is_raised_and_later_calls_work() -> None:
    with Rtnl() as rtnl:
        gone = tapredirect.delete_link(0x7FFFFFF0)
        with pytest.raises(OSError) as caught:
            rtnl.call(gone, bytearray(gone))
        assert caught.value.errno in (errno.ENODEV, errno.EPERM)
        assert tapredirect.link(rtnl, "lo") is not None


def test_answers_are_there_when_they_are_asked_for_later() -> None:
    with Rtnl() as rtnl:
        assert rtnl.answers() == []
        first = rtnl.send(tapredirect.delete_link(0x7FFFFFF0))
        second = rtnl.send(tapredirect.delete_link(0x7FFFFFF0))
        (one, fault), (two, _) = rtnl.answers()
        assert (one, two) == (first, second) and isinstance(fault, OSError)
        assert rtnl.answers() == []


def test_words_of_the_kernel_are_in_the_fault() -> None:
    payload = struct.pack("=i", -errno.EBUSY) + bytes(16) + attribute(1, b"not now\0")
    fault = rtnetlink._fault(memoryview(payload))
    assert fault is not None and fault.errno == errno.EBUSY
    assert fault.strerror == f"{os.strerror(errno.EBUSY)}: not now"
    assert rtnetlink._fault(memoryview(bytes(20))) is None


def test_broken_attributes_end_the_list() -> None:
    good = attribute(1, b"abc") + attribute(2, b"")
    assert [kind for kind, _ in rtnetlink.attributes(memoryview(good))] == [1, 2]
    assert list(rtnetlink.attributes(memoryview(struct.pack("=HH", 2, 1) + good))) == []


# -- the way from the tap -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tap", "ifb"),
    [
        ("vnet0", "pmt-vnet0"),
        ("tap12345678-90", "pmt12345678-90"),
        ("tap123456789abc", "pmt123456789abc"),
        ("a-long-tap-name", "pmt_2f07e82a23"),
    ],
)
def test_each_tap_has_an_ifb_of_its_own_name(tap: str, ifb: str) -> None:
    assert tapredirect.ifb_name(tap) == ifb
    assert len(ifb) < 16


def ifb(alias: str, kind: str = "ifb") -> Link:
    return Link("pmt-vnet0", IFB, kind, alias, 1500, True, False, 0, 0)


def test_the_note_on_the_ifb_comes_back() -> None:
    for made in (True, False):
        text = bytes(Note("vnet0", 7, made).request(IFB))
        alias = text[text.index(b"nova_pmt") :].rstrip(b"\0").decode()
        assert tapredirect.note_of(ifb(alias), "vnet0") == Note("vnet0", 7, made)
    assert tapredirect.note_of(ifb(""), "vnet0") is None


def test_an_interface_that_is_not_ours_is_not_taken() -> None:
    alias = "nova_pmt holds what vnet1 sends (index 7, ingress made)"
    for stranger in (ifb(alias), ifb("somebody's"), ifb("", "dummy")):
        with pytest.raises(FileExistsError):
            tapredirect.note_of(stranger, "vnet0")


def filter_of(kind: str, *actions: dict[str, Any], handle: int = 1, preference: int = 9) -> Filter:
    """A filter as the kernel would tell it, seen with our eyes."""
    plugin = {"matchall": cls_matchall, "basic": cls_basic}.get(kind)
    message = tcmsg()
    message["index"], message["handle"], message["info"] = 1, handle, preference << 16
    message["attrs"] = [("TCA_KIND", kind)]
    if plugin is not None:
        options = plugin.get_parameters({"action": list(actions)} if actions else {})
        message["attrs"].append(("TCA_OPTIONS", options))
    made = rtnetlink.request(message, rtnetlink.RTM_NEWTFILTER)
    return tapredirect._understood(understood(made))


POLICE = {"kind": "police", "rate": "1mbit", "burst": 10000}


@pytest.mark.parametrize("kind", ["matchall", "basic"])
def test_only_filters_that_drop_or_hand_on_are_harmless(kind: str) -> None:
    assert filter_of(kind, {"kind": "gact", "action": "drop"}).harmless
    for action in ("ok", "pipe", "reclassify"):
        assert not filter_of(kind, {"kind": "gact", "action": action}).harmless
    mirror = {"kind": "mirred", "direction": "egress", "action": "mirror", "ifindex": 3}
    assert not filter_of(kind, mirror).harmless
    assert not filter_of(kind, mirror, {"kind": "gact", "action": "drop"}).harmless
    # what conforms passes: tc's default, libvirt's bandwidth
    assert not filter_of(kind, {**POLICE, "action": "drop"}).harmless
    assert not filter_of(kind).harmless
    assert not filter_of("flower").harmless


def test_ours_is_known_by_its_handle_and_tells_where_it_leads() -> None:
    made, own = tapredirect.create_filter(5, [], IFB)
    seen = tapredirect._understood(understood(made))
    assert seen == own == Filter("matchall", 1 << 16 | 0x0300, ours=True, target=IFB)
    redirect = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": IFB}
    assert not filter_of("matchall", redirect).ours


def test_a_redirection_that_fails_drops() -> None:
    """TC_ACT_STOLEN: the packet is ours whether the IFB can take it or not."""
    message = understood(tapredirect.create_filter(5, [], IFB)[0])
    ((_, options),) = tapredirect._actions(message, "TCA_MATCHALL_ACT")
    parameters = options.get_attr("TCA_MIRRED_PARMS")
    assert (parameters["action"], parameters["eaction"]) == (4, 1)


def test_ours_comes_behind_all_others() -> None:
    others = [Filter("matchall", 49 << 16, harmless=True), Filter("basic", 60 << 16, harmless=True)]
    _, own = tapredirect.create_filter(5, others, IFB)
    assert own.preference == 61
    assert tapredirect.obstacle(others) == ""


def test_what_lets_packets_out_is_an_obstacle_only_before_ours() -> None:
    passing = Filter("u32", 50 << 16)
    assert "preference 50" in tapredirect.obstacle([passing])
    assert tapredirect.obstacle([Filter("matchall", 1 << 16, ours=True)]) == ""
    assert tapredirect.obstacle([passing], before=1) == ""
    assert "no preference left" in tapredirect.obstacle(
        [Filter("matchall", 0xFFFF << 16, harmless=True)]
    )
