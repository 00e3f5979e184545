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

"""The egress buffer ``plug`` on a kernel that has ``sch_plug``; runs inside a bare guest.

``test_plug.py`` boots the guest, runs this there as a program, and asserts each check by its name.
Each check prints one line of JSON when it is done. Here a "guest" is whoever writes frames to a
tap, which is what vhost-net does; "outside" is the far end of a veth pair on the same bridge.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

# What the buffer loads when it comes to it; what is not imported here is not in the guest.
import pyroute2.netlink.rtnl.ifinfmsg
import pyroute2.netlink.rtnl.tcmsg  # noqa: F401

from nova_pmt import exception
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network import plugqdisc, tapredirect
from nova_pmt.guest.network.base import Nic
from nova_pmt.guest.network.plug import PlugBuffer
from nova_pmt.guest.network.plugqdisc import SLOTS
from nova_pmt.guest.network.rtnetlink import Rtnl

CHECKS: dict[str, Callable[[], dict[str, Any] | None]] = {}
CHECK_TIMEOUT_S = 30
LIMIT = 64 << 20
MTU = 9600

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SO_TIMESTAMPNS, _SO_RCVBUFFORCE, _PACKET_AUXDATA, _SOL_PACKET = 35, 33, 8, 263
_ETHERTYPE = 0x88B5  # "local experimental"
_OUTSIDE, _GUEST = bytes.fromhex("0200000000fe"), bytes.fromhex("020000000001")
_HEAD = _OUTSIDE + _GUEST + struct.pack("!H", _ETHERTYPE)
_BODY = struct.Struct("!II")
#: Packets that may wait behind the buffer, for the far end of the veth pair; with the kernel's 1000
#: some that a release or a detach let out at once were dropped there.
_BACKLOG = 100_000
_numbers = itertools.count()

NO_MONITOR = cast(Monitor, None)  # the buffer is the kernel's; QEMU has no part in it


def check(function: Callable[[], dict[str, Any] | None]) -> Callable[[], dict[str, Any] | None]:
    CHECKS[function.__name__] = function
    return function


def command(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}"
    return done.stdout


def frame(epoch: int, number: int, size: int = 60) -> bytes:
    return (_HEAD + _BODY.pack(epoch, number)).ljust(size, b"\xa5")


class Rig:
    """A tap and a veth pair on a bridge."""

    def __init__(self, name: str = "", *, vnet_hdr: bool = False, compare: bool = False) -> None:
        number = next(_numbers)
        self.name = name or f"tap{number}"
        self.bridge, self.inner, self.outer = f"br{number}", f"vi{number}", f"vo{number}"
        self.fd = os.open("/dev/net/tun", os.O_RDWR)
        flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_hdr else 0)
        fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))
        lines = [
            f"link add {self.bridge} mtu {MTU} type bridge stp_state 0 forward_delay 0 "
            "mcast_snooping 0",
            f"link add {self.inner} mtu {MTU} type veth peer name {self.outer} mtu {MTU}",
            f"link set {self.inner} master {self.bridge} up",
            f"link set {self.outer} up",
            f"link set {self.name} mtu {MTU} master {self.bridge} up",
            f"link set {self.bridge} up",
        ]
        command("ip", "-batch", "-", stdin="\n".join(lines) + "\n")
        # A veth has a backlog on each CPU, between which frames would change their order.
        Path(f"/sys/class/net/{self.outer}/queues/rx-0/rps_cpus").write_text("1")
        self.outside = self.listen(_ETHERTYPE)
        self.buffers: list[PlugBuffer] = []
        self.before = self.state() if compare else ""

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: object) -> None:
        for buffer in self.buffers:
            buffer.close()
        self.outside.close()
        self.unplug()
        with Rtnl() as rtnl:  # the bridge and the pair stay: their removal takes the kernel long
            ifb = tapredirect.link(rtnl, tapredirect.ifb_name(self.name))
            if ifb is not None:
                rtnl.call(tapredirect.delete_link(ifb.index))

    def unplug(self) -> None:
        """The guest ends, and its tap with it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def listen(self, protocol: int) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 128 << 20)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.bind((self.outer, protocol))
        return sock

    @property
    def nic(self) -> Nic:
        return Nic("net0", "hostnet0", "02:00:00:00:00:01", self.name, vhost=True)

    def buffer(self, limit: int = LIMIT) -> PlugBuffer:
        made = PlugBuffer(self.nic, NO_MONITOR, "/tmp", limit)
        self.buffers.append(made)
        return made

    def attached(self, limit: int = LIMIT) -> PlugBuffer:
        made = self.buffer(limit)
        made.attach()
        return made

    def send(self, epoch: int, count: int = 1, size: int = 60, first: int = 0) -> None:
        for number in range(first, first + count):
            os.write(self.fd, frame(epoch, number, size))

    def received(self, wanted: int, timeout: float = 5.0) -> list[tuple[int, int]]:
        """Epoch and number of frames that came out: ``wanted``, or those until the timeout."""
        found = []
        deadline = time.monotonic() + timeout
        while len(found) < wanted:
            if not select.select([self.outside], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            data = self.outside.recv(65536)
            found.append(_BODY.unpack_from(data, len(_HEAD)))
        return found

    def expect(self, *epochs: tuple[int, int]) -> None:
        """Exactly these come out, in this order: pairs of an epoch and its number of frames."""
        wanted = [(epoch, number) for epoch, count in epochs for number in range(count)]
        found = self.received(len(wanted))
        assert found == wanted, f"{found} came out instead of {wanted}"
        self.expect_nothing()

    def expect_nothing(self, seconds: float = 0.05) -> None:
        found = self.received(1, seconds)
        assert not found, f"{found} came out"

    def state(self) -> str:
        """All that traffic control and the kernel know of the tap, and what there is of ours."""
        lines = [f"{what} show dev {self.name}" for what in ("qdisc", "filter")]
        lines += [f"filter show dev {self.name} {where}" for where in ("ingress", "egress")]
        text = command("tc", "-batch", "-", stdin="\n".join(lines) + "\n")
        return text + str([name for name in os.listdir("/sys/class/net") if "pmt" in name])

    def filters(self) -> str:
        return command("tc", "filter", "show", "dev", self.name, "ingress")

    def queue(self) -> str:
        return command("tc", "-s", "qdisc", "show", "dev", tapredirect.ifb_name(self.name))


def look(buffer: PlugBuffer) -> None:
    """What the loop does a hundred times a second."""
    assert 0 <= buffer.pressure <= 1


def refused(buffer: PlugBuffer) -> str:
    try:
        buffer.attach()
    except exception.GuestError as error:
        return str(error)
    raise AssertionError("attach was not refused")


# -- what it is for -------------------------------------------------------------------------


@check
def nothing_passes_before_its_release() -> None:
    with Rig() as rig:
        rig.send(0, 3)
        rig.expect((0, 3))
        buffer = rig.attached()
        rig.send(1, 50)
        rig.expect_nothing()
        assert buffer.pressure > 0 and buffer.summary()["held_bytes"] == 50 * 60
        buffer.cut(1)
        rig.expect_nothing()
        rig.send(2, 5)
        held = buffer.release(1)
        rig.expect((1, 50))
        assert held is not None and 0.05 < held < 5, held
        buffer.cut(2)
        buffer.release(2)
        rig.expect((2, 5))
        buffer.cut(3)
        assert buffer.release(3) is None
        assert not buffer.broken
        summary = buffer.summary()
        assert summary["released_bytes"] == 55 * 60 and summary["peak_bytes"] == 55 * 60, summary
        assert (summary["held_bytes"], summary["dropped_packets"]) == (0, 0), summary


@check
def what_the_guest_receives_is_untouched() -> None:
    with Rig() as rig:
        rig.attached()
        rig.outside.send(frame(7, 7))
        assert select.select([rig.fd], [], [], 5)[0], "nothing came in"
        assert os.read(rig.fd, 65536) == frame(7, 7)


@check
def a_release_lets_out_exactly_one_epoch_of_several() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        for epoch in range(1, 9):  # [checkpoint] pipeline_depth is at most 8
            rig.send(epoch, 3 * epoch)
            buffer.cut(epoch)
        rig.send(9, 4)
        rig.expect_nothing()
        for epoch in range(1, 9):
            buffer.release(epoch)
            rig.expect((epoch, 3 * epoch))
        buffer.cut(9)
        buffer.release(9)
        rig.expect((9, 4))
        assert not buffer.broken


@check
def a_release_covers_the_epochs_before_it() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        for epoch in range(1, 5):
            rig.send(epoch, 5)
            buffer.cut(epoch)
        buffer.release(3)
        rig.expect((1, 5), (2, 5), (3, 5))
        buffer.release(4)
        rig.expect((4, 5))


@check
def slots_take_turns_for_many_laps_in_order() -> None:
    """With every number of epochs under way; also released together across the end of a lap."""
    with Rig() as rig:
        buffer = rig.attached()
        cut = released = 0
        for lap in range(60):
            under_way = 1 + lap % 8
            while cut - released < under_way:
                cut += 1
                rig.send(cut, 1 + cut % 4)
                look(buffer)
                buffer.cut(cut)
            first, released = released + 1, cut - lap % under_way
            buffer.release(released)
            wanted = [(n, 1 + n % 4) for n in range(first, released + 1)]
            found: list[tuple[int, int]] = []
            total = sum(count for _, count in wanted)
            deadline = time.monotonic() + 5
            while len(found) < total and time.monotonic() < deadline:
                found += rig.received(total - len(found), 0.02)
                look(buffer)  # what had to wait for the end of the last lap
            assert found == [(n, i) for n, count in wanted for i in range(count)], (
                f"lap {lap}: {found} for {wanted}; {buffer.broken}; {rig.queue()}"
            )
        rig.expect_nothing()
        assert not buffer.broken, buffer.broken


@check
def with_no_slot_left_epochs_are_let_out_later_never_earlier() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        for epoch in range(1, SLOTS + 5):
            rig.send(epoch, 2)
            buffer.cut(epoch)
        for epoch in range(1, SLOTS):
            buffer.release(epoch)
            rig.expect((epoch, 2))
        last = SLOTS + 5
        buffer.release(last - 1)  # those from SLOTS on had no cut of their own
        rig.expect_nothing()
        rig.send(last, 2)
        buffer.cut(last)
        buffer.release(last - 1)
        rig.expect_nothing()
        buffer.release(last)
        rig.expect(*((epoch, 2) for epoch in range(SLOTS, last + 1)))


@check
def ten_thousand_packets_of_all_sizes_in_order_without_loss_and_none_early() -> dict[str, Any]:
    """Sender, receiver and rounds at the same time; the kernel's own stamps tell what was early."""
    total, generator = 10_000, random.Random(3)
    sizes = [generator.choice((60, 61, 1514, 4096, 9000, generator.randint(60, 9000)))
             for _ in range(total)]  # fmt: skip
    with Rig() as rig:
        buffer = rig.attached()
        running = threading.Lock()  # who has it keeps the guest from running
        epoch_now, sent = [1], [0]
        arrived: list[tuple[int, int, int, int]] = []

        def guest() -> None:
            for number in range(total):
                with running:
                    os.write(rig.fd, frame(epoch_now[0], number, sizes[number]))
                    sent[0] += 1

        def outside() -> None:
            while len(arrived) < total and select.select([rig.outside], [], [], 10)[0]:
                data, control, _, _ = rig.outside.recvmsg(65536, 64)
                seconds, nanoseconds = struct.unpack("=qq", control[0][2])
                epoch, number = _BODY.unpack_from(data, len(_HEAD))
                arrived.append((number, epoch, len(data), seconds * 10**9 + nanoseconds))

        threads = [threading.Thread(target=each, daemon=True) for each in (guest, outside)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        released_at: dict[int, int] = {}
        pause: list[float] = []
        released = cut = 0
        while released < cut or sent[0] < total or not cut or cut < epoch_now[0]:
            time.sleep(generator.uniform(0, 0.03))
            if cut - released < generator.randint(1, 6) or generator.random() < 0.2:
                with running:
                    start = time.perf_counter()
                    cut = epoch_now[0]
                    buffer.cut(cut)
                    pause.append(time.perf_counter() - start)
                    if sent[0] < total:
                        epoch_now[0] += 1
            elif cut > released:
                released = generator.randint(released + 1, cut)
                for epoch in range(released, 0, -1):
                    if epoch in released_at:
                        break
                    released_at[epoch] = time.clock_gettime_ns(time.CLOCK_REALTIME)
                buffer.release(released)
            assert not buffer.broken, buffer.broken
        for thread in threads:
            thread.join(15)
        numbers = [number for number, *_ in arrived]
        assert len(numbers) == total, f"{len(numbers)} of {total} came out; {rig.queue()}"
        turned = [pair for pair in itertools.pairwise(arrived) if pair[0][0] > pair[1][0]]
        assert not turned, f"{len(turned)} times out of order: {turned[:3]}"
        wrong = [one for one in arrived if one[2] != sizes[one[0]]]
        assert not wrong, f"other sizes: {wrong[:5]}"
        early = [one for one in arrived if one[3] < released_at[one[1]]]
        assert not early, f"{len(early)} came out before their release: {early[:5]}"
        assert buffer.summary()["dropped_packets"] == 0
        return {
            "packets": total,
            "bytes": sum(sizes),
            "epochs": cut,
            "seconds": round(time.monotonic() - began, 2),
            "cut_us": percentiles(pause),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered) * 1e6),
        "p99": round(ordered[int(len(ordered) * 0.99)] * 1e6),
        "max": round(ordered[-1] * 1e6),
    }


