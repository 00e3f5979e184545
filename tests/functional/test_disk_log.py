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

"""Logs of a running guest's disks: complete at each pause, and without a trace afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest.disk import bitmap, discover
from nova_pmt.guest.disk.discover import GuestDisk
from nova_pmt.guest.disk.log import DiskLog, LogSpace, recover_all
from nova_pmt.guest.disk.source import DiskSource
from nova_pmt.guest.disk.writelog import Kind, LogParser
from nova_pmt.guest.monitor import DirectMonitor
from nova_pmt.lab import Disk, GuestSpec, Lab, LabGuest

T = TypeVar("T")
MIB = 1 << 20
CLONE_FS, CLONE_NEWNS = 0x200, 0x20000
#: Where the guest's load goes, behind its records.
LOAD_AT = 48 * MIB
IMAGES = "/var/lib/libvirt/images/disklog"
DISKS = (
    Disk(f"{IMAGES}/a.qcow2", 80),
    Disk(f"{IMAGES}/b.raw", 80, "raw"),
    Disk(f"{IMAGES}/c.qcow2", 80, bus="scsi"),
)
NAMES = ("vda", "vdb", "sda")


class Primary:
    """The guest's disks as a worker on its host has them."""

    def __init__(self, guest: LabGuest) -> None:
        self.guest = guest
        self._pool = ThreadPoolExecutor(
            1, initializer=_enter, initargs=(guest.host.init_pid,), thread_name_prefix="worker"
        )
        self.monitor = self.call(lambda: DirectMonitor(guest.spec.monitor_path))
        self.directory = self.call(
            lambda: guest_domain.guest_directory(
                "/run/nova_pmt", guest.uuid, int(_read(f"/run/libvirt/qemu/{guest.name}.pid"))
            )
        )

    def call(self, function: Callable[[], T]) -> T:
        """Call it where the host's files are."""
        return self._pool.submit(function).result()

    def close(self) -> None:
        self.monitor.close()
        self._pool.shutdown()

    @property
    def xml(self) -> str:
        with self.guest.host.libvirt() as connection:
            return str(connection.lookupByName(self.guest.name).XMLDesc())

    def disks(self) -> tuple[GuestDisk, ...]:
        return discover.disks(self.xml, self.monitor)

    def logs(self, directory: str = "", limit: int = 1 << 30) -> list[DiskLog]:
        space = LogSpace(limit)
        return [
            DiskLog(disk, self.monitor, directory or self.directory, space) for disk in self.disks()
        ]

    def content(self, disk: GuestDisk) -> bytes:
        """What a disk holds; of a stopped guest."""
        spec, copy = disk.spec, "/tmp/content.raw"
        self.guest.host.run(
            ["qemu-img", "convert", "-U", "-f", spec.format, "-O", "raw", spec.path, copy]
        )
        data = self.guest.host.path(copy).read_bytes()
        self.guest.host.path(copy).unlink()
        return data

    def block_layer(self) -> list[str]:
        """Nodes and devices, without what changes with each write."""
        found = []
        for entry in [
            *self.monitor.execute("query-named-block-nodes", flat=True),
            *self.monitor.execute("query-block"),
        ]:
            (entry.get("inserted") or entry).pop("image", None)
            # After an error it stays: QEMU's 'cont' resets it only where a -drive has a name.
            entry.pop("io-status", None)
            found.append(json.dumps(entry, sort_keys=True))
        return sorted(found)

    def status(self) -> str:
        return str(self.monitor.execute("query-status")["status"])


