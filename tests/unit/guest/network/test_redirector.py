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

"""The buffer between QEMU's two sockets: what passes, when, and what never does.

QEMU is played by socket pairs; the stream and its thread are the real ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import os
import random
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.guest.network import redirector
from nova_pmt.guest.network.base import Nic
from nova_pmt.guest.network.redirector import RedirectorBuffer, _Stream

LENGTH = struct.Struct("!I")
PLENTY = 32 << 20
#: A buffer that is soon full. One read must be small against it, as 1 MiB is against 64.
SMALL, SMALL_READ = 256 << 10, 32 << 10
PATIENCE_S = 20.0


def eventually(what: Callable[[], object], why: str = "it did not come about") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.0002)


class GatedStream(_Stream):
    """The real stream; a test can keep its thread from taking anything out of the socket."""

    def __init__(self, *args: Any) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.before_store: Callable[[], None] = lambda: None
        super().__init__(*args)

    def _store(self) -> None:
        self.gate.wait()
        self.before_store()
        super()._store()


class Qemu:
    """Both of QEMU's sockets, and what it sent and got back.

    Packets have a serial number, so that each is known again.
    """

    def __init__(self, limit: int, *, back_bytes: int | None = None) -> None:
        self.out, ours_out = socket.socketpair()
        self.back, ours_back = socket.socketpair()
        if back_bytes is not None:
            ours_back.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, back_bytes)
        self.sent = bytearray()
        self.got = bytearray()
        self.epochs: list[int] = []  # of the packets, by their serial number
        self.epoch = 1
        self.released = 0
        self.ends = {0: 0}
        self.stop_at = PLENTY  # QEMU takes nothing more from here on
        self.reading = threading.Event()
        self.reading.set()
        self.stream = GatedStream(ours_out, ours_back, limit)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stream.gate.set()
        self.reading.set()
        self.stream.close()
        for sock in (self.out, self.back):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._reader.join(PATIENCE_S)
        self.out.close()
        self.back.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.reading.wait()
                data = self.back.recv(1 << 20)
                if not data:
                    return
                self.got += data
                if len(self.got) >= self.stop_at:
                    self.stop_at = PLENTY
                    self.reading.clear()

    # -- the guest sends ----------------------------------------------------------------

    def packet(self, size: int) -> bytes:
        serial = len(self.epochs)
        self.epochs.append(self.epoch)
        body = serial.to_bytes(8, "big")[-min(8, size) :]
        return LENGTH.pack(size) + body.ljust(size, bytes([serial % 251]))

    def send(self, sizes: list[int], pieces: list[int] | None = None) -> None:
        """Packets; QEMU writes them in pieces, as its socket takes them."""
        data = b"".join(self.packet(size) for size in sizes)
        self.sent += data
        view, turn = memoryview(data), 0
        while view:
            count = pieces[turn % len(pieces)] if pieces else len(view)
            turn += 1
            try:
                view = view[self.out.send(view[:count], socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                self.stream.gate.set()  # QEMU would wait, and the guest with it
                time.sleep(0.0001)

    def cut(self) -> int:
        """A pause: QEMU has written all of what the guest has sent."""
        self.stream.end(self.epoch)
        self.ends[self.epoch] = len(self.sent)
        self.epoch += 1
        return self.epoch - 1

    def release(self, epoch: int) -> None:
        self.released = max(self.released, epoch)
        self.stream.allow(epoch)

    def fill(self, size: int = 1000) -> None:
        """Send until packets are dropped; returns when all was taken out of the socket."""
        dropped = self.stream.dropped_packets
        while self.stream.dropped_packets == dropped:
            self.send([size] * 20)
            self.taken()

    # -- what came back -----------------------------------------------------------------

    def waiting(self) -> int:
        """Bytes that QEMU wrote and nobody has taken out of the socket."""
        data = bytearray(4)
        fcntl.ioctl(self.stream._out, termios.FIONREAD, data, True)
        return int.from_bytes(data, "little")

    def taken(self) -> None:
        """Wait until all that was sent is stored or dropped."""
        eventually(lambda: not self.waiting() and not self.stream._turn & 1, "it reads no more")

    def settle(self) -> None:
        """Wait until all that may come back is there."""
        stream = self.stream
        self.taken()
        eventually(lambda: not stream._releases)
        eventually(
            lambda: len(self.got) == stream.sent == min(stream._allowed, stream.received),
            "what was released did not all come back",
        )

    def serials(self) -> list[int]:
        """Serial numbers of the packets that came back; the last one may not be whole yet."""
        found, at, data = [], 0, bytes(self.got)
        while at + LENGTH.size + 8 <= len(data):
            (size,) = LENGTH.unpack_from(data, at)
            assert 8 <= size <= 65600, "framing is lost"
            serial = int.from_bytes(data[at + 4 : at + 12], "big")
            assert serial < len(self.epochs), "framing is lost"
            body = data[at + 12 : at + 4 + size]
            assert body == bytes([serial % 251]) * len(body), "a packet is mangled"
            found.append(serial)
            at += LENGTH.size + size
        self.whole = at == len(data)
        return found

    def check(self) -> list[int]:
        """What must hold at any time."""
        serials = self.serials()
        assert all(a < b for a, b in itertools.pairwise(serials)), "order is lost"
        late = [n for n in serials if self.epochs[n] > self.released]
        assert not late, f"packets {late} passed with checkpoint {self.released}"
        return serials


# -- nothing is dropped -----------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


class Chance:
    """What a guest, QEMU and the standby do, by chance; the same for the same seed.

    (Hypothesis by itself stays with small examples, which never fill anything.)
    """

    def __init__(self, qemu: Qemu, seed: int, least: int) -> None:
        self.rng = random.Random(seed)
        self.qemu = qemu
        self.least = least
        self.weights = [self.rng.choice((2, 4, 8)) for _ in range(7)]

    def sizes(self) -> list[int]:
        rng = self.rng
        most = rng.choice((100, 1500, 65600))
        return [rng.randint(self.least, most) for _ in range(rng.randint(1, 25))]

    def step(self) -> str:
        """One thing happens."""
        rng, qemu = self.rng, self.qemu
        names = ("send", "late", "cut", "release", "gate", "read", "settle")
        (name,) = rng.choices(names, self.weights)
        if name == "send":
            qemu.send(self.sizes(), [rng.randint(1, 100_000) for _ in range(rng.randint(1, 5))])
        elif name == "cut":
            qemu.cut()
        elif name == "release":
            for epoch in range(
                qemu.released + 1, min(qemu.epoch, qemu.released + rng.randint(2, 4))
            ):
                qemu.release(epoch)
        elif name == "late":  # the cut comes before the thread: what it counts is in the socket
            qemu.stream.gate.clear()
            qemu.send(self.sizes())
            qemu.cut()
            qemu.stream.gate.set()
            return "cut"
        elif name == "gate":
            (qemu.stream.gate.set if rng.random() < 0.8 else qemu.stream.gate.clear)()
        elif name == "read":
            (qemu.reading.set if rng.random() < 0.7 else qemu.reading.clear)()
        elif qemu.reading.is_set() and qemu.stream.gate.is_set():
            qemu.settle()
        else:
            return ""
        return name

    def end(self) -> None:
        """All go on, and all is quiet."""
        self.qemu.stream.gate.set()
        self.qemu.reading.set()
        self.qemu.settle()


@QUICK
@given(SEEDS)
def test_what_comes_back_is_what_was_released_and_nothing_more(seed: int) -> None:
    with Qemu(PLENTY) as qemu:
        chance = Chance(qemu, seed, 1)
        for _ in range(30):
            did = chance.step()
            if did == "cut":  # exact, though the thread may be just moving bytes
                assert qemu.stream.last_cut == len(qemu.sent)
            elif did == "settle":
                assert len(qemu.got) == qemu.ends[qemu.released]
            assert qemu.sent.startswith(qemu.got)
            assert len(qemu.got) <= qemu.ends[qemu.released]
        chance.end()
        assert len(qemu.got) == qemu.ends[qemu.released]
        assert qemu.stream.let_out_all(time.monotonic() + PATIENCE_S)
        eventually(lambda: len(qemu.got) >= len(qemu.sent))
        assert qemu.got == qemu.sent
        assert qemu.stream.dropped_packets == 0
        assert not qemu.stream.broken


def test_a_cut_is_exact_while_bytes_are_being_moved() -> None:
    """Again and again at once after the writing: the thread is in the middle of it."""
    with Qemu(PLENTY) as qemu:
        for size in (1, 3000, 40_000) * 100:
            qemu.send([size])
            epoch = qemu.cut()
            assert qemu.stream.last_cut == len(qemu.sent)
            qemu.release(epoch)
        qemu.settle()
        assert qemu.got == qemu.sent


def test_the_first_packet_after_a_cut_is_told_of_once() -> None:
    with Qemu(PLENTY) as qemu:
        told: list[float] = []
        qemu.stream.on_output = lambda: told.append(qemu.stream.first_at)
        for number in range(1, 20):
            began = time.perf_counter()
            qemu.send([100] * 3, [50])
            eventually(lambda: len(told) == number, "nobody told of a packet")  # noqa: B023
            qemu.taken()
            assert began <= told[-1] <= time.perf_counter()
            assert qemu.stream.end(number) == told[-1]
        assert qemu.stream.end(99) == 0.0
        assert len(told) == 19


def test_what_waits_in_the_socket_at_a_cut_is_of_that_epoch() -> None:
    """Taken for the next one's it would begin a round for nothing."""
    with Qemu(PLENTY) as qemu:
        told: list[int] = []
        qemu.stream.on_output = lambda: told.append(qemu.stream.received)
        for epoch in range(1, 20):
            qemu.stream.gate.clear()
            qemu.send([2000])
            # (The thread may have been in the middle of a read.)
            first = qemu.stream.end(epoch)
            assert first > 0
            qemu.stream.gate.set()
            qemu.taken()
            assert qemu.stream.end(epoch + 100) == 0.0
        assert len(told) <= 1
        qemu.send([100])
        eventually(lambda: told and told[-1] == len(qemu.sent))


