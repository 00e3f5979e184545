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

"""A disk's write log: put on, cut, read, freed, taken off, whatever happened in between."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nova_pmt import exception
from nova_pmt.guest.disk import discover
from nova_pmt.guest.disk import log as log_module
from nova_pmt.guest.disk.log import CHUNK_BYTES, DiskLog, LogSpace, recover_all
from tests.unit.fakes.blocks import DISKS, SECTOR, FakeBlocks

LIMIT = 64 << 20


@pytest.fixture
def qemu() -> Iterator[FakeBlocks]:
    blocks = FakeBlocks()
    yield blocks
    blocks.close()


@pytest.fixture
def log(qemu: FakeBlocks, tmp_path: Path) -> Iterator[DiskLog]:
    space = LogSpace(LIMIT)
    made = DiskLog(discover.disks(DISKS, qemu)[0], qemu, str(tmp_path), space)
    yield made
    made.close()
    space.close()


def write(qemu: FakeBlocks, log: DiskLog, sectors: int, fill: bytes = b"x") -> int:
    """Returns what the log grows by."""
    qemu.write(log.disk.filter_node, 7, fill * SECTOR * sectors)
    return SECTOR * (sectors + 1)


def segment(log: DiskLog, epoch: int) -> bytes:
    return b"".join(log.segments(epoch))


def state(qemu: FakeBlocks) -> tuple[dict[str, object], dict[str, str]]:
    return dict(qemu.nodes), dict(qemu.devices)


# -- on and off -------------------------------------------------------------------------


def test_installed_the_device_works_on_the_filter_and_the_file_is_qemus(
    qemu: FakeBlocks, log: DiskLog, tmp_path: Path
) -> None:
    log.install(3)
    assert qemu.devices[log.disk.qom_path] == "pmt-log-vda"
    options = qemu.nodes["pmt-log-vda"]["options"]
    assert options["log_sector_size"] == SECTOR
    assert options["discard"] == "unmap"
    assert options["cache"] == {"no-flush": True}
    assert qemu.nodes["pmt-file-vda"]["options"]["auto_read_only"] is False
    status = os.stat(log.path)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.stat(tmp_path).st_uid


def test_uninstalled_all_is_as_it_was(qemu: FakeBlocks, log: DiskLog) -> None:
    before = state(qemu)
    log.install()
    log.uninstall()
    assert state(qemu) == before
    assert not os.path.exists(log.path)
    log.uninstall()


@pytest.mark.parametrize("command", ["blockdev-add", "qom-set"])
def test_an_installation_that_fails_is_undone(qemu: FakeBlocks, log: DiskLog, command: str) -> None:
    before = state(qemu)
    qemu.fails[command] = "no"
    with pytest.raises(exception.DiskLogError, match="vda"):
        log.install()
    qemu.fails.clear()
    assert state(qemu) == before
    assert not os.path.exists(log.path)


def test_a_directory_that_is_not_there_is_told(qemu: FakeBlocks, tmp_path: Path) -> None:
    disk = discover.disks(DISKS, qemu)[0]
    with pytest.raises(exception.DiskLogError):
        DiskLog(disk, qemu, str(tmp_path / "none"), LogSpace(LIMIT)).install()


def test_a_link_is_not_followed(qemu: FakeBlocks, log: DiskLog, tmp_path: Path) -> None:
    """The directory is QEMU's, and QEMU may have been broken into."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    os.symlink(victim, log.path)
    log.install()
    assert victim.read_text() == "untouched"
    assert not os.path.islink(log.path)


def test_what_a_dead_worker_left_is_taken_over_with_an_empty_log(
    qemu: FakeBlocks, log: DiskLog, tmp_path: Path
) -> None:
    log.install(3)
    write(qemu, log, 8)
    other = DiskLog(discover.disks(DISKS, qemu)[0], qemu, str(tmp_path), LogSpace(LIMIT))
    other.install(4)
    grown = write(qemu, other, 2)
    other.cut(1)
    assert other.segment_bytes(1) == grown
    other.uninstall()
    assert qemu.devices[log.disk.qom_path] == log.disk.node


