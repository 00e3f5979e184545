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

"""The tracker and the readers on a process of this kernel: real userfaultfd, real PAGEMAP_SCAN.

The process is a small Python program whose main thread sleeps in a system call, as QEMU's does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nova_pmt import exception
from nova_pmt.guest import injection
from nova_pmt.guest.injection import ForeignCalls
from nova_pmt.guest.layout import PAGE_SIZE, Layout, TrackedBlock
from nova_pmt.guest.memory import TrackedMemory
from nova_pmt.guest.pagemap import RangeScanner
from nova_pmt.guest.uffd import SYS_IOCTL, UffdTracker

PROGRAM = Path(__file__).with_name("tracked_child.py")
SYS_GETPID = 39


class Child:
    """The process, and the layout of its memory."""

    def __init__(self, *blocks: tuple[str, int]) -> None:
        spec = [{"kind": kind, "pages": pages} for kind, pages in blocks]
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self.process.pid
        addresses, tracked, first = self.answer(), [], 0
        for index, (_, pages) in enumerate(blocks):
            tracked.append(
                TrackedBlock(f"b{index}", pages * PAGE_SIZE, addresses[index], first, True)
            )
            first += pages
        self.layout = Layout(tuple(tracked))

    def tell(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, do: str, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        return self.answer()

    def write(self, pages: list[int], value: int = 1, block: int = 0) -> None:
        self.do("write", block=block, pages=pages, value=value)

    def userfaultfds(self) -> int:
        links = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/{self.pid}/fd/{fd}"))
        return sum("userfaultfd" in link for link in links)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


Make = Callable[..., Child]


@pytest.fixture(autouse=True)
def kernel() -> None:
    try:
        UffdTracker.check()
    except exception.UnsupportedKernel as error:
        pytest.skip(error.message)


@pytest.fixture
def make() -> Iterator[Make]:
    children: list[Child] = []

    def start(*blocks: tuple[str, int]) -> Child:
        children.append(Child(*blocks))
        return children[-1]

    yield start
    for child in children:
        child.end()


@contextlib.contextmanager
def tracking(child: Child, threads: int = 1) -> Iterator[UffdTracker]:
    tracker = UffdTracker(child.pid, child.layout, threads=threads)
    tracker.attach()
    try:
        yield tracker
    finally:
        tracker.detach()


def scanned(tracker: UffdTracker) -> list[int]:
    pages = tracker.scan()
    assert len(np.unique(pages)) == len(pages)
    return sorted(pages.tolist())


KINDS = pytest.mark.parametrize("kind", ["private", "shared"])


# -- which pages were written -----------------------------------------------------------


@KINDS
@pytest.mark.parametrize("threads", [1, 3])
def test_exactly_the_written_pages_are_reported_once(make: Make, kind: str, threads: int) -> None:
    child = make((kind, 2000))
    child.write(list(range(0, 2000, 5)))  # some are there before, some not
    with tracking(child, threads) as tracker:
        assert tracker.thread_count == threads
        assert scanned(tracker) == []
        for pages in ([0], [1999], [3, 5, 6, 7, 1000], list(range(500, 1500, 2)), []):
            child.write(pages, value=len(pages))
            assert scanned(tracker) == pages
            assert scanned(tracker) == []


@KINDS
def test_pages_that_nobody_had_touched_are_reported_when_written(make: Make, kind: str) -> None:
    child = make((kind, 300))
    with tracking(child) as tracker:
        child.write([7, 8, 299])
        assert scanned(tracker) == [7, 8, 299]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_more_ranges_than_one_call_of_the_kernel_returns(make: Make, threads: int) -> None:
    """16,384 fit into our vector, 512 into the kernel's own buffer."""
    child = make(("private", 50_000))
    pages = list(range(1, 50_000, 2))
    with tracking(child, threads) as tracker:
        for count in (len(pages), 511, 512, 513, 1024, 16383, 16384, 16385):
            child.write(pages[:count])
            assert scanned(tracker) == pages[:count]
        assert scanned(tracker) == []


