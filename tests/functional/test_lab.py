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
"""The lab itself: real hosts, real guests, and nothing left afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nova_pmt.exception import LabError
from nova_pmt.guest.monitor import DirectMonitor, encode
from nova_pmt.lab import (
    SHARED,
    Disk,
    GuestSpec,
    Lab,
    LabGuest,
    Workload,
    capture,
    kvm,
    network,
    paths,
    registry,
    traffic,
    transactions,
)

IMAGES = "/var/lib/libvirt/images"
#: vda, vdb, sda and sdb of the guest "main".
DISKS = (
    Disk(f"{IMAGES}/vda.qcow2"),
    Disk(f"{IMAGES}/vdb.raw", format="raw"),
    Disk(f"{IMAGES}/sda.qcow2", bus="scsi"),
    Disk(f"{IMAGES}/sdb.raw", format="raw", bus="scsi", readonly=True),
)


@pytest.fixture(scope="module")
def lab():
    with Lab(computes=2, rabbit=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def guest(lab) -> LabGuest:
    spec = GuestSpec("main", disks=DISKS, extra_nics=1, mtu=network.JUMBO)
    return lab.computes[0].boot(spec).wait_ready()


# -- hosts -----------------------------------------------------------------------------------


def test_hosts_have_names_addresses_and_init_of_their_own(lab):
    for host in lab.hosts:
        assert host.run(["hostname"]).stdout.strip() == host.name
        assert host.run(["cat", "/proc/1/comm"]).stdout.startswith("python")
    one, two = lab.computes
    assert one.run(["getent", "hosts", "compute2"]).stdout.split()[0] == two.mgmt_ip
    for address in ("10.77.0.12", "10.77.1.12", "10.77.0.1"):
        with pytest.raises(ConnectionRefusedError):  # nobody listens, but somebody answers
            one.dial(address, 4)


def test_libvirtds_are_two(lab):
    uuids = set()
    for host in lab.computes:
        with host.libvirt() as connection:
            assert connection.getHostname() == host.name
            uuids.add(connection.getCapabilities().split("<uuid>")[1][:36])
        inside = host.run(["virsh", "-c", host.libvirt_uri_inside, "hostname"]).stdout
        assert inside.strip() == host.name
    assert len(uuids) == 2


def test_hosts_share_one_directory_and_nothing_else(lab):
    one, two = lab.computes
    for directory in ("/run", "/tmp", "/dev/shm", "/etc/nova_pmt", "/var/lib/nova_pmt", SHARED):
        one.run(["touch", f"{directory}/only-{one.name}"])
        seen = two.path(f"{directory}/only-{one.name}").exists()
        assert seen == (directory == SHARED), directory
        assert not os.path.exists(f"{directory}/only-{one.name}"), directory


def test_root_network_namespace_is_untouched(lab):
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    for name in ("br-mgmt", "br-data", "mgmt1", "vnet"):
        assert name not in links


def test_certificates_are_installed(lab):
    for host in lab.hosts:
        directory = host.path("/etc/nova_pmt/tls")
        assert {p.name for p in directory.iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
        assert (directory / "key.pem").stat().st_mode & 0o777 == 0o600
        text = host.run(["cat", "/etc/nova_pmt/tls/ca.pem"]).stdout
        assert text.encode() == lab.authority.pem


def test_run_reports_what_went_wrong(lab):
    with pytest.raises(LabError, match="exit status 3: no luck"):
        lab.ctl.run(["sh", "-c", "echo no luck >&2; exit 3"])
    assert lab.ctl.run(["false"], check=False).returncode == 1
    assert lab.ctl.run(["cat"], input="text").stdout == "text"
    assert lab.ctl.run(["sh", "-c", "echo $A"], env={"A": "b"}).stdout == "b\n"


def test_run_that_is_too_slow_is_killed_with_its_children(lab):
    with pytest.raises(LabError, match="within"):
        lab.ctl.run(["sh", "-c", "sleep 4711; true"], timeout=0.3)
    deadline = time.monotonic() + 10
    while "4711" in lab.ctl.run(["ps", "-eo", "args"]).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_spawned_process_stops_is_killed_and_tells_its_status(lab):
    host = lab.computes[1]
    script = "trap 'echo bye; exit 7' TERM; echo hello; while :; do sleep .05; done"
    process = host.spawn("service", ["sh", "-c", script])
    assert process.alive()
    assert os.readlink(f"/proc/{process.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    with pytest.raises(LabError, match="runs already"):
        host.spawn("service", ["true"])
    while not process.said("hello"):
        time.sleep(0.01)
    assert process.stop() == 7
    assert process.said("hello")
    assert process.said("bye")
    assert not process.said("hello bye")
    assert process.tail().endswith("bye")
    assert not process.alive()
    assert host.spawn("service", ["sleep", "1000"]).kill() == -signal.SIGKILL
    assert host.spawn("service", ["no-such-program"]).wait(10) == 127


def test_a_stopped_process_can_still_be_ended(lab):
    process = lab.ctl.spawn("stopped", ["sleep", "1000"])
    process.signal(signal.SIGSTOP)
    status = Path(f"/proc/{process.pid}/status")
    while "T (stopped)" not in status.read_text():
        time.sleep(0.01)
    assert process.alive()
    assert process.kill() == -signal.SIGKILL


def test_sockets_stay_in_the_network_they_were_made_in(lab):
    one, two = lab.computes
    with two.in_network(lambda: socket.create_server((two.repl_ip, 5000))) as server:
        with one.dial(two.repl_ip, 5000, 5) as client:
            connection, address = server.accept()
            assert address[0] == one.repl_ip
            connection.close()
            assert client.recv(1) == b""


# -- links -----------------------------------------------------------------------------------


def seconds_to_send(lab, size: int, backwards: bool = False) -> float:
    """Time for ``size`` bytes from compute1 to compute2 over the replication network."""
    source, sink = lab.computes[::-1] if backwards else lab.computes
    with sink.in_network(lambda: socket.create_server((sink.repl_ip, 0))) as server:
        client = source.dial(sink.repl_ip, server.getsockname()[1], 10)
        connection, _ = server.accept()
        code = os.fork()
        if code == 0:
            client.sendall(b"x" * size)
            os._exit(0)
        client.close()
        start, left = time.monotonic(), size
        while left > 0:
            left -= len(connection.recv(1 << 20))
        took = time.monotonic() - start
        os.waitpid(code, 0)
        connection.close()
        return took


def test_limit_holds_in_both_directions_and_goes_away(lab):
    link = lab.computes[0].link("repl")
    size = 3_000_000  # 24 Mbit
    link.limit(20)
    try:
        for backwards in (False, True):
            assert 0.8 < min(seconds_to_send(lab, size, backwards) for _ in range(2)) < 3.0
    finally:
        link.unlimit()
    assert min(seconds_to_send(lab, size) for _ in range(3)) < 0.5


@contextlib.contextmanager
def conversation(lab):
    """A connection of the first host to the second over repl: both ends."""
    one, two = lab.computes
    with (
        two.in_network(lambda: socket.create_server((two.repl_ip, 0))) as server,
        one.dial(two.repl_ip, server.getsockname()[1], 10) as client,
    ):
        connection, _ = server.accept()
        with connection:
            connection.settimeout(30)
            client.settimeout(30)
            yield client, connection


def test_packets_come_late_and_in_time_again(lab):
    link = lab.computes[0].link("repl")

    def round_trip(client, connection):
        start = time.monotonic()
        client.sendall(b"there")
        assert connection.recv(100) == b"there"
        connection.sendall(b"back")
        assert client.recv(100) == b"back"
        return time.monotonic() - start

    with conversation(lab) as ends:
        link.disturb(delay_s=0.2)
        try:
            assert round_trip(*ends) >= 0.4
        finally:
            link.settle()
        link.settle()
        assert min(round_trip(*ends) for _ in range(20)) < 0.2
    assert min(seconds_to_send(lab, 3_000_000) for _ in range(3)) < 0.5


def test_bits_change_on_the_way_and_no_checksum_tells(lab):
    link, block = lab.computes[0].link("repl"), bytes(1 << 16)
    with conversation(lab) as (client, connection):

        def send(blocks):
            changed = 0
            for _ in range(blocks):
                client.sendall(block)
                left = len(block)
                while left:
                    data = connection.recv(left)
                    left -= len(data)
                    changed += len(data) - data.count(0)
            return changed

        link.disturb(corrupt=0.5)
        try:
            assert send(60) > 0
        finally:
            link.settle()
        assert send(60) == 0


def test_link_down_is_a_partition_without_a_word(lab):
    one, two = lab.computes
    with two.in_network(lambda: socket.create_server((two.repl_ip, 0))) as server:
        with one.dial(two.repl_ip, server.getsockname()[1], 10) as client:
            connection, _ = server.accept()
            one.link("repl").down()
            client.sendall(b"lost for now")
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            with pytest.raises(ConnectionRefusedError):
                one.dial(two.mgmt_ip, 4)  # the other networks are as before
            one.link("repl").up()
            connection.settimeout(30)
            assert connection.recv(100) == b"lost for now"
            connection.close()


def test_unknown_network(lab):
    with pytest.raises(LabError, match="no network"):
        lab.ctl.link("storage")


# -- guests ----------------------------------------------------------------------------------


def assert_grows(read, least: int, rate: float) -> None:
    """A number grows by ``least``, however long a busy machine takes, and no faster than ``rate``.

    :param rate: in a second; what is 1.5 s late may be made up for.
    """
    start = time.monotonic()
    before = now = read()
    while now - before < least:
        assert time.monotonic() < start + 30, (before, now)
        time.sleep(0.05)
        now = read()
    assert now - before < rate * (time.monotonic() - start + 1.5)


def test_guest_counts_and_says_so(guest):
    assert_grows(guest.counter, 300, 100)  # one each 10 ms
    assert "READY boot=" + guest.boot_id() in guest.console()
    assert "TICK 10\n" in guest.console()


def test_guest_is_confined_as_on_a_compute_host(lab, guest):
    status = Path(f"/proc/{guest.pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert Path(f"/proc/{guest.pid}").stat().st_uid != 0
    assert guest.name in Path(f"/proc/{guest.pid}/cmdline").read_text()


def test_dirty_rate_is_what_was_asked_for(guest):
    guest.control("dirty 500 20")
    assert_grows(lambda: int(guest.control("rounds")), 150, 50)
    guest.control("dirty 0 20")
    assert guest.verify().startswith("ok")


def test_burst_full_pages_and_fill_are_verified(guest):
    guest.control("full 1")
    guest.control("burst 10000")
    guest.control("full 0")
    guest.control("fill 8")
    assert int(guest.verify().split()[1]) == 8192 + 2048
    with pytest.raises(LabError, match="MiB are free"):
        guest.control("fill 500")


def test_verify_finds_a_page_that_is_wrong(lab, guest):
    """Change one byte of the guest's memory from outside, as a bad checkpoint would."""
    guest.control("full 1")
    guest.control("burst 8192")
    with open_memory(guest) as (memory, base, size):
        page = next(
            p for p in range(size // 4096 // 2, size // 4096) if incompressible(memory, base, p)
        )
        at = base + page * 4096 + 100
        byte = os.pread(memory, 1, at)
        os.pwrite(memory, bytes([byte[0] ^ 1]), at)
        try:
            with pytest.raises(LabError, match="does not hold"):
                guest.verify()
        finally:
            os.pwrite(memory, byte, at)
    guest.control("full 0")
    assert guest.verify().startswith("ok")


class open_memory:  # noqa: N801 - used as a function
    """File descriptor of QEMU's memory, and where the guest's RAM lies in it."""

    def __init__(self, guest):
        self.pid = guest.pid

    def __enter__(self):
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            if "memfd:memory-backend-memfd" in line:
                start, end = (int(x, 16) for x in line.split()[0].split("-"))
                self.fd = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)
                return self.fd, start, end - start
        raise AssertionError("the guest's memory is not a memfd")

    def __exit__(self, *_):
        os.close(self.fd)


