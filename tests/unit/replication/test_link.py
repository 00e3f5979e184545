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

"""The link over real sockets: nothing blocks, nothing starves, silence and damage are noticed."""

from __future__ import annotations

import os
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.replication import tls
from nova_pmt.replication.link import SEND_BYTES, TURN_BYTES, TURN_S, Link, RawFrame
from nova_pmt.replication.protocol import Header, Type, pack_json
from tests.unit.fakes.sockets import End, Payload, both, secure_pair, tcp_pair, turn_until

BIG = 6 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["plain", "tls"])
def ends(request: pytest.FixtureRequest, hosts: dict[str, Any]) -> Iterator[tuple[End, End]]:
    """Primary's and standby's end, over a socket pair and over TLS 1.3 on loopback."""
    if request.param == "plain":
        first, second = socket.socketpair()
    else:
        first, second = secure_pair(hosts["one"], hosts["two"])
    primary, standby = End(first, "two"), End(second, "one")
    yield primary, standby
    primary.close()
    standby.close()


@pytest.fixture
def plain() -> Iterator[tuple[End, End, Clock]]:
    """As above without TLS, on a clock that the test moves."""
    clock = Clock()
    first, second = socket.socketpair()
    options = {"heartbeat_s": 0.1, "timeout_s": 0.5, "clock": clock}
    primary, standby = End(first, "two", **options), End(second, "one", **options)
    yield primary, standby, clock
    primary.close()
    standby.close()


# -- sending and receiving --------------------------------------------------------------


def test_big_frames_pass_each_other(ends: tuple[End, End]) -> None:
    primary, standby = ends
    there, back = random.Random(1).randbytes(BIG), random.Random(2).randbytes(BIG)
    order: list[Any] = []
    primary.link.send(Payload(there, order, "there"))
    standby.link.send(Payload(back, order, "back"))
    turn_until(lambda: bool(primary.frames and standby.frames), primary, standby)
    turn_until(lambda: primary.link.idle and standby.link.idle, primary, standby)
    assert standby.frames[0][1] == there
    assert primary.frames[0][1] == back
    assert sorted(order) == ["back", "there"]
    assert primary.link.sent_bytes == standby.link.received_bytes == BIG + 24


def test_many_frames_keep_their_order_and_are_sent_once(ends: tuple[End, End]) -> None:
    primary, standby = ends
    rng = random.Random(3)
    payloads = [rng.randbytes(rng.choice((1, 100, 70_000, 300_000))) for _ in range(120)]
    order: list[Any] = []
    for index, data in enumerate(payloads):
        primary.link.send(Payload(data, order, index))
    turn_until(lambda: len(standby.frames) == 120 and primary.link.idle, primary, standby)
    assert [payload for _, payload in standby.frames] == payloads
    assert order == list(range(120))


def test_an_urgent_frame_overtakes_all_that_have_not_begun(ends: tuple[End, End]) -> None:
    primary, standby = ends
    for index in range(20):
        primary.link.send(Payload(bytes([index]) * 300_000))
    primary.turn()  # the first ones are under way
    primary.link.send(RawFrame(pack_json(Type.GUEST_DIED, {"reason": "x"})), urgent=True)
    turn_until(lambda: len(standby.frames) == 21, primary, standby)
    kinds = [header.type for header, _ in standby.frames]
    at = kinds.index(Type.GUEST_DIED)
    assert 0 < at < 20
    bulk = [payload[0] for header, payload in standby.frames if header.type is Type.PRELUDE]
    assert bulk == list(range(20))


def test_memory_of_a_frame_is_not_looked_at_after_it_was_sent(ends: tuple[End, End]) -> None:
    """The slab is used anew at once: what arrives must be what was there before."""
    primary, standby = ends
    memory = bytearray(b"a" * BIG)

    class Slab(Payload):
        def begin(self) -> list[memoryview]:
            return [memoryview(self.header.pack()), memoryview(memory)]

        def sent(self) -> None:
            memory[:] = b"b" * BIG

    primary.link.send(Slab(bytes(BIG)))
    turn_until(lambda: len(standby.frames) == 1 and primary.link.idle, primary, standby)
    assert memory[:1] == b"b"
    assert standby.frames[0][1] == b"a" * BIG


