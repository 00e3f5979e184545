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

"""Egress buffer in the kernel, for NICs whose packets bypass QEMU (vhost-net).

A filter on the tap redirects what the guest sends to an IFB of ours, whose plugs
(:mod:`nova_pmt.guest.network.plugqdisc`) hold it until its epoch is committed; what they let out
goes on to the bridge as if it came from the tap just now. To hold, count and drop is the kernel's
work: no packet is copied, and one of several segments (GSO) stays one.

A worker that dies leaves the slot of its epoch plugged: packets are held up to its limit, then
dropped. The next worker switches the IFB off, which drops what is held and closes the way, puts new
plugs on it, and switches it on again; the filter stays where it is all the while.

What others do to the tap is looked at from time to time; a filter that is gone, or has one before
it that lets packets pass, makes the buffer :attr:`~PlugBuffer.broken`. Not seen: BPF programs at
the newer tcx hook, which come before all filters.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nova_pmt import exception
from nova_pmt.exception import Refusal
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network import plugqdisc, tapredirect
from nova_pmt.guest.network.base import EgressBuffer, Nic
from nova_pmt.guest.network.plugepochs import POLL_S, Counters, EpochQueue
from nova_pmt.guest.network.plugqdisc import MAX_LIMIT_BYTES, Plugs
from nova_pmt.guest.network.rtnetlink import Request, Rtnl, absent
from nova_pmt.guest.network.tapredirect import Link

DETACH_TIMEOUT_S = 10.0
#: Packets that were on their way to the IFB when its redirection was taken away have arrived after
#: this: whoever still read the old list of filters is long done.
SETTLE_S = 0.02
_ZEROCOPY = Path("/sys/module/vhost_net/parameters/experimental_zcopytx")
_CURE = (
    "Turn vhost off for the interface (<driver name='qemu'/>), or use a kernel with the modules "
    "sch_plug, sch_prio, sch_ingress, cls_matchall, act_mirred and ifb."
)


class PlugBuffer(EgressBuffer):
    """See the module's text."""

    name: ClassVar[str] = "plug"

    def __init__(self, nic: Nic, monitor: Monitor, directory: str, limit_bytes: int) -> None:
        self.nic = nic
        self._tap = nic.tap or ""
        self._limit = min(limit_bytes, MAX_LIMIT_BYTES)
        self._queue: EpochQueue | None = None
        self._counters = Counters()
        self._sockets = contextlib.ExitStack()
        # While there is a queue:
        self._rtnl: Rtnl
        self._links: tuple[Link, Link]  # the tap, our IFB

    # -- before ---------------------------------------------------------------------------

    @classmethod
    def problems(cls, nic: Nic, monitor: Monitor) -> list[Refusal]:
        if nic.tap is None:
            return [
                exception.NoEgressBuffer(
                    f"interface {nic.mac} has no tap on the host, on which the buffer 'plug' "
                    "would hold its packets",
                    cure="Connect the interface to a bridge or to Open vSwitch.",
                )
            ]
        missing = tapredirect.missing_feature()
        if missing:
            return [
                exception.NoEgressBuffer(
                    f"the buffer 'plug' cannot hold what {nic.tap} sends: {missing}", cure=_CURE
                )
            ]
        obstacle = ""
        try:
            with Rtnl() as rtnl:
                _survey(rtnl, nic.tap)
        except OSError as error:
            obstacle = str(error.strerror or error)
        if not obstacle and nic.vhost and _zero_copy():
            return [
                exception.NoEgressBuffer(
                    f"vhost-net sends {nic.tap}'s packets without copying them, and would wait "
                    "for held ones when the guest is paused",
                    cure="Load the module vhost_net with experimental_zcopytx=0, then restart "
                    "the server.",
                )
            ]
        if not obstacle:
            return []
        return [
            exception.NoEgressBuffer(
                f"the buffer 'plug' cannot hold what {nic.tap} sends: {obstacle}",
                cure=f"Look at 'ip -d link show {nic.tap}' and 'tc filter show dev {nic.tap} "
                "ingress' on the host, and take away what is in the way.",
            )
        ]

    # -- putting on -----------------------------------------------------------------------

    def attach(self) -> None:
        if self._queue is not None and not self._queue.broken:
            return
        self.close()
        with self._faults("its packets cannot be held"), contextlib.ExitStack() as undo:
            rtnl = undo.enter_context(Rtnl())
            # Requests of the pause have a socket of their own, where answers to them wait.
            cutter = undo.enter_context(Rtnl())
            found = _survey(rtnl, self._tap)
            ifb = self._own_ifb(rtnl, found, undo)
            rtnl.call(*plugqdisc.construction(ifb.index, self._limit))
            self._lead_to(rtnl, found, ifb, undo)

            def check() -> str:
                return _wiring_fault(rtnl, found.tap, ifb)

            queue = EpochQueue(rtnl, cutter, Plugs(ifb.index), self._limit, check)
            if not queue.look():
                raise OSError(errno.EIO, queue.broken)
            undo.pop_all()
            self._queue, self._counters = queue, queue.counters
            self._rtnl, self._links = rtnl, (found.tap, ifb)
            self._sockets.callback(rtnl.close)
            self._sockets.callback(cutter.close)

    def _own_ifb(self, rtnl: Rtnl, found: _Survey, undo: contextlib.ExitStack) -> Link:
        """Our IFB, made or taken over, which holds nothing and lets nothing pass."""
        ifb = found.ifb
        if ifb is not None:
            # Off: what the dead worker held is dropped, and so is what comes. Its plugs go too,
            # since they would still count packets that are no longer there.
            rtnl.call(tapredirect.set_up(ifb.index, False))
            _unless_absent(rtnl, plugqdisc.demolition(ifb.index))
            return ifb
        name = tapredirect.ifb_name(self._tap)
        rtnl.call(tapredirect.create_ifb(name, found.tap.mtu))
        undo.callback(self._remove, rtnl, name)
        ifb = tapredirect.link(rtnl, name)
        if ifb is None:
            raise OSError(errno.ENODEV, f"{name} was made and is gone")
        return ifb

    @staticmethod
    def _remove(rtnl: Rtnl, name: str) -> None:
        with contextlib.suppress(OSError):
            found = tapredirect.link(rtnl, name)
            if found is not None:
                rtnl.call(tapredirect.delete_link(found.index))

    def _lead_to(self, rtnl: Rtnl, found: _Survey, ifb: Link, undo: contextlib.ExitStack) -> None:
        """Switch the IFB on, and have the tap lead to it."""

        def back(request: Request) -> None:
            with contextlib.suppress(OSError):
                rtnl.call(request)

        tap, note = found.tap, found.note
        ours = note is not None and note.made and note.index == tap.index
        # Written first: if we die before it is made, nothing is there to be taken away.
        made = ours or not found.ingress
        rtnl.call(tapredirect.Note(tap.name, tap.index, made).request(ifb.index))
        tapredirect.quiet(ifb.name)
        rtnl.call(tapredirect.set_up(ifb.index, True))
        if not found.ingress:
            rtnl.call(tapredirect.create_ingress(tap.index))
            undo.callback(back, tapredirect.delete_ingress(tap.index))
        if not any(one.ours and one.target == ifb.index for one in found.filters):
            # Behind one that leads nowhere, and drops: it goes when this one is there.
            create, own = tapredirect.create_filter(tap.index, found.filters, ifb.index)
            rtnl.call(create)
            undo.callback(back, tapredirect.delete_filter(tap.index, own))
        stale = [one for one in found.filters if one.ours and one.target != ifb.index]
        rtnl.call(*(tapredirect.delete_filter(tap.index, one) for one in stale))

    # -- rounds ---------------------------------------------------------------------------

    def cut(self, epoch: int) -> None:
        if self._queue is not None:
            self._queue.cut(epoch)

    def release(self, epoch: int) -> float | None:
        return self._queue.release(epoch) if self._queue is not None else None

    def watch(self, on_output: Callable[[], None]) -> None:
        """The kernel tells nobody of a packet that it holds: it is seen at the next look."""

    @property
    def waiting_since(self) -> float:
        return self._queue.first_at if self._queue is not None else 0.0

    # -- taking off -----------------------------------------------------------------------

    def detach(self) -> None:
        queue = self._queue
        if queue is None:
            return
        rtnl, (tap, ifb) = self._rtnl, self._links
        with self._faults("its packets cannot be let out"):
            deadline = time.monotonic() + DETACH_TIMEOUT_S
            queue.open(deadline)
            found = tapredirect.filters(rtnl, tap.index)
            rtnl.call(*(tapredirect.delete_filter(tap.index, one) for one in found if one.ours))
            _settle(rtnl, queue, ifb.name, deadline)
            _take_off(rtnl, tap.name)
        self._counters.held_bytes = 0
        self.close()

    def close(self) -> None:
        self._queue = None
        self._sockets.close()
        if not self._tap:
            return
        # With the tap gone nobody will look for its IFB again.
        with contextlib.suppress(OSError):
            socket.if_nametoindex(tapredirect.ifb_name(self._tap))
            try:
                socket.if_nametoindex(self._tap)
            except OSError:
                with Rtnl() as rtnl:
                    _take_off(rtnl, self._tap)

    @classmethod
    def recover(cls, nic: Nic, monitor: Monitor) -> bool:
        if nic.tap is None:
            return False
        try:
            with Rtnl() as rtnl:
                return _take_off(rtnl, nic.tap)
        except OSError as error:
            raise exception.GuestError(
                f"the buffer 'plug' cannot be taken off {nic.tap}: {error}", cure=_cure(nic.tap)
            ) from error

    # -- status ---------------------------------------------------------------------------

    @property
    def broken(self) -> str:
        """Why nothing is let out any more; empty while it works."""
        return self._queue.broken if self._queue is not None else ""

    @property
    def pressure(self) -> float:
        if self._queue is not None:
            self._queue.let_out()
        return min(1.0, self._counters.held_bytes / self._limit)

    def summary(self) -> dict[str, Any]:
        counters = self._counters
        return {
            "nic": self.nic.alias,
            "mac": self.nic.mac,
            "buffer": self.name,
            "held_bytes": counters.held_bytes,
            "peak_bytes": counters.peak_bytes,
            "limit_bytes": self._limit,
            "dropped_packets": counters.dropped_packets,
            "released_bytes": counters.released_bytes,
        }

    @contextlib.contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise exception.GuestError(
                f"interface {self.nic.mac} ({self._tap}): {what}: {error.strerror or error}",
                cure=_cure(self._tap),
            ) from error