@check
def vlan_tags_and_large_segments_pass_unchanged() -> None:
    """Tags of the guest's own; and a 40 KB TCP segment with its checksum to be filled in (GSO)."""
    with Rig(vnet_hdr=True) as rig:
        listener = rig.listen(0x0003)
        listener.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        buffer = rig.attached()
        no_offload = bytes(10)
        tagged = _OUTSIDE + _GUEST + struct.pack("!HHH", 0x8100, 0x2064, _ETHERTYPE) + bytes(60)
        os.write(rig.fd, no_offload + tagged)
        payload = os.urandom(40_000)
        tcp = struct.pack("!HHIIBBHHH", 1000, 2000, 1, 1, 5 << 4, 0x10, 512, 0, 0)
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 1, 0, 64, 6, 0,
                         b"\x0a\0\0\1", b"\x0a\0\0\2")  # fmt: skip
        large = _OUTSIDE + _GUEST + b"\x08\0" + ip + tcp + payload
        # needs a checksum, TCPv4; header length, segment size, where the checksum starts and goes
        os.write(rig.fd, struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16) + large)
        rig.expect_nothing()
        buffer.cut(1)
        buffer.release(1)
        found = []
        while len(found) < 2 and select.select([listener], [], [], 5)[0]:
            data, control, _, address = listener.recvmsg(65536, 128)
            if address[2] != socket.PACKET_OUTGOING:
                found.append((data, control))
        assert len(found) == 2, len(found)
        (vlan, control), (segment, _) = found
        auxiliary = next(data for level, kind, data in control if kind == _PACKET_AUXDATA)
        tag = struct.unpack("=IIIHHHH", auxiliary)[5]
        assert (vlan[12:14], tag) == (struct.pack("!H", _ETHERTYPE), 0x2064), (vlan[:20], tag)
        assert len(segment) == len(large), (len(segment), len(large))
        assert segment[54:] == payload, "the segment's content changed"
        listener.close()