def test_memory_that_is_given_back_is_reported(make: Make) -> None:
    """A balloon inflates: the pages are zeros from then on."""
    child = make(("private", 100))
    child.write(list(range(100)), value=5)
    with tracking(child) as tracker:
        child.do("discard", block=0, page=10, count=3, how="MADV_DONTNEED")
        assert scanned(tracker) == [10, 11, 12]
        assert scanned(tracker) == []
        memory = TrackedMemory(child.layout, child.pid, tracker)
        out = np.ones((3, PAGE_SIZE), np.uint8)
        memory.copy(np.array([9, 10, 12], np.int64), out)
        assert out[:, 0].tolist() == [5, 0, 0]
        memory.close()


def test_blocks_of_both_kinds_share_one_numbering(make: Make) -> None:
    child = make(("shared", 100), ("private", 50), ("huge", 512))
    with tracking(child, 2) as tracker:
        child.write([99], block=0)
        child.write([0, 49], block=1)
        assert scanned(tracker) == [99, 100, 149]


def test_huge_pages_are_reported_with_all_that_was_written(make: Make) -> None:
    """Whole huge pages may be reported, or single ones after a split; never too little."""
    child = make(("huge", 4096))
    child.write(list(range(0, 4096, 3)))
    with tracking(child) as tracker:
        memory = TrackedMemory(child.layout, child.pid, tracker)
        for round_ in range(3):
            pages = [5, 600, 601, 4095]
            child.write(pages, value=40 + round_)
            found = tracker.scan().copy()
            assert set(pages) <= set(found.tolist())
            assert len(found) <= 3 * 512
            out = np.zeros((4, PAGE_SIZE), np.uint8)
            memory.copy(np.array(pages, np.int64), out)
            assert out[:, 0].tolist() == [40 + round_] * 4
        assert scanned(tracker) == []
        memory.close()


# -- protect first, then copy -----------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("blocks", [[("private", 1500)], [("shared", 900), ("private", 600)]])
def test_copies_made_while_it_writes_add_up_to_its_memory(
    make: Make, blocks: list[tuple[str, int]], threads: int
) -> None:
    """What is written during or after its copy is reported again: no write is ever lost."""
    child = make(*blocks)
    child.write(list(range(0, 500, 3)), value=3)
    with tracking(child, threads) as tracker:
        memory = TrackedMemory(child.layout, child.pid, tracker)
        image = np.zeros((memory.page_count, PAGE_SIZE), np.uint8)

        def copy(pages: np.ndarray) -> int:
            out = np.zeros((len(pages), PAGE_SIZE), np.uint8)
            memory.copy(pages, out)
            image[pages] = out
            return len(pages)

        copy(memory.populated())
        child.do("scribble")
        copied, deadline = 0, time.monotonic() + 1.0
        while time.monotonic() < deadline:
            copied += copy(memory.scan().copy())
        assert child.do("rest") > 0
        copied += copy(memory.scan().copy())
        assert copied > 100
        assert len(memory.scan()) == 0
        truth = np.zeros_like(image)
        memory.copy(np.arange(memory.page_count, dtype=np.int64), truth)
        assert np.array_equal(image, truth)
        memory.close()


# -- coming and going -------------------------------------------------------------------


@KINDS
def test_nothing_is_left_in_the_process_and_it_works_on(make: Make, kind: str) -> None:
    child = make((kind, 500))
    before = sorted(os.listdir(f"/proc/{child.pid}/fd"))
    with tracking(child) as tracker:
        assert child.userfaultfds() == 1
        child.write([1, 2])
        assert scanned(tracker) == [1, 2]
    assert sorted(os.listdir(f"/proc/{child.pid}/fd")) == before
    child.write(list(range(500)), value=9)
    assert "TracerPid:\t0" in Path(f"/proc/{child.pid}/status").read_text()
    with pytest.raises(PermissionError):
        probe(child)


def probe(child: Child) -> None:
    """Fails unless the memory is under asynchronous write protection."""
    block = child.layout.blocks[0]
    with open(f"/proc/{child.pid}/pagemap", "rb") as file:
        RangeScanner(file.fileno(), block.address, block.address + block.length, 0).probe()


