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

"""A checkpoint reaches the image whole, in its turn, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.checkpoint.cache import SLAB_BYTES
from nova_pmt.checkpoint.interfaces import Pages
from nova_pmt.replication.protocol import HEADER, Digest, Header, Type
from nova_pmt.replication.sender import Sender
from tests.unit.fakes.guest import device_state
from tests.unit.fakes.standby import FakeLink, FakeStandby, two_blocks

PAGES, SIDE = 300, 20


def contents(numbers: list[int], seed: int) -> Pages:
    pages = np.zeros((len(numbers), 4096), np.uint8)
    pages[:] = (np.array(numbers)[:, None] * 7 + seed) % 251
    return pages


def frames(epoch: int, parts: list[list[int]], seed: int = 1, state: bytes = b"") -> list[bytes]:
    """A whole checkpoint as the sender makes it: PAGES frames and the COMMIT."""
    made: list[bytearray] = []

    def collect(data: memoryview) -> None:
        made[-1].extend(data)

    link = FakeLink(collect)
    sender = Sender(link, 1 << 16, 64)  # type: ignore[arg-type]
    for numbers in parts:
        sender.send_pages(epoch, np.array(numbers, np.int64), contents(numbers, seed), None)
    sender.send_commit(epoch, state or device_state(epoch))
    found = []
    for _ in range(len([part for part in parts if part]) + 1):
        made.append(bytearray())
        link.step(1 << 30)
        while link._parts:
            link.step(1 << 30)
        found.append(bytes(made[-1]))
    return found


@pytest.fixture
def standby() -> Iterator[FakeStandby]:
    made = FakeStandby(two_blocks(PAGES, SIDE), 16 * SLAB_BYTES)
    for frame in frames(1, [list(range(0, 40)), list(range(290, 300))]):
        made.feed(frame)
    assert made.acknowledged == [1]
    yield made
    made.staging.close()


def feed_all(standby: FakeStandby, parts: list[bytes]) -> None:
    for part in parts:
        standby.feed(part)


def refused(standby: FakeStandby, parts: list[bytes]) -> exception.PeerError:
    """The error that these frames are refused with; the image must be as it was."""
    before, state = standby.image.contents().copy(), standby.receiver.device_state
    committed = standby.receiver.committed
    with pytest.raises(exception.PeerError) as caught:
        feed_all(standby, parts)
    assert np.array_equal(standby.image.contents(), before)
    assert standby.receiver.device_state == state
    assert standby.receiver.committed == committed == len(standby.acknowledged)
    standby.receiver.discard()
    assert standby.staging.used_slabs == 0
    return caught.value


# -- whole checkpoints ------------------------------------------------------------------


def test_a_checkpoint_is_applied_whole_and_answered_once(standby: FakeStandby) -> None:
    numbers = [5, 3, 299, 280, 279]
    feed_all(standby, frames(2, [numbers], seed=9))
    assert standby.acknowledged == [1, 2]
    assert np.array_equal(standby.image.contents()[numbers], contents(numbers, 9))
    assert standby.receiver.device_state == device_state(2)


def test_nothing_touches_the_image_before_the_commit(standby: FakeStandby) -> None:
    writes = standby.image.writes
    parts = frames(2, [[1, 2, 3], [4, 5], [290]], seed=9)
    for part in parts[:-1]:
        standby.feed(part)
        assert standby.image.writes == writes
    standby.feed(parts[-1])
    assert standby.image.writes == writes + 3


def test_the_answer_goes_out_before_the_image_is_written(standby: FakeStandby) -> None:
    """Output must not wait for memory copies that the guest does not depend on."""
    writes = standby.image.writes
    feed_all(standby, frames(2, [[1, 2, 3]]))
    assert standby.images_at_acknowledge[-1] == writes


def test_checkpoint_one_is_written_as_it_comes_so_that_any_size_fits() -> None:
    standby = FakeStandby(two_blocks(6000, 10), 4 * SLAB_BYTES)
    parts = [list(range(at, at + 250)) for at in range(0, 6000, 250)]
    for part in frames(1, parts):
        standby.feed(part)
        assert standby.staging.backed_slabs <= 4
    assert standby.acknowledged == [1]
    assert np.array_equal(standby.image.contents(), contents(list(range(6000)), 1))


def test_of_a_page_that_comes_twice_the_last_copy_counts(standby: FakeStandby) -> None:
    link_frames: list[bytes] = []
    link = FakeLink(lambda data: link_frames.append(bytes(data)))
    sender = Sender(link, 1 << 16, 64)  # type: ignore[arg-type]
    numbers = np.array([4, 5, 6], np.int64)
    sender.send_pages(2, numbers, contents([4, 5, 6], 50), lambda: None)  # ahead of the pause
    sender.send_pages(2, numbers[1:], contents([5, 6], 60), None)
    sender.send_commit(2, device_state(2))
    while link.step(1 << 30):
        pass
    standby.feed(b"".join(link_frames))
    image = standby.image.contents()
    assert np.array_equal(image[[4]], contents([4], 50))
    assert np.array_equal(image[[5, 6]], contents([5, 6], 60))


def test_an_empty_checkpoint_still_counts(standby: FakeStandby) -> None:
    writes = standby.image.writes
    feed_all(standby, frames(2, []))
    assert standby.acknowledged == [1, 2]
    assert standby.image.writes == writes


def test_sending_no_pages_calls_back_at_once() -> None:
    called = []
    link = FakeLink(lambda _data: None)
    Sender(link, 1 << 16, 64).send_pages(  # type: ignore[arg-type]
        1, np.zeros(0, np.int64), np.zeros((0, 4096), np.uint8), lambda: called.append(1)
    )
    Sender(link, 1 << 16, 64).send_pages(  # type: ignore[arg-type]
        1, np.zeros(0, np.int64), np.zeros((0, 4096), np.uint8), None
    )
    assert called == [1] and link.idle


def test_staging_follows_the_size_of_checkpoints(standby: FakeStandby) -> None:
    feed_all(standby, frames(2, [[at] for at in range(12)]))
    assert standby.staging.peak_slabs >= 12
    for epoch in range(3, 33):
        feed_all(standby, frames(epoch, [[1]]))
    assert standby.staging.backed_slabs <= 3
    assert standby.receiver.summary()["committed"] == 32
    assert standby.receiver.summary()["staging_mib"] == standby.staging.backed_slabs


# -- what is not whole ------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_payload_is_found(which: int, where: float, bit: int) -> None:
    standby = FakeStandby(two_blocks(PAGES, SIDE), 16 * SLAB_BYTES)
    feed_all(standby, frames(1, [list(range(30))]))
    parts = [bytearray(part) for part in frames(2, [[1, 2, 3], [280, 285]], seed=3)]
    damaged = parts[which]
    at = HEADER.size + int(where * (len(damaged) - HEADER.size))
    damaged[at] ^= 1 << bit
    error = refused(standby, [bytes(part) for part in parts])
    assert type(error) is exception.CheckpointCorrupt
    assert error.code == "CHECKPOINT_CORRUPT"
    assert "thrown away whole" in error.cure


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_cut_short_anywhere_leaves_the_image_alone(where: float) -> None:
    standby = FakeStandby(two_blocks(PAGES, SIDE), 16 * SLAB_BYTES)
    feed_all(standby, frames(1, [list(range(30))]))
    stream = b"".join(frames(2, [[1, 2, 3], [280, 285]], seed=3))
    before, writes = standby.image.contents().copy(), standby.image.writes
    standby.feed(stream[: int(where * len(stream))])
    standby.receiver.discard()
    assert standby.acknowledged == [1]
    assert standby.image.writes == writes
    assert np.array_equal(standby.image.contents(), before)
    assert standby.staging.used_slabs == 0


@pytest.mark.parametrize("epoch", [0, 1, 3, 2**63])
def test_pages_of_another_epoch_are_refused(standby: FakeStandby, epoch: int) -> None:
    """Replayed frames of a checkpoint that was committed are of another epoch, too."""
    error = refused(standby, frames(epoch, [[1]]))
    assert type(error) is exception.CheckpointCorrupt
    assert "2 is due" in error.message


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_commit_of_another_epoch_is_refused(standby: FakeStandby, epoch: int) -> None:
    error = refused(standby, frames(epoch, []))
    assert type(error) is exception.CheckpointCorrupt


@pytest.mark.parametrize("number", [-1, PAGES, PAGES + 5000, 2**62, -(2**63)])
def test_a_page_that_there_is_not_is_refused(standby: FakeStandby, number: int) -> None:
    frame = bytearray(frames(2, [[1, 2]])[0])
    frame[HEADER.size : HEADER.size + 8] = number.to_bytes(8, "little", signed=True)
    error = refused(standby, [bytes(frame)])
    assert type(error) is exception.CheckpointCorrupt
    assert "out of range" in error.message


def test_a_frame_that_is_missing_is_noticed(standby: FakeStandby) -> None:
    first, _second, commit = frames(2, [[1, 2], [3]])
    error = refused(standby, [first, commit])
    assert "2 of 3 pages" in error.message


def test_a_frame_that_comes_twice_is_noticed(standby: FakeStandby) -> None:
    first, second, commit = frames(2, [[1, 2], [3]])
    refused(standby, [first, first, second, commit])


def test_frames_in_another_order_are_noticed(standby: FakeStandby) -> None:
    first, second, commit = frames(2, [[1, 2], [3]])
    refused(standby, [second, first, commit])


def test_a_wrong_count_is_noticed_though_the_checksum_is_right(standby: FakeStandby) -> None:
    state = device_state(2)
    digest = Digest().finish(state)
    header = Header(Type.COMMIT, len(digest) + len(state), 2, 5)
    assert type(refused(standby, [header.pack() + digest + state])) is exception.CheckpointCorrupt


@pytest.mark.parametrize("state", [b"no device state", device_state(2)[:-1]])
def test_a_device_state_that_is_none_is_refused(standby: FakeStandby, state: bytes) -> None:
    error = refused(standby, frames(2, [[1]], state=state))
    assert type(error) is exception.CheckpointCorrupt
    assert "device state of checkpoint 2" in error.message


def test_no_memory_to_stage_in_is_told_with_its_cure() -> None:
    standby = FakeStandby(two_blocks(1300, SIDE), 4 * SLAB_BYTES)
    feed_all(standby, frames(1, [[1]]))
    error = refused(standby, frames(2, [list(range(at, at + 256)) for at in range(0, 1280, 256)]))
    assert error.code == "STAGING_FULL"
    assert "more free memory" in error.cure


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 599), st.integers(1, 256)), min_size=5, max_size=25))
def test_what_is_sent_again_and_again_does_not_fill_the_staging(
    spills: list[tuple[int, int]],
) -> None:
    """A guest that outruns cache and link: the newest copy of each page is kept."""
    standby = FakeStandby(two_blocks(600, SIDE), 4 * SLAB_BYTES)
    feed_all(standby, frames(1, [list(range(250)), list(range(250, 500)), list(range(500, 600))]))
    expected = standby.image.contents().copy()
    stream: list[bytes] = []
    link = FakeLink(lambda data: stream.append(bytes(data)))
    sender = Sender(link, 1 << 16, 64)  # type: ignore[arg-type]
    for turn, (first, count) in enumerate(spills):
        numbers = list(range(first, min(600, first + count)))
        data = contents(numbers, turn * 3)
        expected[numbers] = data
        sender.send_pages(2, np.array(numbers, np.int64), data, None)
    sender.send_commit(2, device_state(2))
    while link.step(1 << 30):
        pass
    before = standby.image.writes
    feed_all(standby, stream[:-2])
    assert standby.image.writes == before
    feed_all(standby, stream[-2:])
    assert standby.acknowledged == [1, 2]
    assert np.array_equal(standby.image.contents(), expected)


def test_a_commit_whose_answer_cannot_be_sent_is_applied_all_the_same() -> None:
    """The primary died when it had sent everything: its standby goes on from this checkpoint."""
    standby = FakeStandby(two_blocks(40, 4), 8 << 20)
    link = FakeLink(standby.feed)
    sender = Sender(link, 40, 40)  # type: ignore[arg-type]

    def checkpoint(epoch: int) -> None:
        sender.send_pages(epoch, np.arange(3), np.full((3, 4096), epoch, np.uint8), None)
        sender.send_commit(epoch, device_state(epoch))
        while link.step():
            pass

    def fail(_epoch: int, _receipt: int) -> None:
        raise exception.PeerLost("connection reset")

    checkpoint(1)
    standby.receiver._acknowledge = fail
    with pytest.raises(exception.PeerLost, match="reset"):
        checkpoint(2)
    assert standby.receiver.committed == 2
    assert (standby.image.contents()[:3] == 2).all()


@pytest.mark.parametrize("changed", [0, 1, 100, 255, 256])
def test_of_a_slab_some_pages_are_sent_whole_and_of_others_their_changes(changed: int) -> None:
    """And the standby stages them in one slab, as they were."""
    standby = FakeStandby(two_blocks(600, 4), 8 << 20)
    link = FakeLink(standby.feed)
    sender = Sender(link, 600, 600)  # type: ignore[arg-type]
    rng, numbers = np.random.default_rng(1), np.arange(256)
    pages = rng.integers(0, 256, (256, 4096), np.uint8)
    sent, slabs = 0, []
    acknowledge = standby.receiver._acknowledge

    def staged(epoch: int, receipt: int) -> None:
        if epoch > 1:
            slabs.append(len(standby.receiver._staged))
        acknowledge(epoch, receipt)

    standby.receiver._acknowledge = staged

    def checkpoint(epoch: int) -> int:
        sender.send_pages(epoch, numbers, pages.copy(), None)
        sender.send_commit(epoch, device_state(epoch))
        before = len(standby.frames)
        while link.step():
            pass
        assert np.array_equal(standby.image.contents()[:256], pages)
        return sum(header.length for header in standby.frames[before:])

    checkpoint(1)
    for epoch in range(2, 5):
        pages[:changed] = rng.integers(0, 256, (changed, 4096), np.uint8)
        pages[changed:, 8] += 1
        sent = checkpoint(epoch)
    assert standby.acknowledged == [1, 2, 3, 4]
    assert changed * 4096 <= sent <= changed * 4200 + (256 - changed) * 40 + 1000
    assert slabs == [1, 1, 1]


# -- what a standby says that it has ----------------------------------------------------


def exchange() -> tuple[Sender, FakeStandby]:
    """Two checkpoints, sent and committed, as the sender and the standby know them."""
    standby = FakeStandby(two_blocks(40, 4), 8 << 20)
    link = FakeLink(standby.feed)
    sender = Sender(link, 40, 40)  # type: ignore[arg-type]
    for epoch in (1, 2):
        sender.send_pages(epoch, np.arange(3), np.full((3, 4096), epoch, np.uint8), None)
        sender.send_commit(epoch, device_state(epoch))
        while link.step():
            pass
    return sender, standby


def test_an_honest_standby_is_believed() -> None:
    sender, standby = exchange()
    assert standby.acknowledged == [1, 2]
    assert len(set(standby.receipts)) == 2
    for epoch, receipt in zip(standby.acknowledged, standby.receipts, strict=True):
        sender.received(epoch, receipt)


def test_a_standby_that_lies_about_its_checksum_is_found_out() -> None:
    """It answers without having looked, for another checkpoint, twice, or before it was sent."""
    sender, standby = exchange()
    one, two = standby.receipts
    with pytest.raises(exception.PeerError, match="another checksum"):
        sender.received(1, 0)
    with pytest.raises(exception.PeerError, match="another checksum"):
        sender.received(2, one)
    sender, standby = exchange()
    sender.received(1, one)
    with pytest.raises(exception.PeerError, match="not sent, or twice"):
        sender.received(1, one)
    with pytest.raises(exception.PeerError, match="not sent, or twice"):
        sender.received(3, two)
