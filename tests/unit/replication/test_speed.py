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

"""What sending a byte takes, on a link that is played: bytes go out one after the other."""

from __future__ import annotations

import pytest

from nova_pmt.replication.speed import ANSWERED_BYTES, STRETCH_BYTES, Speed

GBIT, TRIP_S = 8e-9, 2e-4
MIB = 1 << 20


class Played:
    """A link with a kernel that takes all at once, and a peer that answers."""

    def __init__(
        self, s_per_byte: float = GBIT, buffer_bytes: int = 1 << 40, trip_s: float = TRIP_S
    ) -> None:
        self.now = 100.0
        self.speed = Speed(lambda: self.now)
        self.sent = 0
        self._s_per_byte, self._buffer, self._trip_s = s_per_byte, buffer_bytes, trip_s
        self._out_at = self.now  # when the kernel has sent what it was given

    def send(self, count: int, work_s: float = 0.0) -> None:
        self.speed.busy(self.sent)
        self.now += work_s
        if work_s:
            self.speed.worked(work_s)
        self._out_at = max(self._out_at, self.now) + count * self._s_per_byte
        free_at = self._out_at - self._buffer * self._s_per_byte
        if free_at > self.now:
            self.speed.refused()
            self.now = free_at
        self.sent += count

    def commit(self) -> tuple[object, float]:
        """The question, and when its answer will be here."""
        asked = self.speed.asked(self.sent)
        self.speed.idle()
        return asked, self._out_at + self._trip_s

    def answer(self, asked: tuple[object, float]) -> None:
        self.now = max(self.now, asked[1])
        self.speed.answered(asked[0])  # type: ignore[arg-type]

    def round(self, count: int, work_s: float = 0.0) -> None:
        self.send(count, work_s)
        self.answer(self.commit())


def near(s_per_byte: float = GBIT, share: float = 0.2) -> object:
    return pytest.approx(s_per_byte, rel=share)


def test_a_round_that_the_kernel_takes_at_once_is_measured_by_its_answer() -> None:
    link = Played()
    for _ in range(10):
        link.round(MIB)
        link.now += 0.02
    assert link.speed.s_per_byte == near()


def test_the_time_between_rounds_does_not_count() -> None:
    link = Played()
    for _ in range(10):
        link.send(MIB // 2)
        link.speed.idle()
        link.now += 5.0  # what is sent ahead of the pause
        link.round(MIB)
    assert link.speed.s_per_byte == near()


def test_time_that_was_spent_to_send_less_does_not_count() -> None:
    link = Played()
    for _ in range(10):
        link.round(MIB, work_s=0.01)
        link.now += 0.02
    assert link.speed.s_per_byte == near()


def test_rounds_that_follow_each_other_share_the_link() -> None:
    """The second begins while the first is under way."""
    link = Played()
    link.send(MIB)
    first = link.commit()
    for _ in range(20):
        link.send(MIB)
        second = link.commit()
        link.answer(first)
        first = second
    assert link.speed.s_per_byte == near()


def test_few_bytes_tell_nothing() -> None:
    link = Played()
    for _ in range(10):
        link.round(ANSWERED_BYTES - 1)
        link.now += 1.0
    assert link.speed.s_per_byte == 0.0


def test_what_every_answer_takes_is_not_the_links() -> None:
    """A standby that is slow to answer makes no link slow."""
    link = Played(trip_s=5e-3)
    for _ in range(10):
        link.round(MIB // 4)
    assert link.speed.s_per_byte > 2 * GBIT  # nobody knows better
    for _ in range(40):
        link.round(100)
        link.round(MIB // 4)
    assert link.speed.s_per_byte == near()


def test_an_old_measurement_fades_where_little_is_sent() -> None:
    link = Played()
    for _ in range(10):
        link.round(MIB)
    for _ in range(2000):
        link.round(1000)
    assert link.speed.s_per_byte < GBIT / 20


@pytest.mark.parametrize("buffer_bytes", [MIB, 4 * MIB, 6 * MIB])
@pytest.mark.parametrize("count", [4.25, 5, 7.5, 16])
def test_what_is_left_of_a_long_stretch_does_not_count_for_all(
    buffer_bytes: int, count: float
) -> None:
    link = Played(buffer_bytes=buffer_bytes)
    for _ in range(30):
        for _ in range(int(count * 4)):
            link.send(MIB // 4)
        link.answer(link.commit())
        link.now += 0.02
    assert 0.4 * GBIT < link.speed.s_per_byte < 1.3 * GBIT


def test_work_while_the_kernel_sends_is_the_links_time() -> None:
    """Where the link is the slower half, frames are made while the one before is under way."""
    link = Played(buffer_bytes=MIB)
    for _ in range(64):
        link.send(MIB // 4, work_s=0.0015)
    assert link.speed.s_per_byte == near()


def test_a_pause_does_not_count() -> None:
    link = Played()
    for _ in range(10):
        link.send(MIB // 2)
        link.now += 0.05
        link.speed.held_s += 0.05
        link.send(MIB // 2)
        link.answer(link.commit())
        link.now += 0.02
    assert link.speed.s_per_byte <= 1.2 * GBIT


def test_a_long_stretch_is_measured_before_any_answer() -> None:
    link = Played(buffer_bytes=MIB)
    for _ in range(2 * STRETCH_BYTES // MIB):
        link.send(MIB)
    assert 0.5 * GBIT < link.speed.s_per_byte <= GBIT * 1.01
    for _ in range(20 * STRETCH_BYTES // MIB):
        link.send(MIB)
    assert link.speed.s_per_byte == near()


def test_a_link_that_becomes_slower_is_noticed() -> None:
    link = Played(GBIT)
    for _ in range(10):
        link.round(MIB)
    link._s_per_byte = 10 * GBIT
    for _ in range(30):
        link.round(MIB)
    assert link.speed.s_per_byte == near(10 * GBIT)


def test_where_nearly_all_was_work_nothing_is_concluded() -> None:
    link = Played(GBIT)
    for _ in range(10):
        asked = link.speed.asked(link.sent)
        link.sent += MIB
        link.speed.worked(0.009)
        link.now += 0.01
        link.speed.answered((asked[0], link.sent))
    assert link.speed.s_per_byte == 0.0
