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
goes on to the bridge as if it came from the tap just now. Holding, counting and dropping is the
kernel's work: no packet is copied, and a packet of several segments stays one (GSO).

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
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nova_pmt import exception
from nova_pmt.exception import Refusal
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network import plugqdisc, tapredirect
from nova_pmt.guest.network.base import EgressBuffer, Nic
from nova_pmt.guest.network.plugqdisc import MAX_LIMIT_BYTES, SLOTS, Plugs, Slot
from nova_pmt.guest.network.rtnetlink import Request, Rtnl, absent

#: How often it is looked whether the tap still leads to our IFB.
WIRING_CHECK_S = 0.5
#: The wait for an earlier epoch to be out, before a later one would overtake it.
ORDER_TIMEOUT_S = 0.02
DETACH_TIMEOUT_S = 10.0
#: Packets that were on their way to the IFB when its redirection was taken away have arrived
#: after this: the kernel's readers of the filter list are done by then (RCU).
SETTLE_S = 0.02
POLL_S = 0.0005
_ZEROCOPY = Path("/sys/module/vhost_net/parameters/experimental_zcopytx")
_CURE = (
    "Turn vhost off for the interface (<driver name='qemu'/>), or use a kernel with the modules "
    "sch_plug, sch_prio, sch_ingress, cls_matchall, act_mirred and ifb."
)


@dataclass(frozen=True)
class _Epoch:
    """An epoch that was cut: its packets wait in a slot, the first since ``first_at`` or later."""

    number: int
    slot: int
    first_at: float


