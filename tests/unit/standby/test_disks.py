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

"""The standby's images: what is written to them is in them, and only ours are ever touched."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_pmt import exception
from nova_pmt.guest import checks, nbd
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.disk.writelog import Entry, Kind, LogParser
from nova_pmt.guest.monitor import DirectMonitor
from nova_pmt.standby import imagerecord
from nova_pmt.standby.batches import batches
from nova_pmt.standby.disks import StandbyDisks
from tests.unit.guest.disk.test_writelog import cut, logging
from tests.unit.guest.test_nbd import image, server

needs_qemu = pytest.mark.skipif(
    not all(map(shutil.which, ("qemu-img", "qemu-io", "qemu-storage-daemon", "setpriv"))),
    reason="needs qemu-utils, qemu-storage-daemon and util-linux",
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, or changes users: run as root")

UUID = "6e0f7a52-31a8-4bb7-9a5b-0d8a3f1f4c11"
MIB = 1 << 20
ME = (os.geteuid(), os.getegid())


@dataclass
class Host:
    """A host's directories, and the standby images there."""

    root: Path
    owner: tuple[int, int] = ME

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def path(self, name: str) -> str:
        return str(self.root / "instances" / UUID / name)

    def specs(self, *kinds: str, size: int = 16 * MIB) -> list[DiskSpec]:
        return [
            DiskSpec(f"vd{'abcd'[n]}", kind, self.path(f"disk{n}"), size)
            for n, kind in enumerate(kinds)
        ]

    def disks(self, specs: list[DiskSpec], timeout_s: float = 20.0) -> StandbyDisks:
        return StandbyDisks(
            specs, UUID, str(self.state), self.owner, str(self.run), timeout_s=timeout_s
        )

    def record(self) -> imagerecord.ImageRecord | None:
        return imagerecord.load(str(self.state), UUID)

    def left(self) -> list[str]:
        """Every file that is there, and every directory that was made for a server."""
        return sorted(
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if not path.is_dir() or path.name == UUID
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def write(at: int, data: bytes) -> Entry:
    return Entry(Kind.WRITE, at, len(data), memoryview(data), zero=not any(data))


def contents(spec: DiskSpec) -> bytes:
    """What a guest would read."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        raw = Path(directory) / "raw"
        command = ["qemu-img", "convert", "-f", spec.format, "-O", "raw", spec.path, raw]
        subprocess.run(command, check=True)
        return raw.read_bytes()


def sound(spec: DiskSpec) -> bool:
    """Whether ``qemu-img check`` finds nothing, not even leaks."""
    if spec.format == "raw":
        return True
    done = subprocess.run(["qemu-img", "check", "-f", spec.format, spec.path], capture_output=True)
    return done.returncode == 0


def processes(directory: Path) -> list[str]:
    """Those that name the directory in their command line."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(directory) in command:
                found.append(command)
    return found


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    assert processes(tmp_path) == []


# -- batches ----------------------------------------------------------------------------


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kind = draw(st.sampled_from([Kind.WRITE, Kind.WRITE, Kind.DISCARD, Kind.FLUSH]))
    if kind is Kind.FLUSH:
        return Entry(kind, 0, 0)
    # Close to each other, some at edges of granules, some wider than one, a few huge.
    length = 512 * draw(st.integers(1, 4) | st.integers(100, 300) | st.integers(8000, 9000))
    offset = 512 * draw(st.integers(0, 6) | st.integers(120, 135))
    if kind is Kind.DISCARD:
        return Entry(kind, offset, length)
    value = draw(st.integers(0, 255))
    return Entry(kind, offset, length, memoryview(bytes([value]) * length), zero=not value)


@given(st.lists(entries(), max_size=25), st.randoms(), st.booleans())
def test_batches_in_any_order_do_what_the_log_did_in_order(
    log: list[Entry], chance: random.Random, discards: bool
) -> None:
    """Discards may make zeros, or nothing."""
    size = (135 + 9000) * 512
    expected, found = bytearray(size), bytearray(size)
    for entry in log:
        end = entry.offset + entry.length
        if entry.data is not None:
            expected[entry.offset : end] = entry.data
        elif discards:
            expected[entry.offset : end] = bytes(entry.length)
    for batch in batches(log):
        chance.shuffle(batch)
        covered = sorted((change.offset, change.offset + change.length) for change in batch)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(covered))
        for change in batch:
            end = change.offset + change.length
            if change.data is not None:
                found[change.offset : end] = change.data
            elif discards or change.command != nbd.trim(0, 1).command:
                found[change.offset : end] = bytes(change.length)
    assert found == expected


