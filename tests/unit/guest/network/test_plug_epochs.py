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

"""Epochs in slots, on a model of ``sch_prio`` and ``sch_plug`` that works when it likes to.

The model does what net/sched/sch_plug.c does, also where that is odd: it counts packets, knows one
finished epoch, and says nothing of what it has let out but the sum.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from nova_pmt.guest.network import plugepochs, plugqdisc
from nova_pmt.guest.network.plugepochs import EpochQueue
from nova_pmt.guest.network.plugqdisc import SLOTS, Plugs
from nova_pmt.guest.network.rtnetlink import Rtnl

IFB = 42
LIMIT = 100_000
Packet = tuple[int, int, int]  # epoch, number, bytes


class Plug:
    """net/sched/sch_plug.c"""

    def __init__(self, handle: int, limit: int) -> None:
        self.handle, self.limit = handle, limit
        self.queue: deque[Packet] = deque()
        self.current = self.last = self.to_release = 0
        self.indefinite, self.throttled = False, True
        self.dropped = self.sent_bytes = 0

    @property
    def backlog(self) -> int:
        return sum(size for _, _, size in self.queue)

    def enqueue(self, packet: Packet) -> bool:
        if self.backlog + packet[2] > self.limit:
            self.dropped += 1
            return False
        if not self.indefinite:
            self.current += 1
        self.queue.append(packet)
        return True

    def dequeue(self) -> Packet | None:
        if self.throttled:
            return None
        if not self.indefinite:
            if not self.to_release:
                self.throttled = True
                return None
            self.to_release -= 1
        if not self.queue:
            return None
        packet = self.queue.popleft()
        self.sent_bytes += packet[2]
        return packet

    def change(self, action: int, limit: int) -> None:
        if action == 0:
            self.last, self.current = self.current, 0
            self.throttled = self.throttled or self.indefinite
            self.indefinite = False
        elif action == 1:
            self.to_release += self.last
            self.last, self.throttled = 0, False
        elif action == 2:
            self.indefinite, self.throttled = True, False
            self.to_release = self.last = self.current = 0
        else:
            self.limit = limit


class Kernel:
    """An IFB, and a socket to it: takes the requests as they are sent."""

    def __init__(self) -> None:
        self.bands: list[Plug] = []
        self.band = 0
        self.out: list[Packet] = []
        self.dropped: list[Packet] = []
        self.waiting: list[tuple[int, OSError | None]] = []
        self.refusing: OSError | None = None
        self.requests = 0
        self._known: dict[bytes, Any] = {}
        self.call(*plugqdisc.construction(IFB, LIMIT))

    def _understood(self, made: bytearray) -> Any:
        key = bytes(made)
        if key not in self._known:
            self._known[key] = tcmsg(key)
            self._known[key].decode()
        return self._known[key]

    def call(self, *requests: bytearray) -> None:
        for made in requests:
            self.requests += 1
            message = self._understood(made)
            options = message.get_attr("TCA_OPTIONS")
            if message.get_attr("TCA_KIND") == "prio":
                self.root, self.band = message["handle"], made[-1]
            elif message["parent"]:
                self.bands.append(Plug(message["handle"], options["limit"]))
            else:
                (plug,) = (band for band in self.bands if band.handle == message["handle"])
                plug.change(options["action"], options["limit"])

    def send(self, made: bytearray) -> int:
        if self.refusing is None:
            self.call(made)
        self.waiting.append((0, self.refusing))
        return 0

    def answers(self) -> list[tuple[int, OSError | None]]:
        found, self.waiting = self.waiting, []
        return found

    def ask(self, made: bytearray) -> list[bytes]:
        def attribute(kind: int, content: bytes) -> bytes:
            return struct.pack("=HH", len(content) + 4, kind) + content

        found = []
        for number, plug in enumerate(self.bands, 1):
            head = struct.pack("=B3xiIII", 0, IFB, self.root | number, self.root, plug.handle)
            stats = attribute(1, struct.pack("=QI4x", plug.sent_bytes, 0))
            queue = struct.pack("=5I", len(plug.queue), plug.backlog, plug.dropped, 0, 0)
            found.append(head + attribute(7, stats + attribute(3, queue)))
        return found

    def arrive(self, packet: Packet) -> None:
        if not self.bands[self.band].enqueue(packet):
            self.dropped.append(packet)

    def softirq(self, packets: int) -> None:
        """Dequeue as ``sch_prio`` does: each time from the lowest band that gives one."""
        for _ in range(packets):
            packet = next((out for band in self.bands if (out := band.dequeue())), None)
            if packet is None:
                return
            self.out.append(packet)


def queue_on(kernel: Kernel, check: Any = lambda: "") -> EpochQueue:
    rtnl = cast(Rtnl, kernel)
    return EpochQueue(rtnl, rtnl, Plugs(IFB), LIMIT, check)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing happens in the model while it is waited."""
    monkeypatch.setattr(plugepochs, "ORDER_WAIT_S", 0.0)


def arrivals(kernel: Kernel, epoch: int, count: int, size: int = 100) -> list[Packet]:
    packets = [(epoch, number, size) for number in range(count)]
    for packet in packets:
        kernel.arrive(packet)
    return packets


# -- examples -------------------------------------------------------------------------------


def test_a_cut_is_one_request(kernel: Kernel) -> None:
    queue = queue_on(kernel)
    before = kernel.requests
    queue.cut(1)
    assert kernel.requests == before + 1


def test_an_epoch_without_packets_needs_no_request_for_its_release(kernel: Kernel) -> None:
    queue = queue_on(kernel)
    queue.cut(1)
    before = kernel.requests
    assert queue.release(1) is None
    assert kernel.requests == before