def test_a_dead_workers_log_can_be_read(qemu: FakeBlocks, log: DiskLog, tmp_path: Path) -> None:
    log.install(3)
    write(qemu, log, 8, b"a")
    log.cut(5)
    log.release(5)
    write(qemu, log, 1, b"b")
    log.cut(6)
    write(qemu, log, 1, b"c")
    log.close()
    left = DiskLog.left(log.disk, qemu, str(tmp_path))
    assert left is not None
    assert (left.generation, left.committed_epoch) == (3, 5)
    left.unplug()
    assert qemu.devices[log.disk.qom_path] == log.disk.node
    data = b"".join(left.unreleased())
    assert (data[SECTOR], data[3 * SECTOR], len(data)) == (ord("b"), ord("c"), 4 * SECTOR)
    left.uninstall()
    assert DiskLog.left(log.disk, qemu, str(tmp_path)) is None


def test_a_log_that_writes_pass_by_is_none(qemu: FakeBlocks, log: DiskLog, tmp_path: Path) -> None:
    """Its worker died after it took the filter off: since then the guest wrote unseen."""
    log.install(3)
    write(qemu, log, 8)
    log.unplug()
    log.close()
    assert DiskLog.left(log.disk, qemu, str(tmp_path)) is None
    assert DiskLog.recover(log.disk, qemu, str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"x" * 600, b"PMTLOG1\0" + b"\xff" * 600])