def test_a_block_that_is_written_over_and_over_is_one_change() -> None:
    log = [write(4096, bytes([n]) * 4096) for n in range(1, 101)]
    ((change,),) = batches(log)
    assert change.data == log[-1].data


def test_many_writes_are_many_at_a_time() -> None:
    log = [write(n * 512, b"x" * 512) for n in range(10_000)]
    assert [len(batch) for batch in batches(log)] == [4096, 4096, 1808]


# -- records ----------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(host: Host) -> None:
    specs = host.specs("raw", "qcow2")
    record = imagerecord.ImageRecord(
        UUID,
        "standby",
        (imagerecord.Image(specs[0], 5, (5, 6, 7)), imagerecord.Image(specs[1])),
        ("/a", "/a/b"),
        (3, 4),
    )
    record.save(str(host.state))
    assert host.record() == record
    assert os.stat(host.state / f"{UUID}.json").st_mode & 0o777 == 0o600
    imagerecord.forget(str(host.state), UUID)
    imagerecord.forget(str(host.state), UUID)
    assert host.record() is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1}', "[" * 100_000, "null", '{"version": 2, "role": "standby"}'],
)
def test_a_record_that_is_none_is_set_aside(host: Host, text: str) -> None:
    host.state.mkdir()
    (host.state / f"{UUID}.json").write_text(text)
    assert host.record() is None
    assert os.listdir(host.state) == [f"{UUID}.json.broken"]


# -- before anything is changed ------------------------------------------------------------


def codes(refusals: list[exception.Refusal]) -> list[str]:
    return [refusal.code for refusal in refusals]


def test_a_strangers_file_is_never_touched(host: Host) -> None:
    disks = host.disks(host.specs("raw", "qcow2"))
    assert disks.check() == []
    Path(host.path("disk1")).parent.mkdir(parents=True)
    for content in b"precious", b"":
        Path(host.path("disk1")).write_bytes(content)
        assert codes(disks.check()) == ["IMAGE_EXISTS"]
        with pytest.raises(exception.ImageExists):
            disks.create()
        with pytest.raises(exception.DiskImageError):
            disks.open()
        disks.remove()
        assert Path(host.path("disk1")).read_bytes() == content
    assert host.left() == [f"instances/{UUID}", f"instances/{UUID}/disk1"]


@needs_qemu
def test_an_image_that_was_replaced_is_a_strangers(host: Host) -> None:
    specs = host.specs("raw")
    host.disks(specs).create()
    assert host.disks(specs).check() == []
    other = Path(host.path("other"))
    other.write_bytes(b"precious")
    other.rename(specs[0].path)
    assert codes(host.disks(specs).check()) == ["IMAGE_EXISTS"]
    host.disks(specs).remove()
    assert Path(specs[0].path).read_bytes() == b"precious"


@needs_qemu
def test_an_image_that_a_qemu_writes_to_is_left_alone(host: Host) -> None:
    specs = host.specs("qcow2")
    with host.disks(specs) as disks:
        disks.create()
        disks.open()
        other = host.disks(specs)
        assert codes(other.check()) == ["IMAGE_EXISTS"]
        assert "in use" in other.check()[0].message
        for change in other.recreate, other.remove:
            with pytest.raises(exception.ImageExists):
                change()
        disks.apply(0, [write(0, b"x" * 512)])