# -- limits ---------------------------------------------------------------------------------


@check
def beyond_the_limit_packets_are_dropped_and_counted() -> None:
    with Rig() as rig:
        buffer = rig.attached(limit=100_000)
        rig.send(1, 150, size=1000)
        assert buffer.pressure == 1.0
        summary = buffer.summary()
        assert (summary["held_bytes"], summary["dropped_packets"]) == (100_000, 50), summary
        assert summary["limit_bytes"] == 100_000
        buffer.cut(1)
        buffer.release(1)
        rig.expect((1, 100))
        rig.send(2, 10, size=1000)
        buffer.cut(2)
        buffer.release(2)
        rig.expect((2, 10))
        assert buffer.pressure == 0.0 and buffer.summary()["dropped_packets"] == 50


@check
def epochs_under_way_share_the_limit() -> None:
    with Rig() as rig:
        buffer = rig.attached(limit=100_000)
        sent = 0
        for epoch in range(1, 6):
            look(buffer)
            rig.send(epoch, 40, size=1000)
            sent += 40_000
            look(buffer)
            buffer.cut(epoch)
        look(buffer)
        summary = buffer.summary()
        assert summary["held_bytes"] == 100_000, summary
        assert summary["dropped_packets"] * 1000 == sent - summary["held_bytes"], summary
        held = summary["held_bytes"]
        buffer.release(5)
        found = rig.received(held // 1000)
        assert len(found) * 1000 == held and found == sorted(found), len(found)
        rig.expect_nothing()


# -- taking off -----------------------------------------------------------------------------


@check
def detach_lets_all_out_in_order_and_leaves_the_tap_as_it_was() -> dict[str, Any]:
    with Rig(compare=True) as rig:
        buffer = rig.attached()
        for epoch in range(1, SLOTS - 1):
            buffer.cut(epoch)
            buffer.release(epoch)
        for epoch in range(11, 14):  # across the end of a lap
            rig.send(epoch, 200, size=1514)
            look(buffer)
            buffer.cut(epoch)
        rig.send(14, 200, size=1514)
        assert rig.state() != rig.before
        start = time.monotonic()
        buffer.detach()
        seconds = time.monotonic() - start
        rig.send(15, 10)
        rig.expect((11, 200), (12, 200), (13, 200), (14, 200), (15, 10))
        assert rig.state() == rig.before, rig.state()
        assert buffer.summary()["held_bytes"] == 0
        buffer.detach()  # nothing more to do
        buffer.attach()
        rig.send(1, 2)
        rig.expect_nothing()
        return {"seconds": round(seconds, 3)}


@check
def detach_of_a_running_guest_loses_nothing() -> dict[str, Any]:
    most = _BACKLOG // 2
    with Rig(compare=True) as rig:
        buffer = rig.attached()
        done = threading.Event()
        sent = [0]

        def guest() -> None:
            while not done.is_set() and sent[0] < most:
                os.write(rig.fd, frame(1, sent[0]))
                sent[0] += 1

        thread = threading.Thread(target=guest)
        thread.start()
        try:
            time.sleep(0.2)
            before = sent[0]
            buffer.detach()
            meanwhile = sent[0] - before
            time.sleep(0.1)
        finally:
            done.set()
            thread.join()
        found = [number for _, number in rig.received(sent[0], 20)]
        assert sorted(found) == list(range(sent[0])), f"{len(found)} of {sent[0]}"
        assert meanwhile, "nothing was sent while it was taken off"
        assert rig.state() == rig.before, rig.state()
        return {"sent": sent[0], "meanwhile": meanwhile}


@check
def recover_drops_what_was_held_and_opens_the_tap() -> None:
    with Rig(compare=True) as rig:
        assert PlugBuffer.recover(rig.nic, NO_MONITOR) is False
        buffer = rig.attached()
        rig.send(1, 20)
        buffer.cut(1)
        rig.send(2, 20)
        buffer.close()
        rig.expect_nothing()
        assert PlugBuffer.recover(rig.nic, NO_MONITOR) is True
        rig.expect_nothing()
        assert rig.state() == rig.before, rig.state()
        rig.send(3, 3)
        rig.expect((3, 3))
        assert PlugBuffer.recover(rig.nic, NO_MONITOR) is False


@check
def with_the_tap_gone_close_takes_the_ifb_away() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        rig.send(1, 5)
        name = tapredirect.ifb_name(rig.name)
        assert name in os.listdir("/sys/class/net")
        rig.unplug()
        assert buffer.pressure >= 0
        buffer.close()
        assert name not in os.listdir("/sys/class/net")


# -- death and takeover ---------------------------------------------------------------------


@contextlib.contextmanager
def worker(rig: Rig) -> Iterator[int]:
    """Another process that attached a buffer, made a cut, and waits."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            buffer = PlugBuffer(rig.nic, NO_MONITOR, "/tmp", LIMIT)
            buffer.attach()
            rig.send(1, 10)
            buffer.cut(1)
            rig.send(2, 10)
            os.write(told, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(ready, 1) == b"x", "the worker did not attach"
        yield pid
    finally:
        os.close(ready)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@check
def a_worker_that_dies_leaves_it_closed_and_the_next_drops_what_it_held() -> None:
    with Rig(compare=True) as rig:
        with worker(rig) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            rig.send(3, 10)
            rig.expect_nothing(0.2)
        filters = rig.filters()
        buffer = rig.attached()
        assert rig.filters() == filters, "the filter was not left where it was"
        rig.expect_nothing()
        rig.send(4, 10)
        buffer.cut(1)
        rig.send(5, 10)
        buffer.release(1)
        rig.expect((4, 10))
        buffer.detach()
        rig.expect((5, 10))
        assert rig.state() == rig.before, rig.state()


@check
def a_takeover_never_opens_while_the_guest_sends() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        done = threading.Event()
        numbers = itertools.count()

        def guest() -> None:
            while not done.is_set():
                os.write(rig.fd, frame(1, next(numbers)))

        thread = threading.Thread(target=guest)
        thread.start()
        try:
            for _ in range(5):
                buffer.close()
                buffer = rig.attached()
                buffer.cut(1)
                time.sleep(0.01)
            rig.expect_nothing(0.1)
        finally:
            done.set()
            thread.join()
        assert next(numbers) > 100


def attach_and_die(rig: Rig, step: int) -> bool:
    """Have another process attach that dies at its ``step``-th request; false: it needed fewer."""
    pid = os.fork()
    if not pid:
        calls = itertools.count()
        real = Rtnl.call

        def call(self: Rtnl, *requests: bytearray) -> None:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *requests)

        Rtnl.call = call  # type: ignore[method-assign]
        try:
            PlugBuffer(rig.nic, NO_MONITOR, "/tmp", LIMIT).attach()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@check
def a_worker_may_die_at_any_step_of_its_attach() -> dict[str, Any]:
    with Rig(compare=True) as rig:
        steps = 0
        while attach_and_die(rig, steps):
            buffer = rig.attached()
            rig.send(1, 1)
            rig.expect_nothing(0.02)
            buffer.cut(1)
            buffer.release(1)
            rig.expect((1, 1))
            buffer.close()
            assert PlugBuffer.recover(rig.nic, NO_MONITOR)
            assert rig.state() == rig.before, f"step {steps}: {rig.state()}"
            steps += 1
        return {"steps": steps}


@check
def a_worker_may_die_at_any_step_of_its_takeover() -> dict[str, Any]:
    with Rig() as rig:
        rig.attached().close()
        steps = 0
        while attach_and_die(rig, steps):
            rig.send(1, 3)
            rig.expect_nothing(0.02)
            steps += 1
        rig.send(2, 3)
        rig.expect_nothing()
        assert PlugBuffer.recover(rig.nic, NO_MONITOR)
        rig.send(3, 3)
        rig.expect((3, 3))
        return {"steps": steps}


@check
def an_ifb_that_is_gone_is_noticed_closes_the_tap_and_can_be_made_anew() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        rig.send(1, 5)
        buffer.cut(1)
        command("ip", "link", "del", tapredirect.ifb_name(rig.name))
        rig.send(2, 5)
        assert buffer.release(1) is None
        rig.expect_nothing()
        assert buffer.broken and buffer.pressure <= 1
        try:
            buffer.detach()
            raise AssertionError("detach let out what is gone")
        except exception.GuestError:
            pass
        buffer.attach()
        rig.expect_nothing()
        assert not buffer.broken
        assert rig.filters().count("mirred") == 1, rig.filters()
        rig.send(3, 5)
        buffer.cut(1)
        rig.expect_nothing()
        buffer.release(1)
        rig.expect((3, 5))
        buffer.detach()
        # Who made the ingress qdisc was written on the IFB that is gone, so it stays.
        assert "mirred" not in rig.state() and "pmt" not in rig.state(), rig.state()


@check
def attach_twice_holds_on_to_what_is_held() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        rig.send(1, 5)
        buffer.attach()
        buffer.cut(1)
        buffer.release(1)
        rig.expect((1, 5))


@check
def a_cut_that_failed_releases_nothing() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        rig.send(1, 5)
        ifb = tapredirect.ifb_name(rig.name)
        command("tc", "qdisc", "replace", "dev", ifb, "root", "plug", "limit", "100000")
        buffer.cut(1)
        assert buffer.release(1) is None
        assert "not cut" in buffer.broken, buffer.broken
        rig.expect_nothing()


# -- others on the same tap -----------------------------------------------------------------


@check
def filters_of_others_that_drop_or_hand_on_work_and_survive() -> None:
    """As Open vSwitch limits bandwidth; and one that drops; and one on the way to the guest."""
    with Rig() as rig:
        tc = ("tc", "filter", "add", "dev", rig.name)
        command("tc", "qdisc", "add", "dev", rig.name, "clsact")
        command(*tc, "ingress", "pref", "49", "matchall", "action", "police", "rate", "1gbit",
                "burst", "10mb", "conform-exceed", "drop/continue")  # fmt: skip
        command(*tc, "ingress", "pref", "60", "protocol", "0x88b6", "matchall", "action", "drop")
        command(*tc, "egress", "pref", "1", "protocol", "0x88b7", "matchall", "action", "drop")

        def lasting() -> list[str]:
            return [line for line in rig.state().splitlines() if "used" not in line]

        before = lasting()
        assert PlugBuffer.problems(rig.nic, NO_MONITOR) == []
        buffer = rig.attached()
        rig.send(1, 5)
        os.write(rig.fd, _OUTSIDE + _GUEST + b"\x88\xb6" + bytes(60))
        rig.expect_nothing()
        look(buffer)
        assert buffer.summary()["held_bytes"] == 5 * 60, "the other's filter did not drop"
        buffer.cut(1)
        buffer.release(1)
        rig.expect((1, 5))
        buffer.detach()
        assert lasting() == before, rig.state()
        buffer = rig.attached()
        buffer.close()
        assert PlugBuffer.recover(rig.nic, NO_MONITOR)
        assert lasting() == before, rig.state()


@check
def filters_that_let_packets_out_are_refused_and_left_alone() -> None:
    actions = {
        "pass": "action pass",
        "conforming passes": "action police rate 1gbit burst 1mb drop",
        "mirror": "action mirred egress mirror dev lo",
        "no action": "classid 1:1",
    }
    with Rig() as rig:
        for number, (name, words) in enumerate(actions.items()):
            lines = f"filter add dev {rig.name} ingress pref 7 matchall {words}\n"
            if number:
                lines = f"filter del dev {rig.name} ingress\n{lines}"
            else:
                lines = f"qdisc add dev {rig.name} ingress\n{lines}"
            command("tc", "-batch", "-", stdin=lines)
            (problem,) = PlugBuffer.problems(rig.nic, NO_MONITOR)
            assert isinstance(problem, exception.NoEgressBuffer), problem
            assert "preference 7" in problem.message, (name, problem.message)
            assert "preference 7" in refused(rig.buffer())
        filters = rig.filters()
        assert "classid 1:1" in filters or "flowid 1:1" in filters, filters
        command("tc", "filter", "del", "dev", rig.name, "ingress")
        # libvirt's <bandwidth>, which decides by u32
        command("tc", "filter", "add", "dev", rig.name, "parent", "ffff:", "protocol", "all", "u32",
                "match", "u32", "0", "0", "police", "rate", "1gbit", "burst", "1mb", "mtu", "64kb",
                "drop", "flowid", ":1")  # fmt: skip
        assert "'u32'" in refused(rig.buffer())
        command("tc", "filter", "del", "dev", rig.name, "ingress")
        assert PlugBuffer.problems(rig.nic, NO_MONITOR) == []


@check
def a_filter_put_behind_ours_or_taken_away_is_noticed() -> None:
    with Rig() as rig:
        buffer = rig.attached()
        # Without a preference it comes behind ours, and lets nothing out.
        command("tc", "filter", "add", "dev", rig.name, "ingress", "matchall", "action", "pass")
        rig.send(1, 3)
        rig.expect_nothing()
        time.sleep(0.6)
        look(buffer)
        assert not buffer.broken, buffer.broken
        command("tc", "qdisc", "del", "dev", rig.name, "ingress")
        time.sleep(0.6)
        look(buffer)
        assert "took our filter off" in buffer.broken, buffer.broken


@check
def a_failed_attach_undoes_what_was_done() -> None:
    with Rig(compare=True) as rig:
        command(
            "tc",
            "qdisc",
            "add",
            "dev",
            rig.name,
            "ingress",
        )
        before = rig.state()
        real, tapredirect.create_filter = tapredirect.create_filter, failing
        try:
            assert "as if" in refused(rig.buffer())
        finally:
            tapredirect.create_filter = real
        assert rig.state() == before, rig.state()
        command("tc", "qdisc", "del", "dev", rig.name, "ingress")
        tapredirect.create_filter = failing
        try:
            assert "as if" in refused(rig.buffer())
        finally:
            tapredirect.create_filter = real
        assert rig.state() == rig.before, rig.state()
        rig.send(1, 3)
        rig.expect((1, 3))


def failing(*args: Any) -> Any:
    raise OSError(5, "as if the kernel failed")


# -- refusals -------------------------------------------------------------------------------


@check
def problems_are_found_before_anything_is_changed() -> None:
    with Rig(compare=True) as rig:
        assert PlugBuffer.problems(rig.nic, NO_MONITOR) == []
        assert rig.state() == rig.before

        def problem(tap: str | None) -> str:
            (found,) = PlugBuffer.problems(Nic("net0", "h", "m", tap, True), NO_MONITOR)
            assert isinstance(found, exception.NoEgressBuffer)
            return found.message

        assert "no tap" in problem(None)
        assert "no such interface" in problem("tap-none")
        assert "type 'veth'" in problem(rig.inner)
        name = tapredirect.ifb_name(rig.name)
        command("ip", "link", "add", name, "type", "bridge")
        assert "not ours" in problem(rig.name)
        assert "not ours" in refused(rig.buffer())
        command("ip", "link", "del", name)


@check
def the_ifb_tells_people_what_it_is() -> None:
    with Rig("tap12345678-90") as rig:
        rig.attached()
        text = command("ip", "link", "show", "dev", "pmt12345678-90")
        assert "nova_pmt holds what tap12345678-90 sends" in text, text
        assert rig.queue().count("qdisc plug") == SLOTS


# -- why it is made as it is ----------------------------------------------------------------


@check
def one_plug_alone_would_leak_with_two_epochs_under_way() -> None:
    """Why there is a plug for each epoch. Should this fail one day, the kernel has learnt."""
    with Rig() as rig, Rtnl() as rtnl:
        buffer = rig.attached()
        buffer.close()
        name = tapredirect.ifb_name(rig.name)
        command("tc", "qdisc", "replace", "dev", name, "root", "handle", "7:", "plug",
                "limit", "1000000")  # fmt: skip
        ifb = tapredirect.link(rtnl, name)
        assert ifb is not None

        def tell(action: str) -> None:
            rtnl.call(plugqdisc.plug(ifb.index, 7 << 16, 0, action, 0, 0))

        rig.send(1, 2)
        tell(plugqdisc.BUFFER)
        rig.send(2, 10)
        tell(plugqdisc.BUFFER)
        tell(plugqdisc.RELEASE_ONE)  # for epoch 1
        found = rig.received(10) + rig.received(2, 0.5)
        assert found == [(1, 0), (1, 1)] + [(2, number) for number in range(8)], found


@check
def a_cut_is_short() -> dict[str, Any]:
    """Figures of an emulated machine, for the order of magnitude."""
    with Rig() as rig:
        buffer = rig.attached()
        cuts, releases, looks = [], [], []
        for epoch in range(1, 101):
            rig.send(epoch, 1)
            start = time.perf_counter()
            buffer.cut(epoch)
            cuts.append(time.perf_counter() - start)
            start = time.perf_counter()
            buffer.release(epoch)
            releases.append(time.perf_counter() - start)
            start = time.perf_counter()
            look(buffer)
            looks.append(time.perf_counter() - start)
        assert not buffer.broken
        return {
            "cut_us": percentiles(cuts),
            "release_us": percentiles(releases),
            "pressure_us": percentiles(looks),
        }


# -- the program ----------------------------------------------------------------------------


def _late(signum: int, stack: object) -> None:
    raise TimeoutError(f"not done after {CHECK_TIMEOUT_S} s")


def main(names: list[str]) -> None:
    for name in ("all", "default"):
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    Path("/proc/sys/net/core/netdev_max_backlog").write_text(str(_BACKLOG))
    signal.signal(signal.SIGALRM, _late)
    for name in names or CHECKS:
        result: dict[str, Any] = {"check": name, "ok": False}
        start = time.monotonic()
        signal.alarm(CHECK_TIMEOUT_S)
        try:
            result.update(CHECKS[name]() or {}, ok=True)
        except Exception:  # noqa: BLE001 - it is what is reported
            result["error"] = traceback.format_exc()
        signal.alarm(0)
        result["took"] = round(time.monotonic() - start, 2)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
