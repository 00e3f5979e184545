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

"""Output that cannot be held, logged or written: the pair degrades visibly, the guest goes on.

One guest goes through all tests; each leaves it running and unprotected, on whichever host. Its
image, and the logs of its writes, are on file systems that are easily filled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from nova_pmt.exception import LabError
from nova_pmt.lab import Disk, GuestSpec, Lab, LabHost, capture, deployment
from tests.functional.pairs import WorkerPair, protect
from tests.functional.test_disks import IMAGES, MIB, QUIET, Subject, processes, recover

SMALL = f"{IMAGES}/small"
LOGS = "/run/logs"
#: What a test configures, by the name of its file.
LITTLE_LOG = {"disk": {"log_directory": LOGS, "log_limit_mib": "16"}}
LITTLE_BUFFER = {"network": {"buffer_limit_mib": "1"}}
PATIENT = {"replication": {"claim_delay_ms": "3000"}}
STOPPED = "paused (I/O error)"
#: All of the disk that is load: KiB.
LOAD = 8 << 10


def configured(lab: Lab, name: str, extra: Mapping[str, Mapping[str, str]]) -> str:
    """The hosts' configuration with some options more; returns its path."""
    path = f"/etc/nova_pmt/{name}.conf"
    for host in lab.computes:
        text = host.path(deployment.CONFIG).read_text()
        for group, options in extra.items():
            text += f"[{group}]\n" + "".join(f"{key} = {v}\n" for key, v in options.items())
        host.path(path).write_text(text)
    return path