def test_shared_file_systems_are_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    magic = checks.file_system(str(host.root))
    monkeypatch.setitem(checks.SHARED_FILE_SYSTEMS, magic, "NFS")
    (refusal,) = host.disks(host.specs("raw")).check()
    assert isinstance(refusal, exception.SharedStorage)
    assert "is on NFS" in refusal.message


def test_images_must_have_room(host: Host) -> None:
    status = os.statvfs(host.root)
    free = status.f_bavail * status.f_frsize
    half = free // 2 + 64 * MIB
    assert host.disks(host.specs("raw", size=half)).check() == []
    both = host.disks(host.specs("raw", "raw", size=half))
    assert codes(both.check()) == ["TOO_LITTLE_DISK"]  # they are on the same file system
    assert both.check([MIB, MIB]) == []
    assert codes(both.check([MIB, free])) == ["TOO_LITTLE_DISK"]
    assert host.left() == []


# -- what is written ------------------------------------------------------------------------


@needs_qemu
def test_images_hold_the_first_copy_and_the_log(host: Host) -> None:
    specs = [*host.specs("qcow2", "raw"), replace(host.specs(*["raw"] * 3)[2], readonly=True)]
    chance = random.Random(4)
    expected = [bytearray(spec.size) for spec in specs]
    with host.disks(specs) as disks:
        assert disks.check() == []
        disks.create()
        assert all(os.stat(spec.path).st_mode & 0o777 == 0o600 for spec in specs)
        disks.open()
        for index, spec in enumerate(specs):
            for at in range(0, spec.size, MIB):
                data = bytes(MIB) if chance.random() < 0.5 else chance.randbytes(MIB)
                disks.copy(index, at, memoryview(data))
                expected[index][at : at + MIB] = data
        for _ in range(5):
            for index in 0, 1:
                log = []
                for _ in range(300):
                    at = 512 * chance.randrange(1000)
                    data = chance.choice((bytes, chance.randbytes))(512 * chance.randint(1, 40))
                    log += [write(at, data), Entry(Kind.FLUSH, 0, 0)]
                    expected[index][at : at + len(data)] = data
                disks.apply(index, log)
            disks.flush()
        disks.release()
    for spec, data in zip(specs, expected, strict=True):
        assert contents(spec) == data
        assert sound(spec)


