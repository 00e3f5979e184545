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

"""The standby's disks are the primary's: after every end of a pair, and after every new beginning.

One guest with disks of all kinds goes through all tests, from host to host; each test leaves it
running and unprotected, on whichever host.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from nova_pmt.arbiter.base import Side
from nova_pmt.arbiter.file import FileArbiter
from nova_pmt.exception import LabError
from nova_pmt.lab import Disk, GuestSpec, Lab, LabGuest, LabHost, Workload, deployment
from nova_pmt.lab import transactions as lab_transactions
from tests.functional.pairs import WorkerPair, protect

KIB, MIB = 1 << 10, 1 << 20
IMAGES = "/var/lib/libvirt/images"
QUIET = Workload(dirty_pages=50, dirty_ms=20, buffer_mib=4)
RECORDS = "/var/lib/nova_pmt/images"


class Subject:
    """A guest with disks, wherever it runs, and a client that notes what it was told."""

    def __init__(self, guest: LabGuest) -> None:
        self.guest = guest
        self.client = guest.transactions(1)
        self.writable = [
            (disk, name)
            for disk, name in zip(guest.spec.disks, guest.spec.disk_names, strict=True)
            if not disk.readonly
        ]

    @property
    def here(self) -> LabHost:
        return self.guest.host

    @property
    def there(self) -> LabHost:
        return next(host for host in self.here.lab.computes if host is not self.here)

    def moved(self) -> None:
        """It goes on where its standby was."""
        self.guest = self.guest.on(self.there)

    def request(self, count: int = 5) -> None:
        """Transactions, each of which is on all disks when it is answered."""
        for _ in range(count):
            self.client.request()

    def write(self, kib: int = 2 * KIB) -> None:
        """Writes of all kinds to all disks, which overwrite each other and what was there."""

        def write_to(name: str) -> None:
            for what in (
                f"write seq 256 {kib // 256}",
                f"write rand 4 {kib // 64}",
                # 512 KiB in all, at no boundary of a cluster, in what was just written
                "discard 100 300",
                "zero 612 212",
                "fua 8",
            ):
                self.guest.control(f"disk {what} {name}")

        with ThreadPoolExecutor() as threads:
            list(threads.map(write_to, [name for _, name in self.writable]))
        self.request()

    @contextlib.contextmanager
    def writing(self, order: str = "seq") -> Iterator[None]:
        """Small writes and transactions go on meanwhile; ends with the last of them answered.

        :param order: ``seq``: always the same 32 KiB of each disk; ``rand``: all over the disks.
        """
        end, errors = threading.Event(), []

        def run() -> None:
            try:
                while not end.is_set():
                    for _, name in self.writable:
                        self.guest.control(f"disk write {order} 4 8 {name}")
                    self.request(2)
            except (LabError, OSError) as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join(60)
        assert not thread.is_alive()
        assert not errors

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """It stands still, and QEMU has written all it has into the images."""
        self.here.run(["virsh", "suspend", self.guest.name])
        try:
            yield
        finally:
            self.here.run(["virsh", "resume", self.guest.name])

    def settle(self, pair: WorkerPair) -> None:
        """Wait until the standby has all that was written, the guest having stopped to write."""
        done = pair.primary.stats.get("rounds", 0) + 3
        stats = pair.rounds(done)
        assert not any(disk["log_bytes"] for disk in stats["disks"]), stats["disks"]

    def check_images(self) -> None:
        """Both hosts' images are the same, whole, and have what the client was told."""
        with self.still():
            for disk in self.guest.spec.disks:
                compare(self.here, self.there, disk)
                for host in (self.here, self.there):
                    check_image(host, disk)
            for disk, _ in self.writable:
                self.check_records(self.here, disk)
        assert self.client.verify() == len(self.client.answered)

    def check_records(self, host: LabHost, disk: Disk) -> None:
        """An image has what the client was told, and no more than it asked for."""
        wrong = lab_transactions.compare(
            host.path(disk.path), disk.format, self.client.answered, self.client.unanswered
        )
        assert not wrong, wrong[:10]