@pytest.fixture(scope="module")
def subject(lab: Lab) -> Iterator[Subject]:
    for host in lab.computes:
        for directory, size in ((SMALL, 72), (LOGS, 24)):
            host.run(["mkdir", "-p", directory])
            host.run(["mount", "-t", "tmpfs", "-o", f"size={size}m,mode=755", "tmpfs", directory])
    disk = Disk(f"{SMALL}/a.qcow2", size_mib=48 + LOAD // 1024)
    # Into a pc, devices can be plugged without a port made for each of them before.
    spec = GuestSpec("faults", ip="10.77.2.92", workload=QUIET, machine="pc", disks=(disk,))
    host = lab.computes[0]
    host.run(["qemu-img", "create", "-q", "-f", "qcow2", disk.path, f"{disk.size_mib}M"])
    guest = host.boot(spec).wait_ready()
    try:
        yield Subject(guest)
    finally:
        for host in lab.computes:
            guest.on(host).destroy()
            for directory in (SMALL, LOGS):
                host.run(["umount", "-l", directory])


@contextlib.contextmanager
def filled(host: LabHost, directory: str) -> Iterator[None]:
    """There is no room left on a file system."""
    path = host.path(f"{directory}/filler")
    try:
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while file.write(bytes(MIB)):
                pass
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def under_way(action: Callable[[], object]) -> Iterator[threading.Thread]:
    """Something goes on meanwhile, and comes to a good end."""
    errors = []

    def run() -> None:
        try:
            action()
        except (LabError, OSError) as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()
    assert not errors


def domain_state(subject: Subject) -> str:
    command = ["virsh", "domstate", "--reason", subject.guest.name]
    return subject.here.run(command).stdout.strip()


def eventually(wanted: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def free_load(subject: Subject) -> None:
    """What is written next needs room in the image."""
    subject.guest.control(f"disk discard 0 {LOAD} vda")


def write_load(subject: Subject) -> None:
    subject.guest.control(f"disk write seq 256 {LOAD // 256} vda", 60)
    subject.request()


def goes_on(subject: Subject) -> None:
    """The guest answers, has lost nothing, and can be protected with equal images."""
    assert domain_state(subject).startswith("running")
    subject.request()
    assert subject.client.verify() == len(subject.client.answered)
    with protect(subject.guest, subject.there) as pair:
        pair.protected()
        subject.write(1024)
        subject.settle(pair)
        pair.standby.close()
        pair.primary.state("primary_alone")
    subject.check_images()


def test_a_full_log_directory(lab: Lab, subject: Subject) -> None:
    """The guest is stopped by QEMU, and goes on with all that it had begun to write."""
    config = configured(lab, "little-log", LITTLE_LOG)
    with protect(subject.guest, subject.there, config=config) as pair:
        pair.protected()
        subject.request()
        with filled(subject.here, LOGS), under_way(lambda: write_load(subject)):
            error = pair.primary.error()
            assert error["code"] == "OUTPUT_BUFFER_BROKEN"
            assert "vda" in error["message"]
            assert "No space left" in error["message"]
            pair.primary.state("primary_alone")
            pair.standby.state("cancelled")
    goes_on(subject)


def test_a_slow_link(lab: Lab, subject: Subject) -> None:
    """The log stays below its limit, since the guest is held back; and so it stays protected."""
    config = configured(lab, "little-log", LITTLE_LOG)
    with protect(subject.guest, subject.there, config=config) as pair:
        pair.protected()
        before = pair.rounds(1)["throttled_rounds"]
        link = subject.here.link("repl")
        link.limit(40)
        try:
            started = time.monotonic()
            for _ in range(3):
                write_load(subject)
            assert time.monotonic() - started > 1.5  # 24 MiB, of which 16 may wait
            stats = pair.primary.wait_stats(lambda stats: stats["throttled_rounds"] > before)
        finally:
            link.unlimit()
        assert stats["disks"][0]["log_peak_bytes"] < 17 * MIB
        subject.settle(pair)
        pair.standby.close()
        pair.primary.state("primary_alone")
    subject.check_images()


def test_no_space_for_the_standbys_image(subject: Subject) -> None:
    free_load(subject)
    with protect(subject.guest, subject.there) as pair:
        pair.protected()
        with filled(subject.there, SMALL):
            write_load(subject)
            for error in pair.standby.error(), pair.primary.error():
                assert error["code"] == "DISK_IMAGE_FAILED"
                assert f"Free space in {SMALL}" in error["cure"]
            pair.primary.state("primary_alone")
            pair.standby.state("cancelled")
            with (
                pytest.raises(AssertionError, match="TOO_LITTLE_DISK"),
                protect(subject.guest, subject.there),
            ):
                pass
            subject.request()
    goes_on(subject)


def test_no_space_for_the_primarys_image(subject: Subject) -> None:
    """The guest stops, and goes on when its operator says so: as one that nobody protects."""
    with under_way(lambda: _fill_and_resume(subject, lambda: None)):
        pass
    with protect(subject.guest, subject.there) as pair:
        pair.protected()

        def degrades() -> None:
            error = pair.primary.error()
            assert error["code"] == "OUTPUT_BUFFER_BROKEN"
            assert "No space left" in error["message"]
            pair.primary.state("primary_alone")
            pair.standby.state("cancelled")

        _fill_and_resume(subject, degrades)
    goes_on(subject)


def _fill_and_resume(subject: Subject, meanwhile: Callable[[], None]) -> None:
    free_load(subject)
    with contextlib.ExitStack() as stack:
        with filled(subject.here, SMALL):
            stack.enter_context(under_way(lambda: write_load(subject)))
            meanwhile()
            eventually(lambda: domain_state(subject) == STOPPED)
        subject.here.run(["virsh", "resume", subject.guest.name])


def test_the_standbys_storage_daemon_is_killed(subject: Subject) -> None:
    with protect(subject.guest, subject.there) as pair:
        pair.protected().rounds(2)
        for pid in processes(subject.there, "qemu-storage-daemon"):
            os.kill(pid, signal.SIGKILL)
        subject.request()
        for error in pair.standby.error(), pair.primary.error():
            assert error["code"] == "DISK_IMAGE_FAILED"
        pair.primary.state("primary_alone")
        pair.standby.state("cancelled")
    goes_on(subject)