def test_a_cut_that_the_kernel_refused_releases_nothing(kernel: Kernel) -> None:
    queue = queue_on(kernel)
    arrivals(kernel, 1, 3)
    kernel.refusing = OSError(16, "busy")
    queue.cut(1)
    kernel.refusing = None
    arrivals(kernel, 2, 3)
    queue.release(1)
    kernel.softirq(10)
    assert not kernel.out
    assert "not cut" in queue.broken


def test_a_socket_that_does_not_take_a_cut_breaks_it_without_a_word(kernel: Kernel) -> None:
    queue = queue_on(kernel)
    arrivals(kernel, 1, 3)

    def send(made: bytearray) -> int:
        raise OSError(105, "no buffer space")

    kernel.send = send  # type: ignore[method-assign]
    queue.cut(1)
    assert queue.release(1) is None
    kernel.softirq(10)
    assert not kernel.out and "epoch 1 was not cut" in queue.broken


def test_what_is_wrong_with_the_wiring_is_told(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugepochs, "CHECK_S", 0.0)
    faults = ["", "the filter is gone"]
    queue = queue_on(kernel, lambda: faults.pop(0))
    assert queue.look()
    assert not queue.look()
    assert queue.broken == "the filter is gone"


def test_plugs_of_another_hand_break_it(kernel: Kernel) -> None:
    queue = queue_on(kernel)
    kernel.bands.pop()
    assert not queue.look()
    assert queue.broken


def test_held_is_told_from_the_look_that_saw_it_come(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(plugepochs.time, "monotonic", lambda: now[0])
    queue = queue_on(kernel)
    for at in (100.010, 100.020, 100.030):
        now[0] = at
        queue.look()
    arrivals(kernel, 1, 1)  # between 30 and 40 ms
    for at in (100.040, 100.050):
        now[0] = at
        queue.look()
    queue.cut(1)
    now[0] = 100.060
    assert queue.release(1) == pytest.approx(0.030)


def test_epochs_share_the_limit(kernel: Kernel) -> None:
    queue = queue_on(kernel)
    for epoch in range(1, 5):
        arrivals(kernel, epoch, 400)
        queue.let_out()
        queue.cut(epoch)
    queue.let_out()
    assert queue.counters.held_bytes == LIMIT
    assert queue.counters.dropped_packets == len(kernel.dropped) > 0
    queue.release(4)
    kernel.softirq(10_000)
    queue.let_out()
    assert kernel.bands[kernel.band].limit == LIMIT


def test_open_lets_out_all_in_order_and_what_comes_after(kernel: Kernel) -> None:
    queue = queue_on(kernel)
    for epoch in range(1, SLOTS):
        queue.cut(epoch)
        queue.release(epoch)
    wanted: list[Packet] = []
    for epoch in range(SLOTS, SLOTS + 4):
        wanted += arrivals(kernel, epoch, 2)
        queue.look()
        queue.cut(epoch)
    wanted += arrivals(kernel, SLOTS + 4, 2)
    real = kernel.ask

    def ask(made: bytearray) -> list[bytes]:
        kernel.softirq(1)
        return real(made)

    kernel.ask = ask  # type: ignore[method-assign]
    queue.open(deadline=float("inf"))
    wanted += arrivals(kernel, 99, 1)
    kernel.softirq(1)
    assert kernel.out == wanted


# -- everything else ------------------------------------------------------------------------


class Rounds(RuleBasedStateMachine):
    """Packets, cuts, commits and the kernel's work in any order: none early, all in order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Kernel()
        self.queue = queue_on(self.kernel)
        self.epoch, self.committed, self.number = 1, 0, 0
        self.checked = 0

    @rule(count=st.integers(1, 5), size=st.sampled_from((60, 1500, 9000)))
    def the_guest_sends(self, count: int, size: int) -> None:
        for _ in range(count):
            self.kernel.arrive((self.epoch, self.number, size))
            self.number += 1

    @rule(times=st.integers(1, 3))
    def cut(self, times: int) -> None:
        for _ in range(times):
            self.queue.cut(self.epoch)
            self.epoch += 1

    @rule(share=st.floats(0, 1))
    def commit(self, share: float) -> None:
        newest = self.epoch - 1
        self.committed += round(share * (newest - self.committed))
        self.queue.release(self.committed)

    @rule()
    def look(self) -> None:
        self.queue.let_out()

    @rule(packets=st.integers(1, 8))
    def the_kernel_works(self, packets: int) -> None:
        self.kernel.softirq(packets)

    @invariant()
    def none_is_early(self) -> None:
        for epoch, number, _ in self.kernel.out[self.checked :]:
            assert epoch <= self.committed, f"packet {number} of epoch {epoch} is out"
        self.checked = len(self.kernel.out)

    def teardown(self) -> None:
        for last in (self.epoch - 1, self.epoch):
            # Epochs for which there was no slot go with the next, which there is one for now.
            self.queue.cut(last)
            self.queue.release(last)
            self.committed = last
            for _ in range(SLOTS):
                self.kernel.softirq(10_000)
                self.queue.let_out()
        self.none_is_early()
        assert not self.queue.broken
        numbers = [number for _, number, _ in self.kernel.out]
        assert numbers == sorted(numbers)
        lost = {number for _, number, _ in self.kernel.dropped}
        assert len(numbers) + len(lost) == self.number
        assert self.queue.counters.dropped_packets == len(lost)


Rounds.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
test_rounds = Rounds.TestCase
