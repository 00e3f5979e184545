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

"""One IFB with a ``sch_plug`` for each epoch that may be under way.

Why not one ``sch_plug`` for all: it knows one finished epoch. A second TCQ_PLUG_BUFFER before the
first TCQ_PLUG_RELEASE_ONE forgets how many packets the first epoch had and releases as many as the
second had: packets of an epoch that is not committed (net/sched/sch_plug.c; shown by
``tests/functional/plug_inside.py``). It also moves its counters without the queue's lock.

So the IFB's root is a ``sch_prio`` whose bands, the *slots*, are one plug each. All packets go to
the slot of the epoch under way. A cut is one request that turns the priority map to the next slot;
the kernel does that under the queue's lock, so a packet is either before it or after it. To release
an epoch is TCQ_PLUG_BUFFER and TCQ_PLUG_RELEASE_ONE on its slot, where nothing comes in any more:
the plug counts right, and plugs itself again when it has let out what it counted.

Slots take turns. ``sch_prio`` empties the lower band first, so an epoch in a higher band has to be
out before a later one in a lower band is released.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nova_pmt.guest.network import rtnetlink
from nova_pmt.guest.network.rtnetlink import Request, Rtnl, attributes, request

#: As many as ``sch_prio`` can have: for epochs that wait (at most 8, ``[checkpoint]
#: pipeline_depth``), the one under way, and those that still leave.
SLOTS = 16
#: Largest limit that ``sch_plug`` can have.
MAX_LIMIT_BYTES = 0xFFFFFFFF

BUFFER, RELEASE_ONE, RELEASE_INDEFINITE, LIMIT = (
    "TCQ_PLUG_BUFFER",
    "TCQ_PLUG_RELEASE_ONE",
    "TCQ_PLUG_RELEASE_INDEFINITE",
    "TCQ_PLUG_LIMIT",
)

_TC_H_ROOT = 0xFFFFFFFF
#: Our handles: nobody's packets have a priority that names them.
_ROOT = 0x9E30 << 16
_PRIORITIES = 16
_WORD = struct.Struct("=I")
#: In a request: after nlmsghdr; family, interface come before.
_HANDLE_AT, _PARENT_AT = 24, 28

_TCMSG = struct.Struct("=B3xiIII")
_TCA_STATS2 = 7
_TCA_STATS_BASIC, _TCA_STATS_QUEUE = 1, 3
_BASIC = struct.Struct("=QI")
#: qlen, backlog, drops
_QUEUE = struct.Struct("=III")


def _handle(slot: int) -> int:
    return _ROOT + ((slot + 1) << 16)


def _qdisc(index: int, handle: int, parent: int, kind: str, options: Any, flags: int) -> Request:
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    message = tcmsg()
    message["index"] = index
    message["handle"] = handle
    message["parent"] = parent
    message["attrs"] = [("TCA_KIND", kind), ("TCA_OPTIONS", options)]
    return request(message, rtnetlink.RTM_NEWQDISC, flags | rtnetlink.NLM_F_ACK)


def plug(index: int, handle: int, parent: int, action: str, limit: int, flags: int) -> Request:
    """A request about a ``sch_plug``: to make it, or to tell it something."""
    from pyroute2.netlink.rtnl.tcmsg import sched_plug

    options = sched_plug.get_parameters({"action": action, "limit": limit})
    return _qdisc(index, handle, parent, "plug", options, flags)


def _prio(index: int, parent: int, flags: int) -> Request:
    """A request that makes our ``sch_prio``, or changes it: all packets go to slot 0."""
    options = {"bands": SLOTS, "priomap": [0] * _PRIORITIES}
    return _qdisc(index, _ROOT, parent, "prio", options, flags)


def _for_slot(template: Request, slot: int, parent: bool = False) -> Request:
    """The same request about another slot's plug; pyroute2 would take its time for each."""
    made = bytearray(template)
    _WORD.pack_into(made, _HANDLE_AT, _handle(slot))
    if parent:
        _WORD.pack_into(made, _PARENT_AT, _ROOT | (slot + 1))
    return made


def construction(index: int, limit: int) -> list[Request]:
    """Requests that put the plugs on an IFB that is down and has no queue of its own."""
    new = rtnetlink.NLM_F_CREATE | rtnetlink.NLM_F_EXCL
    template = plug(index, 0, 0, BUFFER, limit, new)
    plugs = (_for_slot(template, slot, parent=True) for slot in range(SLOTS))
    return [_prio(index, _TC_H_ROOT, new), *plugs]


def demolition(index: int) -> Request:
    """Take the queue off an IFB, with all that is in it."""
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    message = tcmsg()
    message["index"] = index
    message["parent"] = _TC_H_ROOT
    return request(message, rtnetlink.RTM_DELQDISC, rtnetlink.NLM_F_ACK)


@dataclass
class Slot:
    """What the kernel says of one slot; counts are from when it was made."""

    released_bytes: int = 0
    packets: int = 0
    held_bytes: int = 0
    dropped_packets: int = 0


class Plugs:
    """Requests to the plugs of one IFB, all made beforehand."""

    def __init__(self, index: int) -> None:
        def all_slots(action: str) -> list[Request]:
            template = plug(index, 0, 0, action, 0, 0)
            return [_for_slot(template, slot) for slot in range(SLOTS)]

        turn = _prio(index, 0, 0)
        #: To send in a pause: what comes from now on goes to this slot.
        self.turn_to = [turn[:-_PRIORITIES] + bytes([slot]) * _PRIORITIES for slot in range(SLOTS)]
        #: Let out what is in the slot; right only when nothing comes in any more.
        self.release = list(zip(all_slots(BUFFER), all_slots(RELEASE_ONE), strict=True))
        #: The slot holds nothing from now on.
        self.open = all_slots(RELEASE_INDEFINITE)
        self._limits = all_slots(LIMIT)
        self._look = rtnetlink.plain(rtnetlink.RTM_GETTCLASS, rtnetlink.NLM_F_DUMP, index, 0, 0, 0)

    def limit(self, slot: int, limit_bytes: int) -> Request:
        """The slot drops what would make it hold more than this; kept until the next call."""
        made = self._limits[slot]
        _WORD.pack_into(made, len(made) - _WORD.size, max(0, min(limit_bytes, MAX_LIMIT_BYTES)))
        return made

    def look(self, rtnl: Rtnl, slots: list[Slot]) -> bool:
        """Read all counters into ``slots``; false when these are not our plugs any more."""
        return read_classes(rtnl.ask(self._look), slots)


def read_classes(classes: Iterable[bytes], slots: list[Slot]) -> bool:
    """Read a dump of our ``sch_prio``'s classes into ``slots``; false unless all are there.

    One question about one device, answered to us alone: a question about the qdisc itself would
    be answered to every process that listens to traffic control.
    """
    found = 0
    for data in classes:
        _, _, handle, _, info = _TCMSG.unpack_from(data)
        number = (handle & 0xFFFF) - 1
        if handle & 0xFFFF0000 != _ROOT or number >= len(slots) or info != _handle(number):
            continue
        for kind, value in attributes(memoryview(data)[_TCMSG.size :]):
            if kind != _TCA_STATS2:
                continue
            slot = slots[number]
            for part, numbers in attributes(value):
                if part == _TCA_STATS_BASIC:
                    slot.released_bytes, _ = _BASIC.unpack_from(numbers)
                elif part == _TCA_STATS_QUEUE:
                    queue = _QUEUE.unpack_from(numbers)
                    slot.packets, slot.held_bytes, slot.dropped_packets = queue
            found += 1
    return found == len(slots)
