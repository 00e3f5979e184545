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

"""Write logs that wait: nothing is written before it may be, and all of it then, in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.standby import journal as journal_module
from nova_pmt.standby.journal import Journal, NoDisks
from tests.unit.fakes.disk import SECTOR, Images, journal, log_entry

SIZES = [16 * SECTOR, 40 * SECTOR]


def fill(letter: str, sectors: int) -> bytes:
    return letter.encode() * (sectors * SECTOR)


@pytest.fixture
def made() -> tuple[Journal, Images]:
    return journal(SIZES)


def stage(journal: Journal, disk: int, data: bytes) -> None:
    journal.stage(disk, memoryview(data))


def test_staging_writes_nothing_and_applying_writes_it_once(made: tuple[Journal, Images]) -> None:
    journal, images = made
    before = [bytes(data) for data in images.data]
    stage(journal, 0, log_entry(1, fill("x", 2)))
    stage(journal, 1, log_entry(5, b"", count=3, flags=4))
    assert images.data == before
    assert images.writes == 0
    journal.apply()
    assert images.data[0][SECTOR : 3 * SECTOR] == fill("x", 2)
    assert images.data[1][5 * SECTOR : 8 * SECTOR] == bytes(3 * SECTOR)
    writes = images.writes
    journal.apply()
    assert images.writes == writes
    assert journal.summary() == {"disks": 2, "disk_bytes_applied": 4 * SECTOR}


@settings(max_examples=30)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=10))
def test_an_entry_that_comes_in_parts_is_one_entry(pieces: list[int]) -> None:
    waiting, images = journal(SIZES)
    log = log_entry(2, fill("1", 3)) + log_entry(0, b"", flags=1) + log_entry(4, fill("2", 2))
    start = turn = 0
    while start < len(log):
        assert waiting.whole() == (start in (0, 4 * SECTOR, 5 * SECTOR))
        size = pieces[turn % len(pieces)]
        stage(waiting, 0, log[start : start + size])
        start, turn = start + size, turn + 1
    assert waiting.whole()
    waiting.apply()
    assert images.data[0][2 * SECTOR : 6 * SECTOR] == fill("1", 2) + fill("2", 2)


def test_a_part_of_an_entry_may_be_applied_and_the_rest_later(
    made: tuple[Journal, Images],
) -> None:
    """Before the first commit all is written as it comes."""
    journal, images = made
    entry = log_entry(0, fill("1", 2) + fill("2", 2))
    stage(journal, 0, entry[: 3 * SECTOR])
    journal.apply()
    assert not journal.whole()
    assert images.data[0][: 2 * SECTOR] == fill("1", 2)
    stage(journal, 0, entry[3 * SECTOR :])
    journal.apply()
    assert journal.whole()
    assert images.data[0][: 4 * SECTOR] == fill("1", 2) + fill("2", 2)


def test_one_log_that_is_not_whole_is_enough(made: tuple[Journal, Images]) -> None:
    journal, _ = made
    assert journal.whole()
    stage(journal, 0, log_entry(0, fill("1", 1)))
    stage(journal, 1, log_entry(0, fill("1", 1))[:-1])
    assert not journal.whole()


def test_what_is_discarded_is_never_written(made: tuple[Journal, Images]) -> None:
    journal, images = made
    stage(journal, 0, log_entry(0, fill("1", 3)))
    stage(journal, 1, log_entry(0, fill("1", 3))[:1000])
    journal.discard()
    journal.apply()
    assert images.writes == 0
    assert journal.summary()["disk_bytes_applied"] == 0


def test_what_is_discarded_leaves_no_half_entry_behind(made: tuple[Journal, Images]) -> None:
    journal, images = made
    stage(journal, 0, log_entry(0, fill("1", 3))[:1000])
    journal.discard()
    assert journal.whole()
    stage(journal, 0, log_entry(4, fill("2", 1)))
    journal.apply()
    assert images.data[0][4 * SECTOR : 5 * SECTOR] == fill("2", 1)


def test_what_waits_is_bounded(
    made: tuple[Journal, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "STAGING_BYTES", 6 * SECTOR)
    journal, images = made
    for _ in range(3):  # what was applied, or discarded, does not count
        stage(journal, 0, log_entry(0, fill("1", 3)))
        stage(journal, 1, log_entry(0, fill("1", 1)))
        journal.apply()
        stage(journal, 0, log_entry(0, fill("1", 5)))
        journal.discard()
    writes = images.writes
    stage(journal, 0, log_entry(0, fill("1", 3)))
    with pytest.raises(exception.PeerError) as caught:
        stage(journal, 1, log_entry(0, fill("1", 2)))
    assert caught.value.code == "STAGING_FULL"
    assert "interval_ms" in caught.value.cure
    assert images.writes == writes


def test_a_disk_that_is_only_read_has_no_log() -> None:
    waiting, images = journal(SIZES, [1])
    with pytest.raises(exception.CheckpointCorrupt, match="disk 1 is read-only"):
        stage(waiting, 1, log_entry(0, fill("1", 1)))
    waiting.copy(1, 0, memoryview(fill("c", 40)))  # but a first copy
    assert images.data[1] == fill("c", 40)
    stage(waiting, 0, log_entry(0, fill("1", 1)))


def test_what_is_no_log_is_refused_with_the_disk(made: tuple[Journal, Images]) -> None:
    journal, images = made
    stage(journal, 1, log_entry(0, fill("1", 1)))
    with pytest.raises(exception.CheckpointCorrupt, match="write log of disk 1"):
        stage(journal, 1, log_entry(39, fill("1", 2)))
    journal.discard()
    journal.apply()
    assert images.writes == 0


def test_the_bytes_of_a_part_may_be_reused_once_it_was_applied(
    made: tuple[Journal, Images],
) -> None:
    journal, images = made
    part = bytearray(log_entry(0, fill("1", 1))[:900])
    stage(journal, 0, bytes(part))
    part[:] = bytes(900)
    stage(journal, 0, log_entry(0, fill("1", 1))[900:])
    journal.apply()
    assert images.data[0][:SECTOR] == fill("1", 1)


def test_a_failure_to_write_is_told() -> None:
    waiting, images = journal(SIZES)

    def apply(_disk: int, _entries: object) -> None:
        raise exception.DiskImageError("no space left on device")

    images.apply = apply  # type: ignore[method-assign]
    stage(waiting, 0, log_entry(0, fill("1", 1)))
    with pytest.raises(exception.DiskImageError):
        waiting.apply()


def test_a_guest_without_disks_needs_no_journal() -> None:
    none = NoDisks()
    none.apply()
    none.discard()
    assert none.count == 0
    assert none.whole()
    assert none.summary() == {}