def test_sending_from_another_thread_wakes_the_loop(ends: tuple[End, End]) -> None:
    primary, standby = ends
    thread = threading.Timer(0.05, lambda: primary.link.send(Payload(b"x")))
    thread.start()
    begin = time.monotonic()
    primary.turn(5.0)
    assert time.monotonic() - begin < 4
    turn_until(lambda: bool(standby.frames), primary, standby)
    thread.join()


def test_a_stream_without_end_leaves_others_their_turn(ends: tuple[End, End]) -> None:
    """Whoever only reads, or only writes, would miss heartbeats and be taken for dead."""
    primary, standby = ends
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            while len(primary.link._queue) < 40:
                primary.link.send(Payload(bytes(1 << 20)))
            primary.turn(0.01)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    try:
        for _ in range(10):
            before = standby.link.received_bytes
            standby.turn(1.0)
            assert standby.link.received_bytes - before <= TURN_BYTES + (1 << 20)
    finally:
        stop.set()
        while thread.is_alive():
            standby.turn(0.01)
    # and the writer: with a reader that keeps up it still returns. (A turn of the loop may have
    # two events for it: woken up by send(), and the socket.)
    queued = 12
    for _ in range(queued):
        primary.link.send(Payload(bytes(1 << 20)))
    before = primary.link.sent_bytes
    primary.turn(0.1)
    assert primary.link.sent_bytes - before <= 2 * (TURN_BYTES + SEND_BYTES)


class Slow(Payload):
    """A frame that takes 5 ms to make."""

    clock: Clock

    def begin(self) -> list[memoryview]:
        self.clock.now += 0.005
        return super().begin()


def test_a_turn_ends_in_time_though_little_was_sent(plain: tuple[End, End, Clock]) -> None:
    """Frames that shrank to nearly nothing took their time: others must have their turn."""
    primary, standby, Slow.clock = plain
    most = int(TURN_S / 0.005) + 1
    for _ in range(64):
        primary.link.send(Slow(b"x" * 100))
    turns = 0
    while len(standby.frames) < 64:
        before = primary.link.sent_bytes
        for key, mask in primary.selector.select(0):
            key.data(mask)
            assert primary.link.sent_bytes - before <= most * (100 + 24)
            before = primary.link.sent_bytes
            primary.link.tick()
        turns += 1
        standby.turn()
    assert turns >= 64 / most / 2