class PlugBuffer(EgressBuffer):
    """See the module's text."""

    name: ClassVar[str] = "plug"

    def __init__(self, nic: Nic, monitor: Monitor, directory: str, limit_bytes: int) -> None:
        self.nic = nic
        self._tap = nic.tap or ""
        self._limit = min(limit_bytes, MAX_LIMIT_BYTES)
        self._rtnl: Rtnl | None = None
        # Requests of the pause have a socket of their own: answers to them wait there.
        self._cutter: Rtnl | None = None
        self._plugs: Plugs | None = None
        self._tap_index = self._ifb_index = 0
        self._broken = ""
        self._peak = self._held = self._dropped = self._released = 0
        self._reset()

    def _reset(self) -> None:
        """As the plugs are when they are new."""
        self._slots = [Slot() for _ in range(SLOTS)]
        self._limits = [self._limit] * SLOTS
        self._current = 0
        #: Slots after the current one that are known to be empty.
        self._ready = SLOTS - 1
        self._waiting: deque[_Epoch] = deque()
        #: Slots that were released and not yet seen empty.
        self._leaving: list[int] = []
        self._entered = 0
        self._first_at = 0.0
        self._cut_at = self._looked_at = self._checked_at = time.monotonic()

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
        try:
            with Rtnl() as rtnl:
                obstacle = _obstacle(rtnl, nic.tap)
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
        if self._plugs is not None and not self._broken:
            return
        self.close()
        with self._faults("its packets cannot be held"), contextlib.ExitStack() as undo:
            rtnl = undo.enter_context(Rtnl())
            cutter = undo.enter_context(Rtnl())
            obstacle = _obstacle(rtnl, self._tap)
            if obstacle:
                raise OSError(errno.EBUSY, obstacle)
            tap = tapredirect.link(rtnl, self._tap)
            assert tap is not None  # _obstacle looked
            ifb, note = self._own_ifb(rtnl, tap, undo)
            rtnl.call(*plugqdisc.construction(ifb.index, self._limit))
            self._lead_to(rtnl, tap, ifb, note, undo)
            plugs = Plugs(ifb.index)
            self._reset()
            if not plugs.look(rtnl, self._slots):
                raise OSError(errno.EIO, f"the plugs on {ifb.name} are not what was asked for")
            self._broken = ""
            self._rtnl, self._cutter, self._plugs = rtnl, cutter, plugs
            self._tap_index, self._ifb_index = tap.index, ifb.index
            undo.pop_all()

    def _own_ifb(
        self, rtnl: Rtnl, tap: tapredirect.Link, undo: contextlib.ExitStack
    ) -> tuple[tapredirect.Link, tapredirect.Note | None]:
        """Our IFB, made or taken over, which holds nothing and lets nothing pass."""
        name = tapredirect.ifb_name(tap.name)
        ifb = tapredirect.link(rtnl, name)
        if ifb is None:
            rtnl.call(tapredirect.create_ifb(name, tap.mtu))
            undo.callback(self._remove, rtnl, name)
            ifb = tapredirect.link(rtnl, name)
            if ifb is None:
                raise OSError(errno.ENODEV, f"{name} was made and is gone")
            return ifb, None
        note = tapredirect.note_of(ifb, tap.name)
        # Off: what the dead worker held is dropped, and so is what comes. Its plugs go as well,
        # since their counts are of packets that are no longer there.
        rtnl.call(tapredirect.set_up(ifb.index, False))
        _unless_absent(rtnl, plugqdisc.demolition(ifb.index))
        return ifb, note

    @staticmethod
    def _remove(rtnl: Rtnl, name: str) -> None:
        with contextlib.suppress(OSError):
            found = tapredirect.link(rtnl, name)
            if found is not None:
                rtnl.call(tapredirect.delete_link(found.index))

    def _lead_to(
        self,
        rtnl: Rtnl,
        tap: tapredirect.Link,
        ifb: tapredirect.Link,
        note: tapredirect.Note | None,
        undo: contextlib.ExitStack,
    ) -> None:
        """Switch the IFB on, and have the tap lead to it."""

        def back(request: Request) -> None:
            with contextlib.suppress(OSError):
                rtnl.call(request)

        ingress = tapredirect.has_ingress(rtnl, tap.index)
        ours = note is not None and note.made and note.index == tap.index
        made = not ingress or ours
        # Written first: if we die before it is made, nothing is there to be taken away.
        rtnl.call(tapredirect.Note(tap.name, tap.index, made).request(ifb.index))
        tapredirect.quiet(ifb.name)
        rtnl.call(tapredirect.set_up(ifb.index, True))
        if not ingress:
            rtnl.call(tapredirect.create_ingress(tap.index))
            undo.callback(back, tapredirect.delete_ingress(tap.index))
        found = tapredirect.filters(rtnl, tap.index)
        stale = [one for one in found if one.ours and one.target != ifb.index]
        if not any(one.ours and one.target == ifb.index for one in found):
            # Behind one that leads nowhere, and drops: it goes when this one is there.
            create, own = tapredirect.create_filter(tap.index, found, ifb.index)
            rtnl.call(create)
            undo.callback(back, tapredirect.delete_filter(tap.index, own))
        rtnl.call(*(tapredirect.delete_filter(tap.index, one) for one in stale))

    # -- rounds ---------------------------------------------------------------------------

    def cut(self, epoch: int) -> None:
        cutter, plugs = self._cutter, self._plugs
        if cutter is None or plugs is None or not self._ready:
            # No slot is free: these packets go with the next epoch's.
            return
        following = (self._current + 1) % SLOTS
        try:
            # Made beforehand, and not waited for. But the kernel takes the RTNL lock for it:
            # who holds it (interfaces that come and go, large dumps) prolongs the pause.
            cutter.send(plugs.turn_to[following])
        except OSError as error:
            self._fail(f"epoch {epoch} was not cut: {error}")
            return
        first_at = self._first_at or max(self._looked_at, self._cut_at)
        self._waiting.append(_Epoch(epoch, self._current, first_at))
        self._current = following
        self._ready -= 1
        self._first_at = 0.0
        self._cut_at = time.monotonic()

    def release(self, epoch: int) -> float | None:
        self._committed = max(self._committed, epoch)
        return self._let_out(ORDER_WAIT_S)

    def _let_out(self, patience_s: float) -> float | None:
        """Let out what is committed, in order.

        The kernel empties lower slots first, so before a slot after the turn of the lap is
        released those before it must be empty, which takes the kernel some microseconds. If it has
        not come to it for ``patience_s``, the rest is let out at the next look.

        :returns: seconds for which the oldest packet was held.
        """
        held: float | None = None
        give_up = time.monotonic() + patience_s
        while self._look():
            requests: list[Request] = []
            while self._waiting and self._waiting[0].number <= self._committed:
                out = self._waiting[0]
                if self._slots[out.slot].packets:
                    if any(slot > out.slot for slot in self._leaving):
                        break
                    held = max(held or 0.0, time.monotonic() - out.first_at)
                    requests += self._plugs.release[out.slot]
                    self._leaving.append(out.slot)
                self._waiting.popleft()
            try:
                self._rtnl.call(*requests, *self._new_limits())
            except OSError as error:
                self._fail(f"epoch {self._committed} was not released: {error}")
            due = bool(self._waiting) and self._waiting[0].number <= self._committed
            if not due or time.monotonic() >= give_up:
                break
            time.sleep(POLL_S)
        return held

    def _look(self) -> bool:
        """Read the kernel's counters, and what it said of the cuts; false: it is broken."""
        rtnl, cutter, plugs = self._rtnl, self._cutter, self._plugs
        if rtnl is None or cutter is None or plugs is None or self._broken:
            return False
        for _, fault in cutter.answers():
            if fault is not None:
                return self._fail(f"an epoch was not cut: {fault}")
        now = time.monotonic()
        if not plugs.look(rtnl, self._slots):
            return self._fail("somebody took its queue away")
        if now - self._checked_at >= WIRING_CHECK_S:
            self._checked_at = now
            why = self._wiring_fault(rtnl)
            if why:
                return self._fail(why)
        self._leaving = [slot for slot in self._leaving if self._slots[slot].packets]
        taken = {out.slot for out in self._waiting}
        ready = 0
        while ready < SLOTS - 1:
            slot = (self._current + 1 + ready) % SLOTS
            if slot in taken or self._slots[slot].packets:
                break
            ready += 1
        self._ready = ready
        self._held = sum(slot.held_bytes for slot in self._slots)
        self._released = sum(slot.released_bytes for slot in self._slots)
        self._dropped = sum(slot.dropped_packets for slot in self._slots)
        self._peak = max(self._peak, self._held)
        entered = self._held + self._released
        if entered > self._entered and not self._first_at:
            # Came since the last look; if it came before the cut, this is too early, not too late.
            self._first_at = max(self._looked_at, self._cut_at)
        self._entered = entered
        self._looked_at = now
        return True

    def _wiring_fault(self, rtnl: Rtnl) -> str:
        """What is wrong with the way to our IFB; empty: nothing."""
        found = tapredirect.filters(rtnl, self._tap_index)
        own = [one for one in found if one.ours and one.target == self._ifb_index]
        if not own:
            return f"somebody took our filter off {self._tap}"
        if not tapredirect.is_up(rtnl, self._ifb_index):
            return f"somebody switched {tapredirect.ifb_name(self._tap)} off"
        return tapredirect.obstacle(found, before=own[0].preference)

    def _new_limits(self) -> list[Request]:
        """Requests that let all slots together hold as much as may be held.

        The epoch under way may have what those before it leave. What the next one may have is
        said before its begin, when it is not known what this one will take: so after a cut, until
        the next look, the sum may be above the limit, at most twice as much.
        """
        plugs = self._plugs
        if plugs is None:
            return []
        following = (self._current + 1) % SLOTS
        before = sum(self._slots[out.slot].held_bytes for out in self._waiting)
        left = self._limit - before
        wanted = {
            self._current: left,
            following: max(left - self._slots[self._current].held_bytes, self._limit // 4),
        }
        requests = []
        for slot, value in wanted.items():
            # A little more or less is not worth a request.
            if abs(value - self._limits[slot]) > self._limit // 64:
                self._limits[slot] = value
                requests.append(plugs.limit(slot, value))
        return requests

    def _fail(self, why: str) -> bool:
        """Nothing is released from now on."""
        self._broken = self._broken or why
        return False

    # -- taking off -----------------------------------------------------------------------

    def detach(self) -> None:
        rtnl, plugs = self._rtnl, self._plugs
        if rtnl is None or plugs is None:
            return
        with self._faults("its packets cannot be let out"):
            deadline = time.monotonic() + DETACH_TIMEOUT_S
            self._empty(rtnl, plugs, deadline)
            found = tapredirect.filters(rtnl, self._tap_index)
            rtnl.call(
                *(tapredirect.delete_filter(self._tap_index, one) for one in found if one.ours)
            )
            self._settle(rtnl, plugs, deadline)
            _take_off(rtnl, self._tap)
        self._held = 0
        self.close()

    def _empty(self, rtnl: Rtnl, plugs: Plugs, deadline: float) -> None:
        """Let out all epochs, one after the other, and let pass what comes from now on."""
        for slot in [*self._leaving, *(out.slot for out in self._waiting), self._current]:
            rtnl.call(plugs.open[slot])
            while plugs.look(rtnl, self._slots) and self._slots[slot].packets:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "the kernel does not let them out")
                time.sleep(POLL_S)
        self._waiting.clear()
        self._leaving.clear()

    def _settle(self, rtnl: Rtnl, plugs: Plugs, deadline: float) -> None:
        """Wait for what is still on its way through the IFB; nothing new comes to it."""
        name = tapredirect.ifb_name(self._tap)
        quiet_since = time.monotonic()
        before = -1
        while time.monotonic() - quiet_since < SETTLE_S:
            ifb = tapredirect.link(rtnl, name)
            if ifb is None or not plugs.look(rtnl, self._slots):
                raise OSError(errno.ENODEV, f"{name} is gone")
            under_way = sum(slot.packets for slot in self._slots) + ifb.taken - ifb.passed
            if under_way or ifb.taken != before:
                quiet_since, before = time.monotonic(), ifb.taken
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "the kernel does not let them out")
            time.sleep(POLL_S)

    def close(self) -> None:
        for owned in (self._rtnl, self._cutter):
            if owned is not None:
                owned.close()
        self._rtnl = self._cutter = self._plugs = None
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
        """Why nothing is released any more; empty while it works."""
        return self._broken

    @property
    def pressure(self) -> float:
        rtnl = self._rtnl
        if rtnl is not None and not self._broken:
            try:
                if self._look():
                    rtnl.call(*self._new_limits())
            except OSError as error:
                self._fail(f"the kernel cannot be asked: {error}")
        return min(1.0, self._held / self._limit)

    def summary(self) -> dict[str, Any]:
        return {
            "nic": self.nic.alias,
            "mac": self.nic.mac,
            "buffer": self.name,
            "held_bytes": self._held,
            "peak_bytes": self._peak,
            "limit_bytes": self._limit,
            "dropped_packets": self._dropped,
            "released_bytes": self._released,
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


def _obstacle(rtnl: Rtnl, name: str) -> str:
    """Why what comes in on that interface cannot be led to an IFB; empty: it can."""
    tap = tapredirect.link(rtnl, name)
    if tap is None:
        return "there is no such interface on this host"
    if tap.kind != "tun":
        return f"it is no tap, but of type '{tap.kind or 'unknown'}'"
    if tap.has_xdp:
        return "it has an XDP program, which may let packets out"
    ifb = tapredirect.link(rtnl, tapredirect.ifb_name(name))
    if ifb is not None:
        tapredirect.note_of(ifb, name)
    tapredirect.has_ingress(rtnl, tap.index)
    return tapredirect.obstacle(tapredirect.filters(rtnl, tap.index))


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