def test_it_can_come_and_go_many_times(make: Make) -> None:
    child = make(("private", 200))
    for turn in range(20):
        with tracking(child) as tracker:
            child.write([turn])
            assert scanned(tracker) == [turn]
    assert child.userfaultfds() == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_that_died_is_followed_by_one_that_takes_over(make: Make, threads: int) -> None:
    child = make(("private", 300), ("shared", 100))
    worker = os.fork()
    if worker == 0:
        with contextlib.suppress(BaseException):
            UffdTracker(child.pid, child.layout, threads=1).attach()
        os._exit(0)
    os.waitpid(worker, 0)
    assert child.userfaultfds() == 1
    child.write([1, 2, 3])  # nobody looks; nothing blocks
    with tracking(child, threads) as tracker:
        assert child.userfaultfds() == 1
        child.write([5])
        child.write([7], block=1)
        assert scanned(tracker) == [5, 307]
    assert child.userfaultfds() == 0
    child.write([1])


def test_closing_leaves_the_process_as_it_is(make: Make) -> None:
    child = make(("private", 100))
    tracker = UffdTracker(child.pid, child.layout, threads=3)
    tracker.attach()
    tracker.close()
    tracker.close()
    assert child.userfaultfds() == 1
    child.write([1])
    with tracking(child):
        pass
    assert child.userfaultfds() == 0


def test_threads_end_with_the_tracker(make: Make) -> None:
    child = make(("private", 4000))
    before = threading.active_count()
    with tracking(child, 4) as tracker:
        tracker.scan()
        assert threading.active_count() == before + 3
    deadline = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_memory_that_is_unmapped_meanwhile_does_not_hinder_the_leaving(make: Make) -> None:
    child = make(("private", 100), ("private", 100))
    with tracking(child):
        child.do("unmap", block=0)
    assert child.userfaultfds() == 0
    child.write([1], block=1)


# -- processes that end -----------------------------------------------------------------


def test_a_process_that_ended_is_no_failure_to_detach(make: Make) -> None:
    child = make(("private", 100))
    tracker = UffdTracker(child.pid, child.layout, threads=1)
    tracker.attach()
    child.end()
    tracker.detach()


@KINDS
def test_memory_of_a_process_that_ended_is_a_typed_error_or_what_it_was(
    make: Make, kind: str
) -> None:
    child = make((kind, 100))
    child.write([3], value=77)
    tracker = UffdTracker(child.pid, child.layout, threads=1)
    tracker.attach()
    memory = TrackedMemory(child.layout, child.pid, tracker)
    child.end()
    out = np.zeros((1, PAGE_SIZE), np.uint8)
    if kind == "private":
        with pytest.raises(exception.GuestGone):
            memory.copy(np.array([3], np.int64), out)
    else:
        memory.copy(np.array([3], np.int64), out)
        assert out[0, 0] == 77
    memory.close()
    tracker.close()


def test_attaching_to_a_process_that_ended_is_refused(make: Make) -> None:
    child = make(("private", 100))
    tracker = UffdTracker(child.pid, child.layout, threads=1)
    child.end()
    with pytest.raises((exception.GuestError, OSError)):
        tracker.attach()


# -- injection --------------------------------------------------------------------------


def test_a_call_is_made_as_that_process_and_leaves_no_trace(make: Make) -> None:
    child = make(("private", 10))
    with ForeignCalls(child.pid) as foreign:
        assert foreign.call(SYS_GETPID) == (child.pid, b"")
        with pytest.raises(OSError) as caught:
            foreign.call(SYS_IOCTL, 9999, 0, None, buffer=b"x" * 16)
        assert caught.value.errno == 9
        with pytest.raises(ValueError, match="scratch"):
            foreign.call(SYS_GETPID, buffer=bytes(1000))
    child.write([1])