def test_a_log_that_makes_no_sense_is_none_but_is_taken_off(
    qemu: FakeBlocks, log: DiskLog, tmp_path: Path, content: bytes
) -> None:
    log.install()
    Path(log.path).write_bytes(content)
    assert DiskLog.left(log.disk, qemu, str(tmp_path)) is None
    assert DiskLog.recover(log.disk, qemu, str(tmp_path))
    assert not DiskLog.recover(log.disk, qemu, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_all_is_taken_off_without_knowing_the_disks(
    qemu: FakeBlocks, log: DiskLog, tmp_path: Path
) -> None:
    before = state(qemu)
    log.install()
    second = DiskLog(discover.disks(DISKS, qemu)[1], qemu, str(tmp_path), None)
    second.install()
    assert recover_all(qemu, str(tmp_path))
    assert state(qemu) == before
    assert os.listdir(tmp_path) == []
    assert not recover_all(qemu, str(tmp_path))
    assert not recover_all(qemu, str(tmp_path / "none"))
    second.close()


def test_after_an_external_snapshot_the_device_gets_the_new_image(
    qemu: FakeBlocks, log: DiskLog
) -> None:
    """libvirt puts it below the filter."""
    log.install()
    backing = {"file": "libvirt-3-storage", "backing": log.disk.node}
    qemu.add_node("libvirt-4-format", drv="qcow2", file="/snap", size=64 << 20, children=backing)
    qemu.nodes["pmt-log-vda"]["children"]["file"] = "libvirt-4-format"
    log.uninstall()
    assert qemu.devices[log.disk.qom_path] == "libvirt-4-format"


def test_a_disk_that_was_resized_meanwhile_is_told_to_the_guest(
    qemu: FakeBlocks, log: DiskLog
) -> None:
    log.install()
    qemu.nodes[log.disk.node]["size"] = 80 << 20
    log.uninstall()
    assert qemu.commands.count("block_resize") == 1
    assert qemu.commands.index("block_resize") > qemu.commands.index("qom-set")


def test_the_image_of_a_disk_that_was_detached_meanwhile_is_closed(
    qemu: FakeBlocks, log: DiskLog
) -> None:
    """libvirt tried to, and failed for the filter."""
    log.install()
    del qemu.devices[log.disk.qom_path]
    log.uninstall()
    assert not {"libvirt-3-format", "libvirt-3-storage", "pmt-log-vda"} & qemu.nodes.keys()
    assert "libvirt-2-format" in qemu.nodes


def test_a_node_that_qemu_will_not_delete_is_told(qemu: FakeBlocks, log: DiskLog) -> None:
    log.install()
    qemu.fails["blockdev-del"] = "in use"
    with pytest.raises(exception.GuestError, match="in use"):
        log.uninstall()
    qemu.fails.clear()
    log.uninstall()


# -- rounds -----------------------------------------------------------------------------


def test_segments_are_what_was_logged_between_cuts(qemu: FakeBlocks, log: DiskLog) -> None:
    log.install()
    first = write(qemu, log, 3, b"a")
    log.cut(1)
    second = write(qemu, log, 2, b"b") + write(qemu, log, 1, b"c")
    log.cut(2)
    log.cut(3)
    assert [log.segment_bytes(epoch) for epoch in (1, 2, 3, 4)] == [first, second, 0, 0]
    assert segment(log, 1)[SECTOR:] == b"a" * 3 * SECTOR
    assert segment(log, 2)[SECTOR : 3 * SECTOR] == b"b" * 2 * SECTOR
    assert segment(log, 3) == b""
    assert int.from_bytes(segment(log, 1)[:8], "little") == 7


def test_nothing_written_is_an_empty_segment(log: DiskLog) -> None:
    log.install()
    log.cut(1)
    assert segment(log, 1) == b""
    log.release(1)
    assert log.used_bytes == 0


def test_one_epoch_may_be_cut_again(qemu: FakeBlocks, log: DiskLog) -> None:
    """As in the first synchronisation, where all belongs to the first checkpoint."""
    log.install()
    first = write(qemu, log, 1)
    log.cut(0)
    log.release(0)
    second = write(qemu, log, 2)
    log.cut(0)
    assert log.segment_bytes(0) == second
    third = write(qemu, log, 3)
    log.cut(0)
    assert log.segment_bytes(0) == second + third
    log.release(0)
    assert log.summary()["written_bytes"] == first + second + third
    assert log.committed_epoch == 0


def test_parts_are_small_and_stay_good(qemu: FakeBlocks, log: DiskLog) -> None:
    log.install()
    size = write(qemu, log, 5000)
    log.cut(1)
    parts = list(log.segments(1))
    assert [len(part) for part in parts] == [CHUNK_BYTES, CHUNK_BYTES, size - 2 * CHUNK_BYTES]
    log.release(1)
    assert bytes(parts[0][SECTOR:1024]) == b"x" * SECTOR


def test_what_is_committed_takes_no_room(qemu: FakeBlocks, log: DiskLog) -> None:
    log.install()
    for epoch in range(1, 200):
        write(qemu, log, 5)  # no whole pages
        log.cut(epoch)
        if epoch > 2:
            log.release(epoch - 2)
    status = os.stat(log.path)
    assert status.st_size == SECTOR + 199 * 6 * SECTOR
    assert status.st_blocks * 512 <= 5 * 4096
    assert segment(log, 199)[SECTOR : 2 * SECTOR] == b"x" * SECTOR
    assert log.used_bytes == 2 * 6 * SECTOR


def test_a_release_covers_what_came_before(qemu: FakeBlocks, log: DiskLog) -> None:
    log.install()
    for epoch in (1, 2, 3):
        write(qemu, log, 1)
        log.cut(epoch)
    log.release(2)
    assert log.segment_bytes(1) == 0
    assert log.segment_bytes(3) == 2 * SECTOR
    log.release(2)
    log.release(9)
    assert log.used_bytes == 2 * SECTOR


def test_a_file_system_that_cannot_free_parts_is_told(
    qemu: FakeBlocks, log: DiskLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.install()
    write(qemu, log, 9)
    log.cut(1)
    monkeypatch.setattr(log_module, "PUNCH_HOLE_KEEP_SIZE", 0x80)
    with pytest.raises(exception.DiskLogError, match="freed"):
        log.release(1)


def test_a_log_that_is_shorter_than_it_was_is_told(qemu: FakeBlocks, log: DiskLog) -> None:
    log.install()
    write(qemu, log, 9)
    log.cut(1)
    os.truncate(log.path, 1024)
    with pytest.raises(exception.DiskLogError, match="ends at"):
        segment(log, 1)


# -- how it is --------------------------------------------------------------------------


def test_logs_of_a_guest_share_their_space(qemu: FakeBlocks, tmp_path: Path) -> None:
    space = LogSpace(10 * SECTOR)
    first, second = (
        DiskLog(disk, qemu, str(tmp_path), space) for disk in discover.disks(DISKS, qemu)[:2]
    )
    assert first.pressure == 0.0
    first.install()
    second.install()
    write(qemu, first, 3)
    assert first.pressure == second.pressure == pytest.approx(0.4)
    write(qemu, second, 3)
    assert first.pressure == second.pressure == pytest.approx(0.8)
    write(qemu, second, 8)
    assert first.pressure == 1.0
    assert space.used_bytes == 17 * SECTOR
    first.uninstall()
    second.uninstall()
    assert first.pressure == 0.0


def test_a_file_system_that_fills_is_pressure_too(
    qemu: FakeBlocks, log: DiskLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.install()
    used = write(qemu, log, 15)
    real = os.fstatvfs

    def little_left(descriptor: int) -> os.statvfs_result:
        numbers = list(real(descriptor))
        numbers[1], numbers[4] = 512, used // 512
        return os.statvfs_result(numbers)

    monkeypatch.setattr(log_module.os, "fstatvfs", little_left)
    assert log.pressure == pytest.approx(0.5)


def io_error(**data: object) -> dict[str, object]:
    facts = {"node-name": "pmt-log-vda", "operation": "write", "reason": "No space left on device"}
    return {"event": "BLOCK_IO_ERROR", "data": {**facts, **data}}


def test_a_write_that_fails_breaks_the_log_for_good(qemu: FakeBlocks, log: DiskLog) -> None:
    log.install()
    assert log.broken == ""
    qemu.events.append(io_error())
    assert "No space left" in log.broken
    assert "vda" in log.broken
    assert log.broken
    log.install()
    assert log.broken == ""


@pytest.mark.parametrize("other", [{"node-name": "pmt-log-sda"}, {"operation": "read"}])
def test_other_errors_do_not_break_it(
    qemu: FakeBlocks, log: DiskLog, other: dict[str, str]
) -> None:
    log.install()
    qemu.events.append(io_error(**other))
    assert log.broken == ""
    assert len(qemu.events) == 1


def test_the_summary_tells_of_the_log(qemu: FakeBlocks, log: DiskLog) -> None:
    assert log.summary()["log_bytes"] == 0
    log.install()
    size = write(qemu, log, 7)
    log.cut(1)
    more = write(qemu, log, 1)
    log.release(1)
    assert log.summary() == {
        "disk": "vda",
        "log_bytes": more,
        "log_peak_bytes": size + more,
        "written_bytes": size + more,
    }


# -- output that begins a round ------------------------------------------------------------


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.0005)


def test_the_first_write_after_each_commit_is_told_of(qemu: FakeBlocks, log: DiskLog) -> None:
    told: list[float] = []
    log.install()
    log.watch(lambda: told.append(log.waiting_since))
    for epoch in range(1, 10):
        assert log.waiting_since == 0.0
        before = time.perf_counter()
        write(qemu, log, 3)
        write(qemu, log, 1)
        eventually(lambda: len(told) == epoch)  # noqa: B023
        assert before <= told[-1] <= time.perf_counter()
        log.cut(epoch)
        assert log.waiting_since == 0.0
        log.release(epoch)  # writes into the file, too, which is no output
    time.sleep(0.05)
    assert len(told) == 9


def test_a_write_between_cut_and_commit_is_told_of_with_the_commit(
    qemu: FakeBlocks, log: DiskLog
) -> None:
    told: list[int] = []
    log.install()
    log.watch(lambda: told.append(1))
    write(qemu, log, 1)
    eventually(lambda: told)
    log.cut(1)
    write(qemu, log, 1)
    log.release(1)
    eventually(lambda: len(told) == 2)
    assert log.waiting_since > 0


def test_what_was_written_before_it_is_watched_is_told_of_at_once(
    qemu: FakeBlocks, log: DiskLog
) -> None:
    told: list[int] = []
    log.install()
    write(qemu, log, 1)
    log.watch(lambda: told.append(1))
    assert told == [1]


def test_a_kernel_that_does_not_tell_is_an_error_with_its_cure(
    qemu: FakeBlocks, log: DiskLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.install()
    monkeypatch.setattr("nova_pmt.guest.disk.growth._libc.inotify_init1", lambda _flags: -1)
    with pytest.raises(exception.DiskLogError) as caught:
        log.watch(lambda: None)
    assert "max_user_instances" in caught.value.cure


def test_a_log_that_cannot_be_watched_any_more_is_broken(
    qemu: FakeBlocks, log: DiskLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.install()
    log.watch(lambda: None)
    monkeypatch.setattr("nova_pmt.guest.disk.growth._libc.inotify_add_watch", lambda *_: -1)
    log._notice()  # by us: it is armed again, which fails
    assert "nobody tells" in log.broken