def claim(pair: WorkerPair, side: Side = "primary") -> None:
    """Decide a pair, as an agent does whose worker died."""
    directory = str(pair.primary.host.lab.ctl.path(deployment.ARBITER))
    arbiter = FileArbiter(SimpleNamespace(arbiter=SimpleNamespace(directory=directory)))
    assert arbiter.claim(pair.pair.uuid, pair.pair.generation, side)


def compare(one: LabHost, two: LabHost, disk: Disk) -> None:
    """What a guest sees of both hosts' images is the same, byte for byte."""
    command = ["qemu-img", "compare", "-U", "-f", disk.format, "-F", disk.format]
    command += [str(host.path(disk.path)) for host in (one, two)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (disk.path, done.stdout, done.stderr)


def check_image(host: LabHost, disk: Disk) -> None:
    """An image is whole, and nothing in it is lost or leaked."""
    if disk.format == "qcow2":
        host.run(["qemu-img", "check", "-q", "-U", "-f", disk.format, disk.path])


def copied_bytes(pair: WorkerPair) -> int:
    """What the first synchronisation had to copy of the disks."""
    totals = [event["total_bytes"] for event in pair.primary.events if "total_bytes" in event]
    return max(totals, default=0)


def processes(host: LabHost, name: str) -> dict[int, str]:
    """What runs in a host under this name: pids in the root namespace, and command lines."""
    here = os.readlink(f"/proc/{host.init_pid}/ns/pid")
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if os.path.basename(command[0]) == name and os.readlink(entry / "ns/pid") == here:
                found[int(entry.name)] = " ".join(command)
    return found


def leftovers(host: LabHost, guest: LabGuest) -> list[str]:
    """What protection of a guest has left on a host, besides the images."""
    found = [*processes(host, "qemu-storage-daemon").values()]
    for directory in ("/run/nova_pmt/guests", "/run/nova_pmt/images", RECORDS):
        for path in host.path(directory).glob(f"{guest.uuid}*"):
            with contextlib.suppress(FileNotFoundError):  # a standby that cleans up
                inside = [entry.name for entry in path.iterdir()] if path.is_dir() else [""]
                found += [f"{directory}/{path.name}/{name}" for name in inside]
    return found


_RECOVER = """
import sys
from oslo_config import cfg
from oslo_log import log
from nova_pmt.agent.libvirt_host import LibvirtHost
from nova_pmt.conf import opts

conf = cfg.ConfigOpts()
log.register_options(conf)
opts.register(conf)
conf(["--config-file", sys.argv[1]], project="nova_pmt")
LibvirtHost(conf).recover(sys.argv[2])
"""


def recover(guest: LabGuest, config: str = deployment.CONFIG) -> None:
    """What the agent does that has claimed a pair for a worker which died."""
    guest.host.run([sys.executable, "-c", _RECOVER, config, guest.uuid])


def read_only_image(host: LabHost, path: str) -> bytes:
    """An image that a guest finds when it boots, as Nova's config drives are."""
    content = bytes(range(256)) * (8 * KIB)
    host.path(path).parent.mkdir(parents=True, exist_ok=True)
    host.path(path).write_bytes(content)
    return content


@pytest.fixture(scope="module")
def subject(lab: Lab) -> Iterator[Subject]:
    directory = f"{IMAGES}/disks"
    read_only_image(lab.computes[0], f"{directory}/config.raw")
    spec = GuestSpec(
        "disks",
        ip="10.77.2.91",
        workload=QUIET,
        disks=(
            Disk(f"{directory}/a.qcow2"),
            Disk(f"{directory}/b.raw", format="raw"),
            Disk(f"{directory}/c.qcow2", bus="scsi", discard="ignore"),
            Disk(f"{directory}/config.raw", format="raw", readonly=True),
        ),
    )
    guest = lab.computes[0].boot(spec).wait_ready()
    try:
        yield Subject(guest)
    finally:
        for host in lab.computes:
            guest.on(host).destroy()


def test_images_after_a_switchover_and_after_a_failover_back_over_the_old_ones(
    subject: Subject,
) -> None:
    """Copied while they are written, kept in step, handed over; then the same the other way."""
    subject.write()
    with protect(subject.guest, subject.there) as pair:
        with subject.writing("rand"):
            pair.protected().rounds(5)
        subject.write()
        pair.primary.command("switchover")
        pair.standby.state("standby_active")
        pair.primary.state("standby_active")
        subject.moved()
    subject.check_images()
    assert not processes(subject.here, "qemu-storage-daemon")

    with protect(subject.guest, subject.there) as pair:
        pair.protected()
        subject.write()
        subject.settle(pair)
        os.kill(subject.guest.pid, signal.SIGKILL)
        pair.standby.state("standby_active")
        pair.primary.state("standby_active")
        subject.moved()
    subject.check_images()
    assert subject.guest.verify().startswith("ok")


def test_after_a_short_break_only_what_has_changed_is_copied(subject: Subject) -> None:
    subject.write(8 * KIB)
    with protect(subject.guest, subject.there) as pair:
        pair.protected()
        full = copied_bytes(pair)
        assert full > 16 * MIB
        subject.write()
        with subject.writing():
            pair.standby.close()  # as when its agent is restarted
            pair.primary.state("primary_alone")

    subject.write(256)
    with protect(subject.guest, subject.there) as pair:
        with subject.writing():
            pair.protected()
        assert 0 < copied_bytes(pair) < full / 4
        subject.write()
        with subject.writing():
            claim(pair)
            pair.primary.kill()
            pair.standby.state("cancelled")
            recover(subject.guest)

    subject.write(256)
    with protect(subject.guest, subject.there) as pair:
        pair.protected()
        assert 0 < copied_bytes(pair) < full / 4
        subject.settle(pair)
        pair.standby.close()
        pair.primary.state("primary_alone")
    subject.check_images()


def test_images_that_nobody_answers_for_are_copied_in_full(subject: Subject) -> None:
    """A standby's worker that was killed, an image that was touched, one of another pair."""
    subject.write(8 * KIB)
    with protect(subject.guest, subject.there) as pair:
        pair.protected()
        full = copied_bytes(pair)
        with subject.writing():
            pair.standby.kill()
            pair.primary.state("primary_alone")
            subject.there.run(["virsh", "destroy", subject.guest.name])

    def killed() -> None:
        """As it was left."""

    def touched() -> None:
        os.utime(subject.there.path(subject.guest.spec.disks[1].path))

    def of_another_pair() -> None:
        path = subject.there.path(f"{RECORDS}/{subject.guest.uuid}.json")
        record = json.loads(path.read_text())
        record["consistent"][0] -= 1
        path.write_text(json.dumps(record))

    for spoil in (killed, touched, of_another_pair):
        spoil()
        with protect(subject.guest, subject.there) as pair:
            pair.protected().rounds(2)
            assert copied_bytes(pair) > full / 2, spoil.__name__
            pair.standby.close()
            pair.primary.state("primary_alone")
    subject.check_images()


def test_nothing_is_left_when_protection_is_ended_or_the_guest_is_shut_down(
    subject: Subject,
) -> None:
    """A guest that boots again has no bitmaps, so the standby's images would be of no use to it."""
    guest, here, there = subject.guest, subject.here, subject.there

    def nothing_is_left() -> None:
        assert not leftovers(here, guest)
        assert not leftovers(there, guest)
        for disk in guest.spec.disks:
            assert here.path(disk.path).exists()
            assert not there.path(disk.path).exists()

    with protect(guest, there) as pair:
        pair.protected()
        assert processes(there, "qemu-storage-daemon")
        subject.write()
        pair.primary.command("unprotect")
        pair.primary.state("unprotected")
        pair.standby.state("cancelled")
    nothing_is_left()
    subject.request()
    assert subject.client.verify() == len(subject.client.answered)

    with protect(guest, there) as pair:
        pair.protected()
        here.run(["virsh", "destroy", guest.name])
        assert pair.primary.state("ended", "standby_active")["state"] == "ended"
        assert pair.standby.state("cancelled", "standby_active")["state"] == "cancelled"
    nothing_is_left()