def test_a_turn_ends_in_time_though_little_came(
    plain: tuple[End, End, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, standby, clock = plain
    take = standby.frame

    def slow(header: Header, payload: list[memoryview]) -> None:
        clock.now += 0.005
        take(header, payload)

    monkeypatch.setattr(standby, "frame", slow)
    for _ in range(64):
        primary.link.send(RawFrame(pack_json(Type.BYE, {})))
    primary.link.flush()
    while len(standby.frames) < 64:
        before = len(standby.frames)
        standby.turn()
        assert len(standby.frames) - before <= int(TURN_S / 0.005) + 1
        standby.link.tick()  # it is not taken for one that stood still


def test_the_speed_of_the_link_is_without_pauses(
    plain: tuple[End, End, Clock],
) -> None:
    primary, standby, clock = plain
    Slow.clock = clock
    primary.link.send(Slow(bytes(BIG)))
    primary.link.hold()
    clock.now += 10.0
    primary.link.go_on()
    primary.link.send(Slow(bytes(BIG)))
    turn_until(lambda: len(standby.frames) == 2, primary, standby)
    assert primary.link.speed.held_s == pytest.approx(10.0)
    assert primary.link.speed.s_per_byte * BIG < 0.1  # and not 10 s


def test_the_speed_of_sending_is_noted_where_there_is_much_to_send(ends: tuple[End, End]) -> None:
    primary, standby = ends
    primary.link.send(Payload(b"x" * 1000))
    turn_until(lambda: len(standby.frames) == 1, primary, standby)
    assert primary.link.speed.s_per_byte == 0.0  # that would be the speed of a round trip
    start = time.perf_counter()
    primary.link.send(Payload(bytes(BIG)))
    primary.link.send(Payload(bytes(BIG)))
    turn_until(lambda: len(standby.frames) == 3, primary, standby)
    assert 0 < primary.link.speed.s_per_byte <= (time.perf_counter() - start) / BIG


def test_what_tls_has_decrypted_is_read_though_the_socket_is_empty(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nova_pmt.replication.link.TURN_BYTES", 200)
    primary, standby = ends
    primary.link.send(RawFrame(pack_json(Type.BYE, {}) * 100))  # one record of TLS
    primary.link.flush()
    turn_until(lambda: len(standby.frames) == 100, standby, timeout_s=5.0)


# -- pauses -----------------------------------------------------------------------------


def test_nothing_is_sent_in_a_pause(ends: tuple[End, End]) -> None:
    primary, standby = ends
    primary.link.hold()
    primary.link.send(Payload(b"x" * 1000))
    for _ in range(5):
        primary.turn(0.001)
        standby.turn(0.001)
    assert primary.link.sent_bytes == 0
    threading.Timer(0.02, primary.link.go_on).start()
    primary.turn(5.0)
    turn_until(lambda: bool(standby.frames), primary, standby)


def test_a_pause_can_begin_in_the_middle_of_a_frame(ends: tuple[End, End]) -> None:
    primary, standby = ends
    data = random.Random(4).randbytes(BIG)
    primary.link.send(Payload(data))
    primary.turn()
    primary.link.hold()
    sent = primary.link.sent_bytes
    for _ in range(5):
        standby.turn(0.001)
        primary.turn(0.001)
    assert primary.link.sent_bytes == sent < BIG
    primary.link.go_on()
    turn_until(lambda: bool(standby.frames), primary, standby)
    assert standby.frames[0][1] == data


@pytest.mark.parametrize("bulk", [0, BIG])
def test_a_long_pause_does_not_look_like_a_dead_host(
    plain: tuple[End, End, Clock], bulk: int
) -> None:
    """QMP's stop can take seconds, where a disk is slow."""
    primary, standby, clock = plain
    if bulk:
        primary.link.send(Payload(bytes(bulk)))
        primary.turn()
    primary.link.hold()
    for _ in range(60):
        clock.now += 0.05
        for end in (primary, standby):
            end.link.tick()
            end.turn()
    assert standby.heartbeats or bulk
    primary.link.go_on()
    turn_until(lambda: primary.link.idle, primary, standby)


# -- heartbeats and silence -------------------------------------------------------------


def test_an_idle_link_stays_alive_by_heartbeats(plain: tuple[End, End, Clock]) -> None:
    primary, standby, clock = plain
    for _ in range(100):
        clock.now += 0.05
        for end in (primary, standby):
            assert 0 < end.link.tick() <= 0.05 + 1e-9
            end.turn()
    assert 30 <= primary.heartbeats <= 60
    assert 30 <= standby.heartbeats <= 60


def test_traffic_needs_no_heartbeats(plain: tuple[End, End, Clock]) -> None:
    primary, standby, clock = plain
    for _ in range(9):
        clock.now += 0.05
        primary.link.send(Payload(b"x"))
        primary.turn()
        primary.link.tick()
        standby.turn()
    assert standby.heartbeats == 0


def test_a_silent_peer_is_lost_after_the_timeout(plain: tuple[End, End, Clock]) -> None:
    primary, _, clock = plain
    clock.now += 0.49
    primary.link.tick()
    clock.now += 0.02
    with pytest.raises(exception.PeerLost, match="silent for 510 ms"):
        primary.link.tick()


def test_who_was_slow_himself_does_not_blame_the_peer(plain: tuple[End, End, Clock]) -> None:
    primary, standby, clock = plain
    standby.link.send(Payload(b"x"))
    standby.turn()
    clock.now += 3.0  # this host was busy; the frame lies in the socket
    primary.link.tick()
    primary.turn()
    assert len(primary.frames) == 1
    primary.link.tick()


def test_a_strict_side_that_stood_still_counts_the_peer_as_lost() -> None:
    """What the peer had said before lies in the socket, and is not read any more."""
    clock = Clock()
    client, server = socket.socketpair()
    primary = End(client, "two", heartbeat_s=0.1, timeout_s=0.5, strict=True, clock=clock)
    standby = End(server, "one", heartbeat_s=0.1, timeout_s=0.5, clock=clock)
    primary.link.tick()
    standby.link.send(Payload(b"committed"))
    standby.turn()
    assert not primary.link.stood_still
    clock.now += 0.51
    assert primary.link.stood_still, "also for a thread that is awake before the I/O thread"
    with pytest.raises(exception.PeerLost, match="stood still for 510 ms"):
        primary.turn()
    assert not primary.frames
    assert primary.link.stood_still
    with pytest.raises(exception.PeerLost):
        primary.link.tick()
    primary.close()
    standby.close()


def test_a_strict_side_knows_that_it_may_have_been_given_up() -> None:
    """Silences are usual, so the peer is not lost yet; but its own measure may be another."""
    clock = Clock()
    client, server = socket.socketpair()
    primary = End(client, "two", heartbeat_s=0.1, timeout_s=0.5, strict=True, clock=clock)
    assert not primary.link.overdue
    clock.now += 0.51
    assert primary.link.overdue
    primary.link.last_received = clock.now
    assert not primary.link.overdue
    primary.close()
    server.close()


def test_until_it_is_in_earnest_nobody_is_lost_for_being_slow() -> None:
    """The first synchronisation on a busy host: no standby could go on, so there is time."""
    clock = Clock()
    client, server = socket.socketpair()
    options = {"heartbeat_s": 0.1, "timeout_s": 0.5, "clock": clock, "earnest": False}
    primary, standby = End(client, "two", strict=True, **options), End(server, "one", **options)
    clock.now += 1.9
    assert not primary.link.stood_still
    primary.link.tick()  # its heartbeat is queued, and not sent
    standby.link.tick()
    clock.now += 0.2
    with pytest.raises(exception.PeerLost, match="silent for 2100 ms"):
        standby.link.tick()
    primary.link.in_earnest()
    assert not primary.link.stood_still, "whoever says so is awake"
    clock.now += 0.51
    assert primary.link.stood_still
    primary.close()
    standby.close()


def test_the_loop_is_called_in_time_for_both(plain: tuple[End, End, Clock]) -> None:
    primary, _, clock = plain
    clock.now += 0.48
    assert primary.link.tick() == pytest.approx(0.02)


# -- ends -------------------------------------------------------------------------------


def test_a_peer_that_closes_is_lost_at_once(ends: tuple[End, End]) -> None:
    primary, standby = ends
    standby.close()
    with pytest.raises(exception.PeerLost):
        turn_until(lambda: False, primary, timeout_s=5.0)


def test_a_reset_is_a_lost_peer() -> None:
    client, server = tcp_pair()
    primary = End(client, "two")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.close()
    with pytest.raises(exception.PeerLost):
        turn_until(lambda: False, primary, timeout_s=5.0)
    primary.close()


def test_writing_to_a_peer_that_has_gone_is_a_lost_peer() -> None:
    first, second = socket.socketpair()
    primary = End(first, "two")
    second.close()
    primary.link.send(Payload(bytes(1000)))
    with pytest.raises(exception.PeerLost):
        primary.link.flush()
    primary.close()


def test_whoever_breaks_the_protocol_is_found_out() -> None:
    first, second = socket.socketpair()
    primary = End(first, "two")
    second.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(exception.ProtocolMismatch):
        primary.turn(1.0)
    primary.close()
    second.close()


def test_flush_sends_what_is_queued(ends: tuple[End, End]) -> None:
    primary, standby = ends
    for index in range(5):
        primary.link.send(Payload(bytes([index]) * 10))
    primary.link.flush()
    assert primary.link.idle
    turn_until(lambda: len(standby.frames) == 5, standby)


def test_flush_gives_up_on_a_peer_that_does_not_read(ends: tuple[End, End]) -> None:
    primary, _ = ends
    primary.link.send(Payload(bytes(64 << 20)))
    begin = time.monotonic()
    primary.link.flush(0.1)
    assert time.monotonic() - begin < 5
    assert not primary.link.idle


def test_after_its_end_a_link_takes_orders_and_does_nothing(ends: tuple[End, End]) -> None:
    primary, _ = ends
    primary.link.close()
    primary.link.close()
    taken = os.eventfd(0)  # most likely the number that the link had
    primary.link.send(Payload(b"x"))
    primary.link.hold()
    primary.link.go_on()
    primary.link.flush()
    os.set_blocking(taken, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(taken)  # nobody wrote to another's descriptor
    os.close(taken)


def test_closing_while_another_thread_sends_harms_nobody() -> None:
    """The I/O thread loses the link just as the thread of the rounds hands it a checkpoint."""
    errors: list[BaseException] = []
    for _ in range(30):
        first, second = socket.socketpair()
        primary = End(first, "two")

        def send(link: Any = primary.link) -> None:
            try:
                for _ in range(200):
                    link.send(RawFrame(b"x"))
                    link.hold()
                    link.go_on()
            except BaseException as error:  # noqa: BLE001  it is the result
                errors.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        primary.link.close()
        thread.join()
        second.close()
    assert errors == []


def test_closing_while_another_thread_registers_harms_nobody() -> None:
    """The I/O thread finds the peer silent just as the main thread has the link take part."""
    errors: list[BaseException] = []
    for _ in range(300):
        first, second = socket.socketpair()
        link = Link(first, End.__new__(End), peer="two", heartbeat_s=1.0, timeout_s=1.0)
        selector = selectors.DefaultSelector()
        begin = threading.Barrier(2)

        def register(link: Link = link, loop: Any = selector, begin: Any = begin) -> None:
            begin.wait()
            try:
                link.register(loop)
            except BaseException as error:  # noqa: BLE001  it is the result
                errors.append(error)

        thread = threading.Thread(target=register)
        thread.start()
        begin.wait()
        link.close()
        thread.join()
        assert len(selector.get_map()) == 0
        selector.close()
        second.close()
    assert errors == []


def test_a_closed_link_takes_no_part_any_more() -> None:
    first, second = socket.socketpair()
    link = Link(first, End.__new__(End), peer="two", heartbeat_s=1.0, timeout_s=1.0)
    link.close()
    with selectors.DefaultSelector() as selector:
        link.register(selector)
        assert len(selector.get_map()) == 0
    second.close()


def test_selector_holds_nothing_of_a_closed_link() -> None:
    first, second = socket.socketpair()
    primary = End(first, "two")
    primary.link.close()
    assert len(primary.selector.get_map()) == 0
    second.close()


# -- damage on the wire -----------------------------------------------------------------


def test_a_bit_that_flips_under_tls_is_noticed_and_delivers_nothing(hosts: dict[str, Any]) -> None:
    """Through a proxy, ``near`` and ``far``, that changes one bit."""
    client, near = tcp_pair()
    far, server = tcp_pair()
    damage = threading.Event()

    def forward(source: socket.socket, target: socket.socket, damaged: bool) -> None:
        source.settimeout(None)
        target.settimeout(None)
        try:
            while data := bytearray(source.recv(65536)):
                if damaged and damage.is_set() and len(data) > 1000:
                    data[500] ^= 4
                    damage.clear()
                target.sendall(data)
        except OSError:
            pass
        finally:
            for sock in (source, target):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    threads = [
        threading.Thread(target=forward, args=(near, far, True), daemon=True),
        threading.Thread(target=forward, args=(far, near, False), daemon=True),
    ]
    for thread in threads:
        thread.start()
    secured_client, secured_server = both(
        lambda: tls.connect(hosts["one"], client, "two"),
        lambda: tls.accept(hosts["two"], server, "one"),
    )
    primary, standby = End(secured_client, "two"), End(secured_server, "one")
    primary.link.send(Payload(b"good"))
    turn_until(lambda: len(standby.frames) == 1, primary, standby)
    damage.set()
    primary.link.send(Payload(bytes(1 << 20)))
    with pytest.raises(exception.PeerLost, match="TLS says"):
        turn_until(lambda: len(standby.frames) == 2, primary, standby)
    assert [header for header, _ in standby.frames] == [Header(Type.PRELUDE, 4)]
    primary.close()
    standby.close()
    for sock in (near, far):
        sock.close()
    for thread in threads:
        thread.join(5.0)