def test_releases_out_of_order_let_out_what_the_latest_does() -> None:
    with Qemu(PLENTY) as qemu:
        for _ in range(3):
            qemu.send([100] * 5)
            qemu.cut()
        qemu.release(2)
        qemu.release(1)
        qemu.settle()
        assert len(qemu.got) == qemu.ends[2]


def test_a_release_of_what_was_never_cut_lets_nothing_out() -> None:
    with Qemu(PLENTY) as qemu:
        qemu.send([100] * 5)
        qemu.stream.allow(7)
        qemu.settle()
        assert not qemu.got


def test_the_ring_goes_round_many_times() -> None:
    """Its end comes anywhere in a packet, in its header too."""
    with Qemu(SMALL) as qemu:
        sizes = random.Random(5)
        for _ in range(150):
            qemu.send([sizes.randint(1, 20_000) for _ in range(6)])
            qemu.release(qemu.cut())
            qemu.settle()
        assert len(qemu.sent) > 5 * (SMALL + redirector.SLACK_BYTES)
        assert qemu.got == qemu.sent
        assert qemu.stream.dropped_packets == 0


# -- a buffer that is full --------------------------------------------------------------


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirector, "READ_BYTES", SMALL_READ)


@pytest.mark.usefixtures("small_reads")
@settings(QUICK, max_examples=60)
@given(SEEDS)
def test_a_full_buffer_drops_whole_packets_and_mixes_no_epochs(seed: int) -> None:
    with Qemu(SMALL) as qemu:
        stream, chance = qemu.stream, Chance(qemu, seed, 8)
        for _ in range(60):
            did = chance.step()
            qemu.check()
            if did == "settle":
                assert qemu.whole, "an epoch ends with a whole packet"
            assert stream.received - stream.sent <= SMALL + redirector.SLACK_BYTES
        chance.end()
        qemu.check()
        assert qemu.whole
        # Protection ends: what is held goes out, and it is known how much is missing.
        qemu.released = qemu.epoch
        assert stream.let_out_all(time.monotonic() + PATIENCE_S)
        eventually(lambda: len(qemu.got) == stream.sent)
        came = qemu.check()
        assert qemu.whole
        assert len(came) + stream.dropped_packets == len(qemu.epochs)
        missing = len(qemu.sent) - len(qemu.got)
        assert stream.dropped_bytes == missing - LENGTH.size * stream.dropped_packets
        assert stream.peak <= SMALL + redirector.SLACK_BYTES
        assert not stream.broken