def _cure(tap: str) -> str:
    return (
        f"Look at 'tc filter show dev {tap} ingress' and "
        f"'tc -s qdisc show dev {tapredirect.ifb_name(tap)}' on the host."
    )


def _zero_copy() -> bool:
    try:
        return _ZEROCOPY.read_text().strip() not in ("0", "N")
    except OSError:
        return False  # not loaded, or so new that it cannot do it any more


def _unless_absent(rtnl: Rtnl, request: Request) -> None:
    try:
        rtnl.call(request)
    except OSError as error:
        if not absent(error):
            raise


@dataclass(frozen=True)
class _Survey:
    """What there is of a tap and of ours.

    :param note: what the IFB says of itself; None when it says nothing, or is not there.
    :param ingress: the tap has an ingress qdisc.
    """

    tap: Link
    ifb: Link | None
    note: tapredirect.Note | None
    ingress: bool
    filters: list[tapredirect.Filter]


def _survey(rtnl: Rtnl, name: str) -> _Survey:
    """Look whether what comes in on an interface can be led to an IFB.

    :raises OSError: it cannot.
    """
    tap = tapredirect.link(rtnl, name)
    if tap is None:
        raise OSError(errno.ENODEV, "there is no such interface on this host")
    if tap.kind != "tun":
        raise OSError(errno.ENOTSUP, f"it is no tap, but of type '{tap.kind or 'unknown'}'")
    if tap.has_xdp:
        raise OSError(errno.EBUSY, "it has an XDP program, which may let packets out")
    ifb = tapredirect.link(rtnl, tapredirect.ifb_name(name))
    note = tapredirect.note_of(ifb, name) if ifb is not None else None
    ingress = tapredirect.has_ingress(rtnl, tap.index)
    filters = tapredirect.filters(rtnl, tap.index)
    obstacle = tapredirect.obstacle(filters)
    if obstacle:
        raise OSError(errno.EBUSY, obstacle)
    return _Survey(tap, ifb, note, ingress, filters)