def test_a_process_under_a_debugger_is_refused(make: Make) -> None:
    child = make(("private", 10))
    traced, done = threading.Event(), threading.Event()

    def debug() -> None:
        injection._ptrace(injection.PTRACE_SEIZE, child.pid)
        traced.set()
        done.wait(20)
        injection._ptrace(injection.PTRACE_INTERRUPT, child.pid)
        os.waitpid(child.pid, injection.WALL)
        injection._ptrace(injection.PTRACE_DETACH, child.pid)

    debugger = threading.Thread(target=debug)
    debugger.start()
    assert traced.wait(10)
    tracker = UffdTracker(child.pid, child.layout, threads=1)
    try:
        with pytest.raises(exception.InjectionRefused, match="cannot be traced") as caught:
            tracker.attach()
        assert "debugger" in caught.value.cure
        child.write([1])
    finally:
        done.set()
        debugger.join()
    with tracking(child):
        child.write([2])


def cpu_ticks(pid: int) -> int:
    """What a process has used of the CPU, in clock ticks (of 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_process_that_computes_is_let_be_within_bounded_time(make: Make) -> None:
    child = make(("private", 10), ("shared", 1))
    child.tell("spin", block=1)
    assert child.answer() == "spinning"
    enough, deadline = cpu_ticks(child.pid) + 5, time.monotonic() + 30
    while cpu_ticks(child.pid) < enough:  # then it is where it makes no system call
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begin = time.monotonic()
    tracker = UffdTracker(child.pid, child.layout, threads=1)
    with pytest.raises(exception.InjectionRefused, match="not in a system call"):
        tracker.attach()
    assert time.monotonic() - begin < 10
    assert child.userfaultfds() == 0
    # it computes on, and ends when it is told to
    with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(child.layout.blocks[1].address)
        memory.write(b"\1")
    assert child.answer() is True
    with tracking(child) as tracker:
        child.write([3])
        assert scanned(tracker) == [3]


def test_signals_that_come_in_between_reach_the_process(make: Make) -> None:
    child = make(("private", 50))
    sent, stop = [0], threading.Event()

    def storm() -> None:
        while not stop.is_set():
            os.kill(child.pid, signal.SIGUSR1)
            sent[0] += 1
            time.sleep(0.0003)

    thread = threading.Thread(target=storm)
    thread.start()
    refused = 0
    try:
        for turn in range(40):
            try:
                with tracking(child) as tracker:
                    child.write([turn])
                    assert turn in scanned(tracker)
            except exception.InjectionRefused:
                refused += 1
    finally:
        stop.set()
        thread.join()
    assert child.do("signals") > 0
    assert child.process.poll() is None
    before = child.do("signals")
    os.kill(child.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 5
    while child.do("signals") == before:
        assert time.monotonic() < deadline
    assert refused == 0


def test_a_process_that_a_signal_stopped_stays_stopped(make: Make) -> None:
    """An operator's SIGSTOP is no reason to fail, and is not undone."""
    child = make(("private", 50))
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    tracker = UffdTracker(child.pid, child.layout, threads=1)
    try:
        tracker.attach()
        tracker.detach()
    except exception.InjectionRefused:
        pass
    time.sleep(0.05)
    state = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    assert state == "T"
    os.kill(child.pid, signal.SIGCONT)
    child.write([1])
    assert child.userfaultfds() == 0


def test_the_architecture_is_looked_at_first(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    child = make(("private", 10))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(exception.InjectionRefused, match="x86-64 only"):
        ForeignCalls(child.pid).__enter__()


def test_a_block_that_is_not_mapped_is_refused_and_leaves_nothing(make: Make) -> None:
    child = make(("private", 50))
    good = child.layout.blocks[0]
    bad = TrackedBlock("bad", 16 * PAGE_SIZE, 0x10000, 50, True)
    tracker = UffdTracker(child.pid, Layout((good, bad)), threads=1)
    with pytest.raises(exception.InjectionRefused, match="cannot be registered"):
        tracker.attach()
    assert child.userfaultfds() == 0
    child.write([1])
    assert ctypes.sizeof(injection.Registers) == 27 * 8
