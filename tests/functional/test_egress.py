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

"""What a running guest sends is held, released in order, and never leaks."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nova_pmt.exception import LabError
from nova_pmt.guest.monitor import DirectMonitor
from nova_pmt.guest.network.base import Nic
from nova_pmt.guest.network.redirector import RedirectorBuffer
from nova_pmt.lab import LabGuest

NIC = Nic("net0", "hostnet0", "52:54:00:00:00:00", None, vhost=False)
MIB = 1 << 20


class Held:
    """A guest whose NIC is held by this process, which plays the worker."""

    def __init__(self, guest: LabGuest, limit: int = 16 * MIB) -> None:
        self.guest = guest
        self.monitor = DirectMonitor(str(guest.host.path(guest.spec.monitor_path)))
        self.inside = f"/run/nova_pmt/guests/{guest.uuid}"
        os.makedirs(guest.host.path(self.inside), exist_ok=True)
        os.chmod(guest.host.path(self.inside), 0o777)
        self.limit = limit
        self.epoch = 0

    def buffer(self) -> RedirectorBuffer:
        return _Outside(self)

    def round(self, buffer: RedirectorBuffer, release: bool = True) -> int:
        """A pause, as the worker makes it."""
        self.epoch += 1
        self.monitor.execute("stop")
        buffer.cut(self.epoch)
        self.monitor.execute("cont")
        if release:
            buffer.release(self.epoch)
        return self.epoch

    def detach(self, buffer: RedirectorBuffer) -> None:
        self.monitor.execute("stop")
        buffer.detach()
        self.monitor.execute("cont")

    @contextlib.contextmanager
    def rounds(self, buffer: RedirectorBuffer, every_s: float = 0.02) -> Iterator[None]:
        """Rounds go on in a thread."""
        end = threading.Event()

        def run() -> None:
            while not end.wait(every_s):
                self.round(buffer)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


class _Outside(RedirectorBuffer):
    """QEMU knows its sockets by other paths than this process, which is in no host."""

    def __init__(self, held: Held) -> None:
        self._root = str(held.guest.host.path("/"))
        super().__init__(NIC, held.monitor, held.inside, held.limit)

    def _connect(self, path: str) -> socket.socket:  # type: ignore[override]
        return super()._connect(self._root + path)

    def _unlink(self) -> None:
        for which in ("out", "in"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._root + self._path(which))

    def _make_chardev(self, ident: str, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._root + path)
        super()._make_chardev(ident, path)


@pytest.fixture(scope="module")
def held(lab) -> Iterator[Held]:  # type: ignore[no-untyped-def]
    from nova_pmt.lab import GuestSpec

    guest = lab.computes[0].boot(GuestSpec("egress", ip="10.77.2.90")).wait_ready()
    found = Held(guest)
    before = facts(found)
    yield found
    assert facts(found) == before
    found.monitor.close()
    guest.destroy()


def facts(held: Held) -> tuple[list[str], list[str]]:
    objects = [entry["name"] for entry in held.monitor.execute("qom-list", path="/objects")]
    chardevs = [entry["label"] for entry in held.monitor.execute("query-chardev")]
    return objects, chardevs


def answers(guest: LabGuest, timeout: float = 1.0) -> bool:
    with contextlib.suppress(LabError):
        guest.control("counter", timeout)
        return True
    return False


def eventually(wanted: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_passes_before_its_release(held: Held) -> None:
    buffer = held.buffer()
    assert buffer.problems(NIC, held.monitor) == []
    buffer.attach()
    assert not answers(held.guest)
    first = held.round(buffer, release=False)
    assert not answers(held.guest)
    held.round(buffer, release=False)
    buffer.release(first)
    eventually(lambda: buffer.summary()["released_bytes"] > 0)
    summary = buffer.summary()
    assert summary["held_bytes"] > 0
    assert 0 < summary["released_bytes"] < summary["released_bytes"] + summary["held_bytes"]
    with held.rounds(buffer):
        assert answers(held.guest, 10)
    held.detach(buffer)
    assert answers(held.guest, 10)


def test_a_connection_lives_through_attach_stream_and_detach(held: Held) -> None:
    """16 MiB echoed while the buffer comes and goes: nothing lost, nothing out of order."""
    data = os.urandom(MIB)
    got = bytearray()
    with held.guest.connect() as connection:
        connection.settimeout(60)

        def read() -> None:
            while len(got) < 16 * MIB:
                got.extend(connection.recv(MIB))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(4):
            buffer = held.buffer()
            buffer.attach()
            with held.rounds(buffer):
                for _ in range(4):
                    connection.sendall(data)
            held.detach(buffer)
        reader.join(60)
    assert bytes(got) == data * 16


def test_a_dead_worker_closes_the_tap_and_the_next_takes_over(held: Held) -> None:
    first = held.buffer()
    first.attach()
    with held.rounds(first):
        assert answers(held.guest, 10)
    first.close()  # all that a SIGKILL does to it
    assert not answers(held.guest)
    second = held.buffer()
    second.attach()
    assert not answers(held.guest)
    with held.rounds(second):
        assert answers(held.guest, 10)
    second.close()
    assert RedirectorBuffer.recover(NIC, held.monitor)
    assert not RedirectorBuffer.recover(NIC, held.monitor)
    assert answers(held.guest, 10)


def ping(guest: LabGuest, count: int, size: int) -> None:
    """Echo requests, whose answers nobody waits for."""
    sock = guest.host.lab.ctl.in_network(
        lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    )
    with sock:
        for number in range(count):
            packet = struct.pack("!BBHHH", 8, 0, 0, 77, number) + bytes(size)
            total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
            total = (total >> 16) + (total & 0xFFFF)
            checksum = ~(total + (total >> 16)) & 0xFFFF
            sock.sendto(packet[:2] + struct.pack("!H", checksum) + packet[4:], (guest.spec.ip, 0))
            time.sleep(0.001)


def test_a_full_buffer_drops_whole_packets_and_goes_on(held: Held) -> None:
    held.limit = 256 << 10
    try:
        buffer = held.buffer()
        buffer.attach()
        with contextlib.ExitStack() as stack:
            with held.rounds(buffer):
                connection = stack.enter_context(held.guest.connect())
                connection.settimeout(60)
            for _ in range(3):
                dropped = buffer.summary()["dropped_packets"]
                ping(held.guest, 400, 1400)  # nobody releases what it answers
                # The guest may answer late, and the buffer take what it sends later still.
                eventually(lambda least=dropped + 50: buffer.summary()["dropped_packets"] > least)
                full = buffer.summary()
                assert full["held_bytes"] <= held.limit + 80_000
                with held.rounds(buffer):  # from a packet's begin on, or QEMU would choke on it
                    data = os.urandom(MIB)
                    writer = threading.Thread(target=connection.sendall, args=(data,))
                    writer.start()
                    got = bytearray()
                    while len(got) < len(data):
                        got += connection.recv(MIB)
                    writer.join(30)
                    assert bytes(got) == data
        held.detach(buffer)
        assert answers(held.guest, 10)
    finally:
        held.limit = 16 * MIB