@needs_qemu
@pytest.mark.parametrize(
    ("kind", "cluster_bytes"), [("raw", 0), ("qcow2", 65536), ("qcow2", 2048), ("qcow2", MIB)]
)
def test_a_guests_writes_make_the_same_image(host: Host, kind: str, cluster_bytes: int) -> None:
    """A real log of writes, zeros, discards and flushes, over the image as it was before."""
    chance = random.Random(7)
    spec = replace(host.specs(kind)[0], cluster_bytes=cluster_bytes)
    source = host.root / "source"
    source.mkdir()
    options = ["-o", f"cluster_size={cluster_bytes}"] if cluster_bytes else []
    disk, log = image(source / "disk", kind, spec.size, *options), source / "log"
    first = chance.randbytes(spec.size // 2)
    log.touch()
    with host.disks([spec]) as disks:
        disks.create()
        disks.open()
        with server(source, logging(disk, kind, log)) as path, nbd.Export(path, "vda") as export:
            export.write(0, first)
            export.flush()
            begin = log.stat().st_size
            for at in range(0, len(first), MIB):
                disks.copy(0, at, memoryview(first)[at : at + MIB])
            for _ in range(600):
                at, length = 512 * chance.randrange(20_000), 512 * chance.randint(1, 300)
                match chance.choice("wwwwwwzZdf"):
                    case "w":
                        export.write(at, chance.randbytes(length))
                    case "z" | "Z" as how:
                        export.zero(at, length, punch=how == "z")
                    case "d":
                        export.trim(at, length)
                    case _:
                        export.flush()
        parser = LogParser(spec.size)
        for piece in cut(log.read_bytes()[begin:], [99_999, 1 << 20]):
            disks.apply(0, parser.feed(piece))
        parser.finish()
        disks.close(1, 1)
    compare = ["qemu-img", "compare", "-f", kind, "-F", kind, disk, spec.path]
    done = subprocess.run(compare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert sound(spec)


@needs_root
@needs_qemu
def test_the_daemon_is_qemus_user(host: Host) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        there = Host(Path(directory), owner=(65534, 65534))
        mask = os.umask(0o077)
        try:
            specs = there.specs("raw", "qcow2")
            with there.disks(specs) as disks:
                disks.create()
                disks.open()
                assert disks._daemon is not None
                pid = disks._daemon.pid
                assert (os.stat(f"/proc/{pid}").st_uid, os.getsid(pid)) == (65534, pid)
                status = Path(f"/proc/{pid}/status").read_text()
                assert "CapEff:\t0000000000000000" in status
                assert "Groups:\t \n" in status or "Groups:\t\n" in status
                assert there.left() == [  # and no socket that others could connect to
                    f"instances/{UUID}",
                    f"instances/{UUID}/disk0",
                    f"instances/{UUID}/disk1",
                    f"state/{UUID}.json",
                ]
                disks.apply(0, [write(0, b"x" * 512)])
                disks.release()
            assert [os.stat(spec.path).st_uid for spec in specs] == [65534, 65534]
        finally:
            os.umask(mask)


# -- records and what becomes of images ---------------------------------------------------


@needs_qemu
def test_images_that_were_put_away_are_gone_on_with(host: Host) -> None:
    specs = host.specs("qcow2", "raw")
    with host.disks(specs) as disks:
        disks.create()
        assert disks.kept is None
        with pytest.raises(exception.DiskImageError):
            disks.reuse()
        disks.open()
        disks.apply(0, [write(4096, b"a" * 4096)])
        disks.apply(1, [write(4096, b"b" * 4096)])
        assert disks.kept is None
        disks.close(7, 42)
        assert disks.kept == (7, 42)
    with host.disks(specs) as disks:
        assert disks.kept == (7, 42)
        assert disks.check([0, 0]) == []
        disks.create()  # for the domain to start with: as they are
        assert disks.kept == (7, 42)
        disks.reuse()
        disks.open()
        assert disks.kept is None
        assert host.disks(specs).kept is None
        disks.apply(0, [write(0, b"c" * 4096)])
        disks.close(8, 1)
    assert host.disks(specs).kept == (8, 1)
    assert contents(specs[0])[:8192] == b"c" * 4096 + b"a" * 4096
    assert contents(specs[1])[:8192] == bytes(4096) + b"b" * 4096


@needs_qemu
@pytest.mark.parametrize("what", ["written", "replaced", "deleted", "other size", "fewer", "more"])
def test_images_that_changed_meanwhile_are_not_gone_on_with(host: Host, what: str) -> None:
    specs = host.specs("raw", "raw")
    with host.disks(specs) as disks:
        disks.create()
        disks.open()
        disks.apply(0, [write(0, b"a" * 512)])
        disks.close(1, 1)
    wanted = specs
    if what == "written":
        subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 1M 4k", specs[1].path],
            check=True,
            capture_output=True,
        )
    elif what == "replaced":
        shutil.copy2(specs[1].path, specs[1].path + ".new")
        os.replace(specs[1].path + ".new", specs[1].path)
    elif what == "deleted":
        os.unlink(specs[1].path)
    elif what == "other size":
        wanted = [specs[0], replace(specs[1], size=32 * MIB)]
    elif what == "fewer":
        wanted = specs[:1]
    else:
        wanted = host.specs("raw", "raw", "raw")
    disks = host.disks(wanted)
    assert disks.kept is None
    if what == "replaced":
        with pytest.raises(exception.ImageExists):
            disks.create()
        return
    disks.create()
    assert contents(wanted[0]) == bytes(wanted[0].size)
    assert os.path.exists(specs[1].path) == (what != "fewer")  # one that is wanted no more goes
    disks.remove()
    assert host.left() == []


@needs_qemu
def test_an_image_is_made_empty_without_being_another_file(host: Host) -> None:
    """The standby's QEMU has it open by then."""
    specs = host.specs("qcow2", "raw")
    with host.disks(specs) as disks:
        disks.create()
        before = [os.stat(spec.path).st_ino for spec in specs]
        disks.open()
        disks.apply(0, [write(0, b"a" * 4096)])
        disks.apply(1, [write(0, b"a" * 4096)])
        disks.close(1, 1)
        disks.recreate()
        assert disks.kept is None
        assert [os.stat(spec.path).st_ino for spec in specs] == before
        assert all(not any(contents(spec)) for spec in specs)


@needs_qemu
def test_after_a_failover_the_images_stay_and_may_be_overwritten_once_it_has_lost(
    host: Host,
) -> None:
    specs = host.specs("raw")
    with host.disks(specs) as disks:
        disks.create()
        disks.open()
        disks.apply(0, [write(0, b"a" * 512)])
        disks.release()
        disks.became_primary()
        assert disks.kept is None
        with pytest.raises(exception.ImageExists):
            disks.remove()
        disks.sync()
    record = host.record()
    assert record is not None
    assert record.role == "primary"
    with host.disks(specs) as disks:  # the other host is the primary now
        assert disks.check() == []
        disks.create()
        assert not any(contents(specs[0]))
        disks.remove()
    assert host.left() == []  # with the directories that were made at first


@needs_qemu
def test_a_primarys_own_images_are_recorded_and_forgotten(host: Host) -> None:
    specs = host.specs("raw")
    Path(specs[0].path).parent.mkdir(parents=True)
    Path(specs[0].path).write_bytes(b"precious")
    imagerecord.note_primary(str(host.state), UUID, specs)
    disks = host.disks(specs)
    assert disks.check() == []
    assert disks.kept is None
    with pytest.raises(exception.ImageExists):
        disks.remove()
    imagerecord.forget(str(host.state), UUID)
    assert codes(host.disks(specs).check()) == ["IMAGE_EXISTS"]
    imagerecord.note_primary(str(host.state), UUID, specs)
    host.disks(specs).create()
    disks = host.disks(specs)
    disks.remove()
    assert host.left() == [f"instances/{UUID}"]  # the directory was not ours


@needs_qemu
def test_a_failover_that_was_lost_leaves_consistent_images(host: Host) -> None:
    specs = host.specs("qcow2")
    with host.disks(specs) as disks:
        disks.create()
        disks.open()
        disks.apply(0, [write(0, b"a" * 512)])
        disks.release()
        disks.release()
        disks.close(3, 9)
    assert host.disks(specs).kept == (3, 9)


# -- faults ---------------------------------------------------------------------------------


@needs_qemu
def test_a_daemon_that_dies_is_an_error_at_once(host: Host) -> None:
    specs = host.specs("raw", "qcow2")
    data = os.urandom(4096)
    with host.disks(specs) as disks:
        disks.create()
        disks.open()
        assert disks._daemon is not None
        pid = disks._daemon.pid
        killer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
        killer.start()
        endless = [write(n * 4096, data[:size]) for size in (4096, 512) for n in range(4096)] * 200
        with pytest.raises(exception.DiskImageError, match="disk vdb") as error:
            disks.apply(1, endless)
        killer.join()
        assert error.value.details["disk"] == "vdb"
        start = time.monotonic()
        for use in (
            lambda: disks.copy(0, 0, memoryview(data)),
            disks.flush,
            disks.release,
            lambda: disks.close(1, 1),
        ):
            with pytest.raises(exception.DiskImageError):
                use()
        assert time.monotonic() - start < 10
    assert host.disks(specs).kept is None
    with host.disks(specs) as disks:
        disks.create()
        disks.open()
        disks.close(1, 1)
    assert all(sound(spec) for spec in specs)


@needs_root
@needs_qemu
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_full_file_system_is_told_with_its_cure(host: Host, kind: str) -> None:
    small = host.root / "instances"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", small], check=True)
    try:
        specs = host.specs(kind)
        with host.disks(specs) as disks:
            assert codes(disks.check()) == ["TOO_LITTLE_DISK"]
            assert codes(disks.check([4 * MIB])) == []
            disks.create()
            disks.open()
            with pytest.raises(exception.DiskImageError) as error:
                disks.apply(0, [write(n * MIB, os.urandom(MIB)) for n in range(16)])
            assert error.value.details["errno"] == errno.ENOSPC
            assert os.strerror(errno.ENOSPC) in error.value.message
            assert f"Free space in {os.path.dirname(specs[0].path)}" in error.value.cure
            with pytest.raises(exception.DiskImageError):
                disks.close(1, 1)
        assert host.disks(specs).kept is None
        host.disks(specs).remove()
    finally:
        subprocess.run(["umount", small], check=True)
    assert host.left() == []


@needs_qemu
def test_images_that_cannot_be_opened_are_told_with_qemus_words(host: Host) -> None:
    specs = host.specs("qcow2")
    with host.disks(specs) as disks:
        disks.create()
        Path(specs[0].path).write_bytes(b"no qcow2 " * 1000)
        with pytest.raises(exception.DiskImageError, match="not in qcow2 format"):
            disks.open()
    with host.disks([replace(specs[0], format="raw")]) as disks:
        disks._record = host.record()
        with pytest.raises(exception.DiskImageError, match="has 9216 bytes, not 16777216"):
            disks.open()


@needs_qemu
def test_a_process_that_is_killed_leaves_no_daemon_and_says_nothing_wrong(host: Host) -> None:
    program = f"""
import signal, sys
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.standby.disks import StandbyDisks
disks = StandbyDisks([DiskSpec("vda", "qcow2", {host.path("disk")!r}, 1 << 24)], {UUID!r},
                     {str(host.state)!r}, {ME!r}, {str(host.run)!r})
disks.create()
disks.open()
disks.copy(0, 0, memoryview(b"x" * 4096))
print(disks._daemon.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        daemon = os.pidfd_open(int(worker.stdout.readline()))
        worker.kill()
    try:
        assert select.select([daemon], [], [], 10)[0]  # killed with its parent
    finally:
        os.close(daemon)
    stale = host.run / UUID
    stale.mkdir(parents=True)
    (stale / "nbd.sock").touch()  # killed a little earlier it would leave this
    specs = [DiskSpec("vda", "qcow2", host.path("disk"), 1 << 24)]
    with host.disks(specs) as disks:
        assert disks.kept is None
        assert disks.check() == []
        disks.create()
        disks.open()
        disks.close(1, 1)
    assert not any(contents(specs[0]))
    host.disks(specs).remove()
    assert host.left() == []


@needs_qemu
def test_a_process_that_died_while_it_made_images_leaves_them_ours(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = host.specs("raw", "qcow2")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    for step in "_make_files", "_own", "_format":
        with monkeypatch.context() as patch:
            patch.setattr(StandbyDisks, step, dies)
            with pytest.raises(KeyboardInterrupt):
                host.disks(specs).create()
        assert host.disks(specs).check() == []
        assert host.disks(specs).kept is None
    host.disks(specs).remove()
    assert host.left() == []


# -- a QEMU that waits ------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_qemu(directory: Path, specs: list[DiskSpec], *extra: str) -> Iterator[DirectMonitor]:
    """A QEMU without a guest program; with ``-incoming`` its images are open but inactive."""
    path = str(directory / "qmp")
    command = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "16", "-nodefaults"]
    command += ["-display", "none", "-S", "-qmp", f"unix:{path},server=on,wait=off", *extra]
    for spec in specs:
        node = {"driver": spec.format, "node-name": spec.name}
        node["file"] = {"driver": "file", "filename": spec.path}
        command += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive={spec.name}"]
    with subprocess.Popen(command) as qemu:
        try:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(exception.GuestError):
                    monitor = DirectMonitor(path)
                    break
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with monitor:
                yield monitor
        finally:
            qemu.kill()


def read_in_qemu(monitor: DirectMonitor, spec: DiskSpec, path: str) -> bytearray:
    """What a disk has for the guest of that QEMU."""
    monitor.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    monitor.execute("block-export-add", type="nbd", id="test", name="x", **{"node-name": spec.name})
    with nbd.Export(path, "x") as export:
        found = bytearray(export.size)
        export.read_into(0, memoryview(found))
    monitor.execute("nbd-server-stop")
    return found


@needs_qemu
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86")
@pytest.mark.parametrize("again", [False, True])
def test_the_waiting_qemu_finds_what_was_written(host: Host, tmp_path: Path, again: bool) -> None:
    """It has had the images open since before they were filled, or made empty once more."""
    specs = host.specs("qcow2", "raw")
    sources = [replace(spec, path=str(tmp_path / spec.name)) for spec in specs]
    for spec in sources:
        image(Path(spec.path), spec.format, spec.size)
    patterns = [(0, MIB, 0xA5), (9 * MIB, 4096, 0x11)]
    channel = f"unix:{tmp_path}/migration"
    with contextlib.ExitStack() as stack:
        disks = stack.enter_context(host.disks(specs))
        disks.create()
        if again:
            disks.open()
            disks.apply(0, [write(0, b"old" * 512 * 1000)])
            disks.close(1, 1)
            disks.create()
        for name in "a", "b":
            (tmp_path / name).mkdir()
        waiting = stack.enter_context(waiting_qemu(tmp_path / "a", specs, "-incoming", "defer"))
        assert waiting.execute("query-status")["status"] == "inmigrate"
        if again:
            assert disks.kept == (1, 1)
            disks.recreate()
        disks.open()
        for index in range(2):
            for at, length, value in patterns:
                disks.apply(index, [write(at, bytes([value]) * length)])
        start = time.monotonic()
        disks.release()
        assert time.monotonic() - start < 10
        source = stack.enter_context(waiting_qemu(tmp_path / "b", sources))
        waiting.execute("migrate-incoming", uri=channel)
        source.execute("migrate", uri=channel)
        deadline = time.monotonic() + 30
        while waiting.execute("query-status")["status"] == "inmigrate":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        expected = bytearray(16 * MIB)
        for at, length, value in patterns:
            expected[at : at + length] = bytes([value]) * length
        for spec in specs:
            assert read_in_qemu(waiting, spec, str(tmp_path / "nbd")) == expected
        assert codes(host.disks(specs).check()) == ["IMAGE_EXISTS"] * 2  # it is theirs now
    assert all(sound(spec) for spec in specs)


USES: list[Callable[[StandbyDisks], object]] = [
    lambda disks: disks.copy(0, 0, memoryview(b"x" * 512)),
    lambda disks: disks.apply(0, [write(0, b"x" * 512)]),
    lambda disks: disks.flush(),
]


@pytest.mark.parametrize("use", USES)
def test_images_must_be_open_to_be_written(
    host: Host, use: Callable[[StandbyDisks], object]
) -> None:
    with pytest.raises(exception.DiskImageError, match="is not open"):
        use(host.disks(host.specs("raw")))