@pytest.mark.parametrize("size", [8, 1000, 65600])
def test_nobody_releases_and_everything_beyond_the_limit_is_dropped(size: int) -> None:
    with Qemu(SMALL) as qemu:
        qemu.fill(size)
        stored = qemu.stream.received
        for _ in range(5):
            qemu.send([size] * 20)
        qemu.taken()
        assert qemu.stream.received == stored
        assert SMALL <= stored <= SMALL + LENGTH.size + size
        assert not qemu.got
        qemu.released = qemu.epoch
        assert qemu.stream.let_out_all(time.monotonic() + PATIENCE_S)
        eventually(lambda: len(qemu.got) == stored)
        assert qemu.check() == list(range(stored // (LENGTH.size + size)))
        assert qemu.stream.dropped_packets == len(qemu.epochs) - stored // (LENGTH.size + size)


@pytest.mark.usefixtures("small_reads")
def test_after_a_full_buffer_packets_pass_again() -> None:
    with Qemu(SMALL) as qemu:
        for _ in range(3):
            qemu.fill()
            qemu.release(qemu.cut())
            qemu.settle()
            first = len(qemu.epochs)
            qemu.send([500] * 10)
            qemu.taken()  # or they would belong to the next epoch, which does no harm
            qemu.release(qemu.cut())
            qemu.settle()
            came = qemu.check()
            # One is the price for finding out that there is room.
            assert came[-9:] == list(range(first + 1, first + 10))
        assert len(came) + qemu.stream.dropped_packets == len(qemu.epochs)


def test_a_cut_that_counted_what_was_dropped_later_lets_no_later_epoch_pass() -> None:
    """The hard case: the cut's last bytes are in the socket, and find the ring full."""
    with Qemu(SMALL) as qemu:
        stream = qemu.stream
        qemu.send([1000] * 200)
        qemu.taken()
        stream.gate.clear()
        qemu.send([1000] * 90)
        first = qemu.cut()
        assert stream.last_cut == len(qemu.sent)
        qemu.send([1000] * 20)
        stream.gate.set()
        qemu.taken()
        assert stream.dropped_packets > 20
        stored = stream.received
        # Room again, without the cut's release; what comes now takes the place of what was dropped.
        qemu.cut()
        qemu.send([1000] * 100)
        qemu.cut()
        qemu.release(first)
        qemu.settle()
        assert len(qemu.got) == stored
        qemu.send([1000] * 100)  # stored, from where the first cut ends by its first reckoning
        qemu.settle()
        assert stream.received > qemu.ends[first]
        assert len(qemu.got) == stored
        qemu.check()


def test_a_released_cut_whose_last_bytes_are_dropped_lets_no_later_epoch_pass() -> None:
    """As before, but the release is there already, and QEMU does not take it back."""
    with Qemu(SMALL, back_bytes=8 << 10) as qemu:
        stream = qemu.stream
        qemu.reading.clear()
        qemu.send([1000] * 200)
        qemu.taken()
        stream.gate.clear()
        qemu.send([1000] * 140)
        qemu.release(qemu.cut())
        assert not stream.gate.is_set(), "all of it is in the socket"
        stream.gate.set()
        qemu.taken()
        eventually(lambda: stream.dropped_packets)
        stored = stream.received
        assert stored < qemu.ends[1]
        qemu.reading.set()
        qemu.settle()
        assert len(qemu.got) == stored
        qemu.send([1000] * 200)
        qemu.taken()
        assert stream.received > qemu.ends[1]
        qemu.settle()
        assert len(qemu.got) == stored
        qemu.check()


@pytest.mark.parametrize("full", [False, True])
def test_a_cut_is_right_though_the_thread_moves_bytes_while_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Between its looks at the socket and at the ring."""
    with Qemu(SMALL) as qemu:
        stream, real, turns = qemu.stream, fcntl.ioctl, [1]
        qemu.send([1000] * (255 if full else 10))
        qemu.taken()
        stream.gate.clear()
        qemu.send([1000] * 60)

        def ioctl(*arguments: Any) -> Any:
            result = real(*arguments)
            if arguments[1] == termios.FIONREAD and turns:
                turns.pop()
                stream.gate.set()
                monkeypatch.setattr(fcntl, "ioctl", real)
                qemu.taken()
            return result

        monkeypatch.setattr(fcntl, "ioctl", ioctl)
        qemu.cut()
        assert not turns
        assert bool(stream.dropped_packets) == full
        assert stream.last_cut == stream.received == len(qemu.sent) - 1004 * stream.dropped_packets


def test_a_cut_while_packets_are_dropped_is_where_the_ring_ends() -> None:
    with Qemu(SMALL) as qemu:
        qemu.fill()
        stored = qemu.stream.received
        qemu.stream.gate.clear()
        qemu.send([1000] * 30)  # in the socket, of this epoch: it is dropped or comes later
        epoch = qemu.cut()
        assert qemu.stream.last_cut == stored
        qemu.stream.gate.set()
        qemu.release(epoch)
        qemu.settle()
        assert len(qemu.got) == stored
        qemu.check()


def test_a_limit_below_what_qemus_socket_holds_does_not_close_the_network_for_good() -> None:
    """net.core.wmem_default of a tuned host is large; [network] buffer_limit_mib can be 1."""
    with Qemu(64 << 10) as qemu:
        stream = qemu.stream
        qemu.fill(30_000)
        qemu.release(qemu.cut())
        qemu.settle()
        stream.gate.clear()
        while not stream.gate.is_set():  # until the socket is full
            qemu.send([30_000])
        qemu.release(qemu.cut())
        for _ in range(50):
            qemu.send([30_000])
            qemu.release(qemu.cut())
            qemu.settle()
        assert qemu.check()[-1] == len(qemu.epochs) - 1, "nothing passes any more"
        assert len(stream._junk) < 256 << 10


@pytest.mark.usefixtures("small_reads")
def test_a_socket_of_qemu_with_a_large_buffer_does_not_break_the_framing() -> None:
    """What a cut counted in the socket may be more than the ring holds."""
    with Qemu(SMALL) as qemu:
        qemu.out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        if qemu.out.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 4 << 20:
            pytest.skip("net.core.wmem_max is too small to see it")
        stream = qemu.stream
        stream.gate.clear()
        qemu.send([60_000] * 30)
        assert not stream.gate.is_set(), "all of it is in the socket"
        qemu.release(qemu.cut())
        qemu.stop_at = stream._size + (64 << 10)  # until then QEMU takes all at once

        def keep_up() -> None:
            eventually(lambda: len(qemu.got) == stream.sent or not qemu.reading.is_set())

        stream.before_store = keep_up
        stream.gate.set()
        eventually(lambda: stream._skipping or stream.broken)
        qemu.reading.set()
        assert not stream.broken
        qemu.settle()
        qemu.check()
        assert qemu.whole


# -- the end ----------------------------------------------------------------------------


def at_end(sock: socket.socket) -> bool:
    """Whether the peer has closed, after whatever it sent."""
    sock.settimeout(5.0)
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionResetError:  # there was something that nobody had read
        pass
    return True


def pair(limit: int = SMALL) -> tuple[socket.socket, socket.socket, _Stream]:
    out, ours_out = socket.socketpair()
    back, ours_back = socket.socketpair()
    return out, back, _Stream(ours_out, ours_back, limit)


def test_closing_is_seen_by_qemu_and_done_once() -> None:
    out, back, stream = pair()
    with out, back:
        stream.close()
        stream.close()
        assert at_end(out)
        assert at_end(back)
        with pytest.raises(OSError):
            out.sendall(b"x")


def test_closing_lets_nothing_out_that_was_not_released() -> None:
    out, back, stream = pair()
    with out, back:
        out.sendall((LENGTH.pack(1000) + bytes(1000)) * 20)
        stream.end(1)
        stream.close()
        assert back.recv(1) == b""


def test_nothing_is_left_of_a_stream() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    gc.collect()  # what other tests have left is not to go meanwhile
    before = count()
    for turn in range(20):
        out, back, stream = pair()
        if turn % 2:
            out.close()  # ended by itself
            eventually(lambda stream=stream: stream.broken)
        stream.close()
        out.close()
        back.close()
    eventually(lambda: count() == before)


def test_qemu_that_goes_away_is_told_and_both_sockets_close() -> None:
    out, back, stream = pair()
    with back:
        out.sendall(LENGTH.pack(50) + bytes(50))
        out.close()
        eventually(lambda: stream.broken)
        assert at_end(back)
        stream.close()


def test_an_injecting_socket_that_goes_away_is_told_with_the_next_release() -> None:
    out, back, stream = pair()
    with out:
        back.close()
        out.sendall(LENGTH.pack(50) + bytes(50))
        stream.end(1)
        stream.allow(1)
        eventually(lambda: stream.broken)
        assert at_end(out)
        stream.close()


@pytest.mark.parametrize("skipping", [False, True])
def test_a_packet_that_cannot_be_ends_it(skipping: bool) -> None:
    with Qemu(SMALL) as qemu:
        if skipping:
            qemu.fill()
        else:
            qemu.send([1000] * 10)
        qemu.out.sendall(LENGTH.pack(1 << 24))
        with contextlib.suppress(OSError):
            qemu.out.sendall(bytes(SMALL))
        eventually(lambda: qemu.stream.broken)
        assert f"packet of {1 << 24} bytes" in qemu.stream.broken
        assert at_end(qemu.out)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [OSError("x"), MemoryError("x"), ValueError("x")], ids=repr)
def test_whatever_fails_in_the_thread_closes_both_sockets_and_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that ends without a word would leave the guest cut off, and protected."""

    def store(_self: _Stream) -> None:
        raise error

    monkeypatch.setattr(_Stream, "_store", store)
    out, back, stream = pair()
    with out, back:
        out.sendall(b"x")
        assert at_end(back)
        stream._thread.join(5.0)
        broken = stream.broken
        stream.close()
    assert broken


def test_letting_all_out_gives_up_when_qemu_does_not_read() -> None:
    with Qemu(4 << 20) as qemu:
        qemu.reading.clear()
        qemu.send([60_000] * 40)
        started = time.monotonic()
        assert not qemu.stream.let_out_all(started + 0.2)
        assert time.monotonic() - started < 5.0


def test_letting_all_out_waits_for_what_is_in_the_socket() -> None:
    with Qemu(4 << 20) as qemu:
        qemu.stream.gate.clear()
        qemu.send([20_000] * 4)
        timer = threading.Timer(0.05, qemu.stream.gate.set)
        timer.start()
        assert qemu.stream.let_out_all(time.monotonic() + PATIENCE_S)
        timer.join()
        eventually(lambda: len(qemu.got) == len(qemu.sent))
        assert qemu.got == qemu.sent


def test_letting_all_out_of_a_broken_stream_says_so_at_once() -> None:
    with Qemu(4 << 20) as qemu:
        qemu.stream.broken = "QEMU closed the connection"
        assert not qemu.stream.let_out_all(time.monotonic() + PATIENCE_S)


# -- in QEMU ----------------------------------------------------------------------------

NIC = Nic("net0", "hostnet0", "52:54:00:00:00:01", "vnet0", False)
CAPTURE, INJECT = "nova-pmt-capture-hostnet0", "nova-pmt-inject-hostnet0"
OUT, IN = "nova-pmt-out-hostnet0", "nova-pmt-in-hostnet0"


class FakeMonitor:
    """QEMU's objects and character devices; these listen, as QEMU's do."""

    def __init__(self) -> None:
        self.objects: list[str] = []
        self.chardevs: dict[str, socket.socket] = {}
        self.calls: list[tuple[str, str]] = []
        self.places: list[dict[str, Any]] = []
        self.types = [{"name": "filter-redirector"}]
        self.fail_at = -1

    def execute(self, command: str, **arguments: Any) -> Any:
        if command == "qom-list":
            return [{"name": name} for name in self.objects]
        if command == "query-chardev":
            return [{"label": name} for name in self.chardevs]
        if command == "qom-list-types":
            return self.types
        if len(self.calls) == self.fail_at:
            self.fail_at = -1
            raise exception.GuestError("QEMU refused", code="QMP_ERROR")
        self.calls.append((command, arguments["id"]))
        getattr(self, command.replace("-", "_"))(**arguments)
        return {}

    def chardev_add(self, id: str, backend: dict[str, Any]) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(backend["data"]["addr"]["data"]["path"])
        listener.listen(1)
        assert id not in self.chardevs
        self.chardevs[id] = listener

    def chardev_remove(self, id: str) -> None:
        self.chardevs.pop(id).close()

    def object_add(self, id: str, **arguments: Any) -> None:
        assert id not in self.objects
        self.objects.append(id)
        self.places.append(arguments)

    def object_del(self, id: str) -> None:
        self.objects.remove(id)

    def close(self) -> None:
        for listener in self.chardevs.values():
            listener.close()


@pytest.fixture
def monitor() -> Iterator[FakeMonitor]:
    made = FakeMonitor()
    yield made
    made.close()


def buffer(monitor: FakeMonitor, directory: Path) -> RedirectorBuffer:
    return RedirectorBuffer(NIC, monitor, str(directory), SMALL)  # type: ignore[arg-type]


def test_the_way_back_is_there_before_anything_goes_out(
    monitor: FakeMonitor, tmp_path: Path
) -> None:
    made = buffer(monitor, tmp_path)
    made.attach()
    assert [call for call in monitor.calls if call[0] == "object-add"] == [
        ("object-add", INJECT),
        ("object-add", CAPTURE),
    ]
    assert [place["queue"] for place in monitor.places] == ["rx", "rx"]
    assert monitor.places[0]["indev"] == IN
    assert monitor.places[1]["outdev"] == OUT
    made.close()
    # what held packets back still does: QEMU has it, and nobody reads
    assert monitor.objects == [INJECT, CAPTURE]


def test_taking_off_begins_with_what_holds(monitor: FakeMonitor, tmp_path: Path) -> None:
    made = buffer(monitor, tmp_path)
    made.attach()
    monitor.calls.clear()
    made.detach()
    assert monitor.calls[:2] == [("object-del", CAPTURE), ("object-del", INJECT)]
    assert monitor.objects == list(monitor.chardevs) == os.listdir(tmp_path) == []
    made.detach()
    made.close()
    assert made.summary()["held_bytes"] == 0


def test_what_a_dead_worker_left_holds_on_while_it_is_taken_over(
    monitor: FakeMonitor, tmp_path: Path
) -> None:
    first = buffer(monitor, tmp_path)
    first.attach()
    first.close()
    monitor.calls.clear()
    monitor.places.clear()
    second = buffer(monitor, tmp_path)
    second.attach()
    assert ("object-del", CAPTURE) not in monitor.calls
    assert ("chardev-remove", OUT) not in monitor.calls
    assert monitor.objects == [CAPTURE, INJECT]
    (place,) = monitor.places
    assert (place["position"], place["insert"]) == (f"id={CAPTURE}", "before")
    second.close()


def test_a_failure_at_any_step_of_attaching_leaves_nothing_behind(
    monitor: FakeMonitor, tmp_path: Path
) -> None:
    made = buffer(monitor, tmp_path)
    made.attach()
    made.detach()
    steps = [call for call in monitor.calls if call[0].endswith("-add")]
    gc.collect()  # what other tests have left is not to go meanwhile
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for step in range(len(steps)):
        monitor.calls.clear()
        monitor.fail_at = step
        with pytest.raises(exception.GuestError, match="refused"):
            made.attach()
        assert monitor.objects == list(monitor.chardevs) == []
        eventually(lambda: len(os.listdir("/proc/self/fd")) == descriptors)
        eventually(lambda: threading.active_count() == threads)
    made.attach()
    made.close()


def test_recovery_takes_all_off_that_is_there_and_tells_whether_it_was(
    monitor: FakeMonitor, tmp_path: Path
) -> None:
    assert RedirectorBuffer.recover(NIC, monitor) is False  # type: ignore[arg-type]
    made = buffer(monitor, tmp_path)
    made.attach()
    made.close()
    assert RedirectorBuffer.recover(NIC, monitor) is True  # type: ignore[arg-type]
    assert monitor.objects == list(monitor.chardevs) == []


def test_a_socket_that_nobody_listens_on_is_a_typed_error(
    monitor: FakeMonitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(id: str, backend: dict[str, Any]) -> None:
        monitor.chardevs[id] = socket.socket(socket.AF_UNIX)

    monkeypatch.setattr(monitor, "chardev_add", deaf)
    with pytest.raises(exception.GuestError, match="cannot be used"):
        buffer(monitor, tmp_path).attach()
    assert monitor.objects == list(monitor.chardevs) == []


def test_the_figures_of_a_buffer(monitor: FakeMonitor, tmp_path: Path) -> None:
    made = buffer(monitor, tmp_path)
    assert (made.pressure, made.broken, made.last_cut) == (0.0, "", 0)
    made.attach()
    qemu_out, _ = monitor.chardevs[OUT].accept()
    qemu_back, _ = monitor.chardevs[IN].accept()
    with qemu_out, qemu_back:
        assert made.release(1) is None  # nothing of that epoch
        qemu_out.sendall((LENGTH.pack(1020) + bytes(1020)) * 64)
        stream = made._stream
        assert stream is not None
        eventually(lambda: stream.received == 64 << 10)
        assert made.pressure == pytest.approx(0.25)
        assert made.summary() == {
            "nic": "net0",
            "mac": NIC.mac,
            "buffer": "redirector",
            "held_bytes": 64 << 10,
            "peak_bytes": 64 << 10,
            "limit_bytes": SMALL,
            "dropped_packets": 0,
            "released_bytes": 0,
        }
        made.cut(2)
        assert made.last_cut == 64 << 10
        made.cut(3)
        held = made.release(2)
        assert held is not None
        assert 0 < held < PATIENCE_S
        assert made.release(3) is None
        eventually(lambda: made.summary()["released_bytes"] == 64 << 10)
        assert made.pressure == 0
        qemu_out.close()
        eventually(lambda: made.broken)
        made.close()
        assert made.broken == ""
        assert made.release(4) is None
        made.cut(4)


def test_why_it_cannot_hold_what_a_nic_sends(monitor: FakeMonitor) -> None:
    def codes(nic: Nic) -> list[str]:
        found = RedirectorBuffer.problems(nic, monitor)  # type: ignore[arg-type]
        assert all(refusal.cure for refusal in found)
        return [refusal.message for refusal in found]

    assert codes(NIC) == []
    (message,) = codes(Nic("net0", "hostnet0", NIC.mac, "vnet0", True))
    assert NIC.mac in message
    assert "vhost" in message
    (message,) = codes(Nic("net0", "hostnet0", NIC.mac, "vnet0", False, queues=4))
    assert "4 queues" in message
    monitor.types = [{"name": "filter-dump"}]
    (message,) = codes(NIC)
    assert "filter-redirector" in message
    assert monitor.calls == []
