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
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from nova_pmt.exception import LabError
from nova_pmt.lab import Disk, GuestSpec, Lab, LabHost, Packet, capture, deployment
from tests.functional.pairs import protect
from tests.functional.test_disks import (
    IMAGES,
    MIB,
    QUIET,
    Subject,
    claim,
    copied_bytes,
    processes,
    recover,
)

SMALL = f"{IMAGES}/small"
LOGS = "/run/logs"
#: What a test configures, by the name of its file.
LITTLE_LOG = {"disk": {"log_directory": LOGS, "log_limit_mib": "16"}}
LITTLE_BUFFER = {"network": {"buffer_limit_mib": "1"}}
PATIENT = {"replication": {"claim_delay_ms": "8000"}}
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


def goes_on(subject: Subject) -> int:
    """The guest answers, has lost nothing, and can be protected with equal images.

    :returns: what had to be copied of its disk, in bytes.
    """
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
    return copied_bytes(pair)


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
    subject.guest.control("dirty 0 20")  # nothing but disk writes
    with protect(subject.guest, subject.there, config=config) as pair:
        pair.protected()
        before = pair.rounds(1)["throttled_rounds"]
        link = subject.here.link("repl")
        link.limit(80)
        try:
            started = time.monotonic()
            for _ in range(4):
                subject.guest.control(f"disk write seq 256 {LOAD // 256} vda")
            took = time.monotonic() - started
            stats = pair.primary.wait_stats(lambda stats: stats["throttled_rounds"] > before)
        finally:
            link.unlimit()
            subject.guest.control(f"dirty {QUIET.dirty_pages} {QUIET.dirty_ms}")
        assert took > 1.6  # 32 MiB, of which half may wait, at 10 MB/s
        assert 8 * MIB < stats["disks"][0]["log_peak_bytes"] < 17 * MIB
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
    _fill_and_resume(subject, lambda: None)
    with protect(subject.guest, subject.there) as pair:
        pair.protected()

        def degrades() -> None:
            error = pair.primary.error()
            assert error["code"] == "OUTPUT_BUFFER_BROKEN"
            assert "No space left" in error["message"]
            pair.primary.state("primary_alone")
            pair.standby.state("cancelled")

        _fill_and_resume(subject, degrades)
    assert subject.client.verify() == len(subject.client.answered)


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
    assert subject.client.verify() == len(subject.client.answered)


def qmp(subject: Subject, command: str, **arguments: object) -> Any:
    """Ask QEMU behind everybody's back."""
    line = json.dumps({"execute": command, "arguments": arguments})
    text = subject.here.run(["virsh", "qemu-monitor-command", subject.guest.name, line]).stdout
    return json.loads(text)["return"]


@contextlib.contextmanager
def failing_image(subject: Subject) -> Iterator[None]:
    """Every write to the image of the guest's disk fails, below all that knows of it."""
    nodes = qmp(subject, "query-named-block-nodes", flat=True)
    image = next(node["node-name"] for node in nodes if node["drv"] == "qcow2")
    file = next(node["node-name"] for node in nodes if node["file"].endswith("a.qcow2")
                and node["drv"] == "file")  # fmt: skip

    def work_on(node: str) -> None:
        options = {"node-name": image, "driver": "qcow2", "discard": "unmap", "file": node}
        cache = {"direct": True, "no-flush": False}
        qmp(subject, "blockdev-reopen", options=[{**options, "cache": cache}])

    error = {"event": "none", "iotype": "write", "errno": errno.EIO}
    faulty = {"node-name": "faulty", "driver": "blkdebug", "inject-error": [error]}
    qmp(subject, "blockdev-add", image=file, **faulty)
    work_on("faulty")
    try:
        yield
    finally:
        work_on(file)
        qmp(subject, "blockdev-del", **{"node-name": "faulty"})


def test_an_io_error_of_the_primarys_image(subject: Subject) -> None:
    """The guest is told, as one that nobody protects; all is copied again, since it cannot be
    known what of the write is where."""
    write_load(subject)
    with failing_image(subject), pytest.raises(LabError, match="Input/output error"):
        subject.guest.control("disk write seq 4 8 vda")
    with protect(subject.guest, subject.there) as pair:
        pair.protected()
        full = copied_bytes(pair)
        with failing_image(subject):
            with pytest.raises(LabError, match="Input/output error"):
                subject.guest.control("disk write seq 4 8 vda")
            error = pair.primary.error()
            assert error["code"] == "OUTPUT_BUFFER_BROKEN"
            assert "Input/output error" in error["message"]
            pair.primary.state("primary_alone")
            pair.standby.state("cancelled")
    assert goes_on(subject) >= full > 0


def test_a_full_egress_buffer(lab: Lab, subject: Subject) -> None:
    """What is too much is dropped, as a full switch would, and connections live on."""
    config = configured(lab, "little-buffer", LITTLE_BUFFER)
    with protect(subject.guest, subject.there, config=config) as pair:
        pair.protected()
        subject.guest.control("packets 0 1000 1514 0 9")
        try:
            stats = pair.primary.wait_stats(
                lambda stats: any(nic["dropped_packets"] for nic in stats["network"])
            )
            subject.request()
        finally:
            subject.guest.control("packets stop")
        assert stats["network"][0]["peak_bytes"] < MIB + 80_000
        subject.request()
        pair.primary.command("unprotect")
        pair.primary.state("unprotected")
        pair.standby.state("cancelled")
    assert subject.client.verify() == len(subject.client.answered)


def test_a_dead_workers_tap_is_closed_until_it_is_decided(lab: Lab, subject: Subject) -> None:
    """Nothing that the guest sends then is seen, and what it was told before it answers still."""
    config = configured(lab, "patient", PATIENT)
    for winner in ("primary", "standby"):
        with (
            protect(subject.guest, subject.there, config=config) as pair,
            capture(lab.ctl, f"data{subject.here.index}") as seen,
        ):
            pair.protected().rounds(5)
            subject.guest.control("packets 0 100 100 2000 9")
            subject.request()
            pair.primary.kill()
            killed = time.monotonic()
            time.sleep(2.0)
            if winner == "primary":
                claim(pair)
                decided = time.monotonic()
                recover(subject.guest)
                pair.standby.state("cancelled")
            else:
                pair.standby.state("standby_active")
                decided = time.monotonic()
                subject.here.run(["virsh", "destroy", subject.guest.name])
                subject.moved()
            subject.request()
            packets = [packet for packet in seen.packets() if sent_by(packet, subject)]
        assert [packet for packet in packets if packet.at < killed]
        assert not [packet for packet in packets if killed + 0.5 < packet.at < decided]
        assert subject.client.verify() == len(subject.client.answered)
        subject.guest.control("packets stop")


def sent_by(packet: Packet, subject: Subject) -> bool:
    """Whether it comes out of the host that is looked at, from the guest."""
    return not packet.outgoing and packet.data[6:12] == bytes.fromhex(
        subject.guest.spec.mac.replace(":", "")
    )