def incompressible(memory, base, page) -> bool:
    return len(set(os.pread(memory, 4096, base + page * 4096))) > 240


def test_counter_page_is_found_once_in_guest_memory(guest):
    with open_memory(guest) as (memory, base, size):
        found = []
        for page in range(size // 4096):
            head = os.pread(memory, 40, base + page * 4096)
            if head.startswith(b"PMT-LAB-COUNTER\0"):
                found.append(head)
    (head,) = found
    assert head[24:32][::-1].hex() == guest.boot_id()
    assert 0 <= guest.counter() - int.from_bytes(head[16:24], "little") < 1000


def test_echo_and_a_slow_command_at_once(guest):
    with guest.connect(timeout=20) as echo:
        echo.sendall(b"hello")
        assert echo.recv(10) == b"hello"
        guest.control("burst 200000")
        echo.sendall(b"again")
        assert echo.recv(10) == b"again"


def test_control_refuses_what_it_does_not_know(guest):
    for command in ("nonsense", "dirty 5", "dirty x y", "burst", "disk", "packets"):
        with pytest.raises(LabError, match="commands:"):
            guest.control(command)


# -- disks and transactions --------------------------------------------------------------------


def test_guest_has_all_its_disks_and_nics(guest):
    assert "disks=4 records=0" in guest.control("status")
    assert "ERROR" not in guest.console()
    deadline = time.monotonic() + 10
    # eth1 has no address, but it is up: IPv6 looks for a router through it.
    while any(mac not in bridge_knows(guest.host) for mac in guest.spec.macs):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def bridge_knows(host) -> str:
    return host.run(["bridge", "fdb", "show", "br", "br-data"]).stdout


def run_clients(guest: LabGuest, count: int, requests: int) -> list[transactions.Exchange]:
    """Clients at once, each with its connection; what was answered."""
    clients = [guest.transactions(number) for number in range(1, count + 1)]
    with ThreadPoolExecutor(count) as pool, contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(client)
        for done in [pool.submit(repeat, client.request, requests) for client in clients]:
            done.result()
    return [exchange for client in clients for exchange in client.answered]


def repeat(function, times: int) -> None:
    for _ in range(times):
        function()


@contextlib.contextmanager
def standstill(guest: LabGuest):
    """QEMU writes out all that it has when it stops a guest: then its images are whole."""
    with guest.host.libvirt() as connection:
        domain = connection.lookupByName(guest.name)
        domain.suspend()
        try:
            yield
        finally:
            domain.resume()


def test_transactions_are_in_memory_and_on_every_writable_disk(guest):
    before = {e.seq for e in run_clients(guest, 1, 1)}
    answered = run_clients(guest, 8, 20)
    with guest.transactions(99) as client:
        assert client.verify() == 161
        table = client.dump()
    everything = [transactions.Exchange(1, 1, 0.0, 1, 0.0), *answered]
    assert before == {1}
    # Client 1 began anew with its request 1, which the first run had sent, too.
    (repeated,) = transactions.check(table, everything)
    assert "(1, 1) again" in repeated
    boot = int(guest.boot_id(), 16)
    with standstill(guest):
        for disk in DISKS:
            path = guest.host.disk_path(disk.path)
            wrong = transactions.compare(path, disk.format, everything, boot_id=boot)
            assert len(wrong) == (161 if disk.readonly else 1)
            if not disk.readonly:
                assert wrong == [repeated]


def test_load_leaves_the_records_alone(guest):
    with guest.transactions(50) as client:
        client.request()
        count = client.verify()
        for command, kib in (
            ("write seq 1024 20 vda", 20480),  # more than there is: it starts anew
            ("write rand 4 200 vdb", 800),
            ("write rand 64 50 sda", 3200),
            ("fua 20 vda", 80),
            ("fua 20 sda", 80),
            ("discard 0 16384 vda", 16384),
            ("discard 4 4 sda", 4),
            ("zero 8 1024 vdb", 1024),
        ):
            ok, done, took_us = guest.control(f"disk {command}").split()
            assert (ok, int(done)) == ("ok", kib)
            assert int(took_us) > 0
        for command, reason in (
            ("write seq 4 1 sdb", "read-only"),
            ("write seq 4 1 vdc", "No such file"),
            ("write seq 3 1 vda", "DEV"),
            ("discard 0 16385 vda", "16384 KiB are free"),
        ):
            with pytest.raises(LabError, match=reason):
                guest.control(f"disk {command}")
        assert client.verify() == count


def test_verify_finds_a_record_that_is_wrong(guest):
    """Change one byte of the raw image from outside, as a write that came late would."""
    with guest.transactions(60) as client:
        slot = client.request()
        at = transactions.AREA_START + (slot - 1) * transactions.RECORD + 100
        with open(guest.host.disk_path(DISKS[1].path), "r+b") as image:
            byte = os.pread(image.fileno(), 1, at)
            for value in (bytes([byte[0] ^ 1]), byte):
                os.pwrite(image.fileno(), value, at)
                os.fsync(image.fileno())  # QEMU reads past the page cache
                if value != byte:
                    with pytest.raises(LabError, match=f"vdb slot {slot} does not hold"):
                        client.verify()
        assert client.verify() == slot


def test_a_record_that_only_the_disk_knows_is_found(guest):
    with guest.transactions(61) as client:
        slot = client.request() + 1
        boot = int(guest.boot_id(), 16)
        at = transactions.AREA_START + (slot - 1) * transactions.RECORD
        with open(guest.host.disk_path(DISKS[1].path), "r+b") as image:
            os.pwrite(image.fileno(), transactions.record(slot, 61, 2, boot), at)
            os.fsync(image.fileno())
        with pytest.raises(LabError, match=f"vdb slot {slot} holds a record that memory"):
            client.verify()
        assert client.request() == slot  # written over
        assert client.verify() == slot


# -- traffic -----------------------------------------------------------------------------------


def test_streams_both_ways(guest):
    size = 20_000_000
    with guest.connect(traffic.SOURCE_PORT) as source:
        received = source.makefile("rb").read(size)
    assert received == traffic.source_bytes(0, size)
    before = int(guest.control("sunk"))
    with guest.connect(traffic.SINK_PORT) as sink:
        sink.sendall(received)
        sink.shutdown(socket.SHUT_WR)
        assert sink.recv(1) == b""  # it closes when it has read all
    assert int(guest.control("sunk")) - before == size


def test_capture_beyond_the_host_sees_every_frame_of_the_guest(lab, guest):
    """Frames of all sizes that the guest's network carries, and when the kernel saw them."""
    begin = time.monotonic()
    with capture(lab.ctl, "data1") as seen:
        guest.control("packets 9000 60 9014 0 5555")
        with pytest.raises(LabError, match="already"):
            guest.control("packets 1 60 60 0 5555")
        while "running" in guest.control("packets sent"):
            time.sleep(0.05)
        assert guest.control("packets stop") == "ok 9000 sent 0 errors"
        sent = time.monotonic()
    packets = [(p, traffic.datagram(p.data, 5555)) for p in seen.packets()]
    datagrams = [(p, d) for p, d in packets if d]
    assert [d.sequence for _, d in datagrams] == list(range(9000))
    assert {p.length for p, _ in datagrams} == set(range(60, 9015))
    times = [p.at for p, _ in datagrams]
    assert begin < times[0] < times[-1] < sent
    assert times == sorted(times)
    assert all(not p.outgoing and len(p.data) == min(p.length, 128) for p, _ in datagrams)
    assert any(p.outgoing for p, _ in packets)  # our own commands
    assert seen.lost == 0


def test_packets_without_end_stop_when_told(lab, guest):
    with capture(lab.ctl, "data1") as seen:
        guest.control("packets 0 60 60 1000 5556")
        time.sleep(0.5)
        sent = int(guest.control("packets stop").split()[1])
        first = [p for p in seen.packets() if traffic.datagram(p.data, 5556)]
        time.sleep(0.1)
        later = [p for p in seen.packets() if traffic.datagram(p.data, 5556)]
    assert 50 < sent == len(first)  # 500 on a machine that has time
    assert later == []


_SENDER = """
import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as udp:
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        udp.sendto(number.to_bytes(8, "big"), ("127.0.0.1", 5557))
"""


def test_capture_keeps_up(lab):
    """More packets than the ring has room for, as fast as a process can send them."""
    # Each is seen twice, on its way out and in, as is the ICMP error it causes; a step fits into
    # the ring, since a busy machine may keep us from emptying it meanwhile.
    count, step = 100_000, 10_000
    parts = []
    with capture(lab.ctl, "lo") as seen:
        for first in range(0, count, step):
            lab.ctl.run([sys.executable, "-c", _SENDER, str(first), str(first + step)])
            parts.append(seen.take())
    taken = np.concatenate(parts)
    mine = taken[(taken["length"] == 50) & ~taken["outgoing"]]
    assert [int.from_bytes(d[42:50], "big") for d in mine["data"].tolist()] == [*range(count)]
    assert seen.lost == 0


def test_capture_of_an_interface_that_is_not_there(lab):
    with pytest.raises(LabError, match="no capture on 'vnet99'"):
        capture(lab.ctl, "vnet99")


def test_reboot_starts_anew(guest):
    boot = guest.boot_id()
    guest.reboot()
    assert guest.boot_id() != boot
    assert guest.counter() < 5000
    with guest.transactions(1) as client:
        assert client.request() == 1
        assert client.verify() == 1  # the next record is of the former boot, and does not count


@pytest.mark.parametrize(
    "spec",
    [
        GuestSpec("plain", machine="pc", shared_memory=False, second_monitor=False, vga=True),
        GuestSpec("smp", vcpus=2, memory_mib=256, persistent=True, ip="10.77.2.101"),
    ],
    ids=lambda spec: spec.name,
)
def test_other_guests(lab, spec):
    host = lab.computes[1]
    guest = host.boot(GuestSpec(**{**vars(spec), "ip": "10.77.2.101"})).wait_ready()
    try:
        assert host.guests() == [spec.name]
        with guest.transactions(1) as client:  # without a disk in memory only
            assert [client.request(), client.request(), client.verify()] == [1, 2, 2]
        with pytest.raises(LabError, match="of 60 to 1514 bytes"):
            guest.control("packets 1 60 9014 0 5555")
        socket_file = host.path(guest.spec.monitor_path)
        assert socket_file.exists() == spec.second_monitor
        shared = "memfd:" in Path(f"/proc/{guest.pid}/maps").read_text()
        assert shared == spec.shared_memory
        with host.libvirt() as connection:
            assert connection.lookupByName(spec.name).isPersistent() == spec.persistent
    finally:
        guest.destroy()
    with host.libvirt() as connection:
        assert connection.listAllDomains() == []


def test_guest_without_nic_and_with_disk(lab):
    host = lab.computes[1]
    disk = Disk("/var/lib/nova_pmt/disk.qcow2", size_mib=8)
    workload = Workload(tick_ms=5, console_every=20, dirty_once=100)
    guest = host.boot(GuestSpec("quiet", nic=False, disks=(disk,), workload=workload)).wait_ready()
    guest.wait_console("TICK 40\n")
    assert "TICK 30\n" not in guest.console()
    assert "ERROR" not in guest.console()
    assert host.disk_path(disk.path).stat().st_size > 0
    guest.destroy()


def test_second_monitor_speaks_qmp(lab, guest):
    path = lab.computes[0].path(guest.spec.monitor_path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(path))
        assert b"QMP" in monitor.recv(4096)


def test_qemu_does_a_command_that_was_begun_only_when_it_is_finished(lab, guest):
    """What DirectExecution counts on: neither a stop without its end, nor one that is spoiled."""
    stop, cont = encode("stop", {}, "stop"), encode("cont", {}, "cont")

    def running(monitor):
        return monitor.execute("query-status")["running"]

    with DirectMonitor(str(lab.computes[0].path(guest.spec.monitor_path))) as monitor:
        monitor.send(begin=stop)
        time.sleep(0.05)
        assert not monitor.saw_event("STOP")
        assert running(monitor)  # spoils it
        monitor.send(begin=stop)
        monitor.send(stop, begin=cont)
        monitor.reply("stop", "stop")
        time.sleep(0.05)
        assert monitor.saw_event("STOP") and not monitor.saw_event("RESUME")
        assert not running(monitor)  # spoils the cont
        monitor.send(cont)
        monitor.reply("cont", "cont")
        assert running(monitor)
        monitor.send(begin=stop)  # and what is begun ends with the connection
    time.sleep(0.05)
    with DirectMonitor(str(lab.computes[0].path(guest.spec.monitor_path))) as monitor:
        assert running(monitor)


def test_a_guest_that_cannot_start_says_why(lab):
    with pytest.raises(LabError, match="does not start"):
        lab.computes[0].boot(GuestSpec("huge", memory_mib=1 << 30))


# -- power -----------------------------------------------------------------------------------


def test_power_cut_takes_all_and_leaves_the_disk(lab):
    host, other = lab.computes[1], lab.computes[0]
    guest = host.boot(GuestSpec("cut", ip="10.77.2.102")).wait_ready()
    guest.wait_console("TICK")
    host.run(["touch", "/var/lib/nova_pmt/kept", "/run/nova_pmt/lost", "/dev/shm/lost"])
    processes = [guest.pid, host.spawn("agent", ["sleep", "1000"]).pid, host.init_pid]
    peer = other.dial(host.mgmt_ip, serve_in(host), 5)

    start = time.monotonic()
    host.power_off()
    assert time.monotonic() - start < 20
    assert not any(os.path.exists(f"/proc/{pid}") for pid in processes)
    assert "TICK" in guest.console()
    peer.settimeout(5)
    assert peer.recv(1) == b""  # the kernel said good-bye for it
    peer.close()
    with pytest.raises(LabError, match="no power"):
        host.run(["true"])

    host.power_on()
    assert host.path("/var/lib/nova_pmt/kept").exists()
    assert not host.path("/run/nova_pmt/lost").exists()
    assert not host.path("/dev/shm/lost").exists()
    assert host.guests() == []
    host.boot(guest.spec).wait_ready()  # the same files: libvirt must not think they are in use
    guest.destroy()


def test_silent_power_cut_is_not_heard(lab):
    host, other = lab.computes[1], lab.computes[0]
    peer = other.dial(host.mgmt_ip, serve_in(host), 5)
    host.power_off(silent=True)
    peer.settimeout(0.5)
    with pytest.raises(TimeoutError):
        peer.recv(1)
    peer.close()
    host.power_on()


def serve_in(host) -> int:
    """A process in ``host`` that accepts a connection and holds it; returns its port."""
    script = "import socket, time; s = socket.create_server(('', 4444)); print('up', flush=True);"
    script += "c = s.accept(); time.sleep(1000)"
    process = host.spawn("server", [sys.executable, "-c", script])
    while "up" not in process.tail():
        assert process.alive(), process.tail()
        time.sleep(0.01)
    return 4444


def test_kvm_is_probed_and_not_believed(lab, monkeypatch, tmp_path):
    """The probe tells a machine that boots from one that does not, whatever /dev/kvm says."""
    assert kvm.boots(["-accel", "tcg"], lab.image(), 60)
    assert not kvm.boots(["-accel", "tcg", "-S"], lab.image(), 1)
    assert not kvm.boots(["-accel", "no-such-accelerator"], lab.image(), 5)


# -- the end ---------------------------------------------------------------------------------


def traces() -> dict[str, object]:
    """What a lab would leave outside of its namespaces, if it left anything."""
    return {
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "links": subprocess.run(["ip", "-o", "link"], capture_output=True, check=True).stdout,
        "networks": sorted(p.name for p in Path("/run/netns").glob("*")),
        "shm": sorted(os.listdir("/dev/shm")),
    }


def remains(identity: str) -> list[str]:
    """Files of lab ``identity``, and processes that name it."""
    files = [paths.run_directory(identity), paths.REGISTRY / f"{identity}.json"]
    return [str(file) for file in files if file.exists()] + processes_with(identity)


def processes_with(text: str, namespaces: set[str] = frozenset()) -> list[str]:
    """Command lines of processes that name ``text``, or live in one of the pid namespaces."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (
                (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
            environ = (process / "environ").read_bytes().decode(errors="replace")
            if text in command or text in environ or os.readlink(process / "ns/pid") in namespaces:
                found.append(command)
        except OSError:
            continue
    return found


_PROGRAM = """
    import json, os, signal, sys, time
    from nova_pmt.lab import GuestSpec, Lab
    # Ignored in what a shell has started in the background: then we would have it so, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Lab(computes=2, rabbit={rabbit}) as lab:
        lab.computes[0].boot(GuestSpec("g")){ready}
        lab.computes[1].spawn("agent", ["sleep", "1000"])
        print(json.dumps({{
            "id": lab.id,
            "directory": str(lab.directory),
            "url": lab.transport_url if lab.rabbit else "",
            "namespaces": [os.readlink(f"/proc/{{h.init_pid}}/ns/pid") for h in lab.hosts],
        }}), flush=True)
        {then}
"""


class Program:
    """A lab in a process of its own, with a /tmp of its own."""

    def __init__(self, tmp_path: Path, then: str, rabbit: bool = False, ready: str = "") -> None:
        source = textwrap.dedent(_PROGRAM).format(then=then, rabbit=rabbit, ready=ready)
        self.process = subprocess.Popen(
            [sys.executable, "-c", source],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(self.process.communicate()[1])
        self.lab = json.loads(line)

    def left(self) -> list[str]:
        return processes_with(self.lab["id"], set(self.lab["namespaces"]))

    def wait(self, timeout: float = 60.0) -> int:
        self.process.communicate(timeout=timeout)
        return self.process.returncode


@pytest.mark.parametrize(
    ("then", "signals", "status"),
    [
        ("pass", [], 0),
        ("raise KeyError('oh')", [], 1),
        ("time.sleep(1000)", [signal.SIGINT], -signal.SIGINT),
        ("time.sleep(1000)", [signal.SIGTERM], 128 + signal.SIGTERM),
    ],
    ids=["end", "exception", "ctrl-c", "sigterm"],
)
def test_nothing_is_left(tmp_path, then, signals, status):
    before = traces()
    program = Program(tmp_path, then)
    assert program.left()  # the search does find a lab that is up
    for number in signals:
        program.process.send_signal(number)
    assert program.wait() == status
    assert program.left() == remains(program.lab["id"]) == []
    assert traces() == before
    assert list(tmp_path.iterdir()) == []


def test_a_killed_lab_dies_with_all_its_hosts_and_the_next_one_cleans_up(tmp_path):
    before = traces()
    program = Program(tmp_path, "time.sleep(1000)")
    program.process.kill()
    program.wait()
    deadline = time.monotonic() + 10
    while program.left():
        assert time.monotonic() < deadline, program.left()
        time.sleep(0.05)
    assert os.path.exists(program.lab["directory"])
    assert program.lab["id"] in {entry.id for entry in registry.clean()}
    assert remains(program.lab["id"]) == []
    assert traces() == before


def test_rabbit_is_private_and_stops(tmp_path):
    from kombu import Connection

    before = traces()
    with Lab(computes=1) as lab:
        url = lab.transport_url
        password = url.split(":")[2].split("@")[0]
        broker = Connection(url.replace("rabbit://", "amqp://"), heartbeat=0)
        lab.ctl.in_network(broker.connect)
        queue = broker.SimpleQueue("q")
        queue.put("x")
        assert queue.get(timeout=10).payload == "x"
        broker.release()
        wrong = Connection(url.replace("rabbit://", "amqp://").replace(password, "guess"))
        with pytest.raises(Exception, match=r"ACCESS_REFUSED|refused"):
            lab.ctl.in_network(wrong.connect)
        # Started anew while its script has not come to the broker yet: one is left, and serves.
        assert lab.rabbit is not None
        lab.rabbit.restart()
        assert lab.rabbit.alive()
        lab.rabbit.restart()
        lab.rabbit.wait_ready()
        assert len(lab.rabbit.pids()) == 1
        # Root's eyes only, and on no command line.
        everything = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert password not in everything
        secret = [p for p in lab.directory.rglob("*") if p.is_file() and holds(p, password)]
        assert secret
        assert all(p.stat().st_mode & 0o077 == 0 for p in secret), secret
        identity = lab.id
        listeners = subprocess.run(["ss", "-ltn"], capture_output=True, text=True).stdout
        assert ":5672" not in listeners
    assert remains(identity) == []
    assert traces() == before


def holds(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()


def command(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nova_pmt.cmd.lab", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_command_line_from_up_to_down(lab):
    """Beside the module's own lab: two labs at once do not meet."""
    before = traces()
    text = command("up", "--no-rabbit", "--mtu", "1400")
    identity = text.split()[1]
    try:
        assert "nova-pmt-lab down" in text
        assert identity in command("status")
        host = ("shell", "--lab", identity, "compute1", "--")
        assert command(*host, "hostname").strip() == "compute1"
        command(*host, "virsh", "create", f"{SHARED}/guests/guest1.xml")
        deadline = time.monotonic() + 60
        tell = [sys.executable, "-m", "nova_pmt.cmd.lab", "tell", "--lab", identity]
        while subprocess.run([*tell, "guest1", "boot"], capture_output=True).returncode:
            assert time.monotonic() < deadline
        assert "dirty=5/20ms" in tell_status(identity, "dirty 5 20")
        assert "does not answer" in command(
            "tell", "--lab", identity, "10.77.2.99", "boot", status=1
        )
        command(*host, "false", status=1)
    finally:
        assert "is down" in command("down", "--lab", identity)
    assert remains(identity) == []
    assert traces() == before
    assert lab.ctl.run(["hostname"]).stdout == "ctl\n"


def tell_status(identity: str, words: str) -> str:
    assert command("tell", "--lab", identity, "guest1", *words.split()).strip() == "ok"
    return command("tell", "--lab", identity, "guest1", "status")