def _enter(init_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/proc/{init_pid}/ns/mnt", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_FS) or libc.setns(fd, CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "the host's mounts cannot be entered")
    finally:
        os.close(fd)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[LabGuest]:
    spec = GuestSpec("disklog", ip="10.77.2.99", disks=DISKS)
    booted = lab.computes[0].boot(spec)
    yield booted.wait_ready()
    booted.destroy()


@pytest.fixture
def primary(guest: LabGuest) -> Iterator[Primary]:
    made = Primary(guest)
    before = made.block_layer()
    yield made
    try:
        made.call(lambda: recover_all(made.monitor, made.directory))
        if made.status() != "running":
            made.monitor.execute("cont")
        assert made.block_layer() == before, "QEMU is not as it was"
        assert made.call(lambda: os.listdir(made.directory)) == []
    finally:
        made.close()


class Load:
    """Writes on all disks until it is ended; fails when one of them failed."""

    def __init__(self, guest: LabGuest) -> None:
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(len(NAMES))
        self._done: list[Future[None]] = [
            self._pool.submit(self._run, guest, name) for name in NAMES
        ]

    def _run(self, guest: LabGuest, name: str) -> None:
        number = 0
        while not self._ending.is_set():
            number += 1
            for command in (
                f"disk write rand 16 50 {name}",
                f"disk fua 5 {name}",
                f"disk zero {64 * (number % 50)} 200 {name}",
                f"disk discard {64 * (number % 60)} 256 {name}",
                f"disk write seq 256 4 {name}",
            ):
                guest.control(command)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ending.set()
        self._pool.shutdown()
        for done in self._done:
            done.result()


def replay(content: bytearray, log: bytes, disk: GuestDisk) -> None:
    """What QEMU did to the image, done again."""
    parser = LogParser(disk.spec.size)
    for entry in parser.feed(log):
        end = entry.offset + entry.length
        if entry.kind is Kind.WRITE:
            assert entry.data is not None
            content[entry.offset : end] = entry.data
        elif entry.kind is Kind.DISCARD:
            cluster = disk.spec.cluster_bytes or 512
            start, end = -(-entry.offset // cluster) * cluster, end // cluster * cluster
            content[start:end] = bytes(max(0, end - start))
    parser.finish()


def test_a_log_has_exactly_the_writes_of_its_epoch(guest: LabGuest, primary: Primary) -> None:
    monitor = primary.monitor
    assert discover.problems(monitor) == []
    xml = primary.xml
    with Load(guest):
        monitor.execute("stop")
        logs = primary.logs()
        images = {log: bytearray(primary.content(log.disk)) for log in logs}
        for log in logs:
            primary.call(log.install)
        monitor.execute("cont")
        for epoch in range(1, 13):
            time.sleep(0.1)
            monitor.execute("stop")
            for log in logs:
                log.cut(epoch)
            if epoch != 12:
                monitor.execute("cont")
            for log in logs:
                segment = b"".join(log.segments(epoch))
                assert len(segment) == log.segment_bytes(epoch)
                replay(images[log], segment, log.disk)
                log.release(epoch)
                assert log.committed_epoch == epoch
        for log in logs:
            assert log.summary()["written_bytes"] > 0, "the guest wrote nothing"
            assert images[log] == primary.content(log.disk), log.disk.spec.name
            assert primary.call(lambda log=log: os.stat(log.path).st_blocks) <= 2 * 4096 // 512
        # libvirt does not mind, and does not know.
        for name in NAMES:
            guest.host.run(["virsh", "domblkinfo", guest.name, name])
        assert primary.xml == xml
        monitor.execute("cont")
        time.sleep(0.2)
        for log in logs:
            primary.call(log.uninstall)
        time.sleep(0.2)
        assert primary.status() == "running"


def test_a_new_worker_goes_on_from_a_dead_ones_log(guest: LabGuest, primary: Primary) -> None:
    monitor = primary.monitor
    with Load(guest):
        for log in primary.logs():
            primary.call(lambda log=log: log.install(7))
            monitor.execute("stop")
            log.cut(1)
            log.cut(2)
            log.release(1)
            monitor.execute("cont")
            log.close()
        disk = primary.disks()[0]
        assert disk.node.startswith("libvirt-")
        time.sleep(0.2)
        left = primary.call(lambda: DiskLog.left(disk, monitor, primary.directory))
        assert left is not None
        assert (left.generation, left.committed_epoch) == (7, 1)
        primary.call(left.unplug)
        # The guest runs, and writes, but not into the log any more.
        parser = LogParser(disk.spec.size)
        entries = [entry for part in left.unreleased() for entry in parser.feed(part)]
        parser.finish()
        assert entries
        left.close()
        logs = primary.logs()
        for log in logs:
            primary.call(log.install)
        time.sleep(0.1)
        monitor.execute("stop")
        for log in logs:
            log.cut(1)
            replay(bytearray(log.disk.spec.size), b"".join(log.segments(1)), log.disk)
            log.close()
        monitor.execute("cont")
        assert primary.call(lambda: recover_all(monitor, primary.directory))
        assert not primary.call(lambda: recover_all(monitor, primary.directory))


def test_a_full_log_costs_the_guest_nothing(guest: LabGuest, primary: Primary) -> None:
    """It stops before the request that failed is answered, and goes on without the log."""
    monitor, host = primary.monitor, guest.host
    directory = "/run/nova_pmt/small"
    host.run(["mkdir", "-p", directory])
    host.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700,uid=libvirt-qemu", "x", directory])
    pool = ThreadPoolExecutor(1)
    try:
        _, log, _ = primary.logs(directory)
        guest.control(f"disk discard 0 {32 * 1024} vdb")
        primary.call(log.install)
        answer = pool.submit(guest.control, "disk write seq 64 400 vdb")
        deadline = time.monotonic() + 20
        while not log.broken:
            assert time.monotonic() < deadline, log.pressure
            time.sleep(0.01)
        assert "No space left" in log.broken
        assert log.pressure > 0.9
        while primary.status() != "io-error":
            assert time.monotonic() < deadline, primary.status()
            time.sleep(0.01)
        primary.call(log.uninstall)
        assert not answer.done()
        monitor.execute("cont")
        assert answer.result(20).startswith("ok 25600 ")
        monitor.execute("stop")
        data = primary.content(log.disk)[LOAD_AT : LOAD_AT + 400 * 64 * 1024]
        stamps = [data[at : at + 8] for at in range(0, len(data), 4096)]
        assert bytes(8) not in stamps
        assert len(set(stamps)) == 400
        monitor.execute("cont")
    finally:
        pool.shutdown()
        host.run(["umount", "-l", directory])


def test_disks_are_read_while_the_guest_writes(guest: LabGuest, primary: Primary) -> None:
    """All first, and what changed since after a break; together with the log it is the disk."""
    monitor = primary.monitor
    copies: dict[str, bytearray] = {}

    def copy(ranges: Any) -> int:
        logs = primary.logs()
        for log in logs:
            primary.call(log.install)
        found = 0
        source = DiskSource(primary.disks(), monitor, primary.directory, ranges)
        primary.call(source.__enter__)
        try:
            for index, offset, data in source.blocks():
                copies[NAMES[index]][offset : offset + len(data)] = data
                found += len(data)
        finally:
            primary.call(lambda: source.__exit__(None, None, None))
        time.sleep(0.1)
        monitor.execute("stop")
        for log in logs:
            log.cut(1)
            replay(copies[log.disk.spec.name], b"".join(log.segments(1)), log.disk)
            log.release(1)
            assert copies[log.disk.spec.name] == primary.content(log.disk), log.disk.spec.name
        monitor.execute("cont")
        # The break: from here on the bitmap knows, and what was not committed is in the log.
        time.sleep(0.1)
        uncommitted.clear()
        for log in logs:
            bitmap.keep(log.disk, monitor)
            primary.call(log.unplug)
            parser = LogParser(log.disk.spec.size)
            entries = [entry for part in log.unreleased() for entry in parser.feed(part)]
            uncommitted[log.disk.spec.name] = bitmap.coalesce(
                ((entry.offset, entry.length) for entry in entries), 1000
            )
            primary.call(log.uninstall)
        return found

    uncommitted: dict[str, list[tuple[int, int]]] = {}
    with contextlib.ExitStack() as stack:
        for disk in primary.disks():
            copies[disk.spec.name] = bytearray(disk.spec.size)
            stack.callback(bitmap.drop, disk, monitor)
        with Load(guest):
            everything = copy(None)
            time.sleep(0.3)
            assert all(bitmap.has(disk, monitor) for disk in primary.disks())
            assert copy(dict(uncommitted)) < everything