def _wiring_fault(rtnl: Rtnl, tap: Link, ifb: Link) -> str:
    """What is wrong with the way from the tap to our IFB; empty: nothing."""
    found = tapredirect.filters(rtnl, tap.index)
    own = [one for one in found if one.ours and one.target == ifb.index]
    if not own:
        return f"somebody took our filter off {tap.name}"
    if not tapredirect.is_up(rtnl, ifb.index):
        return f"somebody switched {ifb.name} off"
    return tapredirect.obstacle(found, before=own[0].preference)


def _settle(rtnl: Rtnl, queue: EpochQueue, name: str, deadline: float) -> None:
    """Wait for what is still on its way through the IFB; nothing new comes to it."""
    quiet_since = time.monotonic()
    before = -1
    while time.monotonic() - quiet_since < SETTLE_S:
        ifb = tapredirect.link(rtnl, name)
        if ifb is None:
            raise OSError(errno.ENODEV, f"{name} is gone")
        if queue.packets() or ifb.taken != ifb.passed or ifb.taken != before:
            quiet_since, before = time.monotonic(), ifb.taken
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "the kernel does not let them out")
        time.sleep(POLL_S)


def _take_off(rtnl: Rtnl, name: str) -> bool:
    """Take away all that is ours: the IFB first, so that nothing it holds gets out."""
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        index = 0
    found = False
    note = None
    with contextlib.suppress(OSError):
        socket.if_nametoindex(tapredirect.ifb_name(name))
        found = True
    if found:
        ifb = tapredirect.link(rtnl, tapredirect.ifb_name(name))
        if ifb is not None:
            note = tapredirect.note_of(ifb, name)
            _unless_absent(rtnl, tapredirect.delete_link(ifb.index))
    if not index:
        return found
    filters = tapredirect.filters(rtnl, index)
    ours = [one for one in filters if one.ours]
    for one in ours:
        _unless_absent(rtnl, tapredirect.delete_filter(index, one))
    if note is not None and note.made and note.index == index and len(ours) == len(filters):
        _unless_absent(rtnl, tapredirect.delete_ingress(index))
    return found or bool(ours)
