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

"""A guest: memory that is written while it is read, and an execution that keeps its order."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from nova_pmt.checkpoint.interfaces import PAGE_SIZE, PageNumbers, Pages
from nova_pmt.guest.vmstate import EOF, FULL, MAGIC

HALF = PAGE_SIZE // 2


class Faults:
    """Makes the call with number ``at`` raise, before it did anything or after it did all."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.at = -1
        self.after = False
        self.error: BaseException = RuntimeError("injected")

    def enter(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at and not self.after:
            raise self.error

    def leave(self) -> None:
        if len(self.calls) - 1 == self.at and self.after:
            raise self.error


class Guest:
    """RAM, and which pages were written since they were last protected.

    :param meddle: called at every step of everything that reads this guest.
    """

    def __init__(self, page_count: int) -> None:
        self.page_count = page_count
        self.ram: Pages = np.zeros((page_count, PAGE_SIZE), np.uint8)
        self.written: npt.NDArray[np.bool_] = np.zeros(page_count, np.bool_)
        self.touched: npt.NDArray[np.bool_] = np.zeros(page_count, np.bool_)
        self.paused = False
        self.paused_steps = 0
        self.meddle: Callable[[], None] | None = None
        self.on_pause: Callable[[int], None] = lambda _number: None
        self._serial = 0

    def step(self) -> None:
        """Somebody else's turn."""
        if self.paused:
            self.paused_steps += 1
        if self.meddle is not None:
            self.meddle()

    def write(self, pages: Iterable[int], *, zeros: bool = False) -> None:
        """The guest writes whole pages, each time with other contents."""
        assert not self.paused, "a paused guest does not write"
        where = np.fromiter(pages, np.int64)
        if not len(where):
            return
        self._serial += 1
        content = np.zeros((len(where), PAGE_SIZE // 8), np.int64)
        if not zeros:
            content[:] = (self._serial << 32) + where[:, None]
        self.ram[where] = content.view(np.uint8)
        self.written[where] = True
        self.touched[where] = True


class FakeMemory:
    """Implements :class:`nova_pmt.checkpoint.interfaces.GuestMemory`."""

    def __init__(self, guest: Guest, faults: Faults | None = None) -> None:
        self.guest = guest
        self.page_count = guest.page_count
        self.faults = faults or Faults()
        self._report: PageNumbers = np.zeros(guest.page_count, np.int64)

    def scan(self) -> PageNumbers:
        self.faults.enter("scan")
        guest = self.guest
        self._report[:] = -1  # what was reported last is not valid any more
        count = at = 0
        # Page by page as the kernel does: one that is written behind the walk is for the next.
        while len(rest := np.flatnonzero(guest.written[at:])):
            if guest.meddle is None:
                self._report[: len(rest)] = rest
                guest.written[:] = False
                count = len(rest)
                break
            page = at + int(rest[0])
            guest.written[page] = False
            self._report[count] = page
            count, at = count + 1, page + 1
            guest.step()
        self.faults.leave()
        return self._report[:count]

    def populated(self) -> PageNumbers:
        self.faults.enter("populated")
        self.faults.leave()
        return np.flatnonzero(self.guest.touched).astype(np.int64)

    def copy(self, pages: PageNumbers, out: Pages) -> None:
        self.faults.enter("copy")
        assert out.shape == (len(pages), PAGE_SIZE) and out.flags.c_contiguous
        guest = self.guest
        if guest.meddle is None:
            out[:] = guest.ram[pages]
        else:
            for index, page in enumerate(pages.tolist()):
                out[index, :HALF] = guest.ram[page, :HALF]
                guest.step()  # a page can be torn
                out[index, HALF:] = guest.ram[page, HALF:]
                guest.step()
        self.faults.leave()


class FakeExecution:
    """Implements :class:`nova_pmt.checkpoint.interfaces.GuestExecution`; fails on wrong order.

    :attr:`snapshots` has the whole memory at each pause, by the pause's number. The number
    is in the device state, so that a checkpoint tells which pause it claims to be.
    """

    def __init__(self, guest: Guest, faults: Faults | None = None) -> None:
        self.guest = guest
        self.faults = faults or Faults()
        self.snapshots: dict[int, Pages] = {}
        self.pauses = 0
        self.paused_by_operator = False
        self.steps_of_pauses: list[int] = []
        self.clock_step: Callable[[str], None] = lambda _name: None
        self.held = False
        self._saving = False
        self._state = b""

    def prepare(self) -> None:
        self.faults.enter("prepare")
        self.faults.leave()

    def pause(self) -> None:
        self.faults.enter("pause")
        assert not self.guest.paused, "paused twice"
        self.clock_step("pause")
        self.pauses += 1
        self.guest.paused = True
        self.guest.paused_steps = 0
        self.snapshots[self.pauses] = self.guest.ram.copy()
        self.guest.on_pause(self.pauses)
        self._saving = True
        self.faults.leave()

    def saved(self) -> None:
        self.faults.enter("saved")
        assert self._saving and self.guest.paused, "nothing is being saved"
        self.clock_step("saved")
        self._saving = False
        self._state = device_state(self.pauses)
        self.faults.leave()

    def hold(self) -> None:
        self.faults.enter("hold guest")
        assert not self.guest.paused, "stopped twice"
        self.guest.paused = self.held = True
        self.faults.leave()

    def resume(self) -> None:
        self.faults.enter("resume")
        self.clock_step("resume")
        if self.guest.paused:
            self.steps_of_pauses.append(self.guest.paused_steps)
        self.guest.paused = self.held = False
        self._saving = False
        self.faults.leave()

    def running(self) -> bool:
        self.faults.enter("running")
        self.faults.leave()
        return not self.guest.paused and not self.paused_by_operator

    def device_state(self) -> bytes:
        self.faults.enter("device_state")
        assert not self._saving, "not saved yet"
        self.faults.leave()
        return self._state


def device_state(pause: int) -> bytes:
    """A device state that is none, but passes for one and names its pause."""
    return MAGIC + bytes([FULL]) + struct.pack(">Q", pause) + bytes([EOF])


def pause_of(state: bytes) -> int:
    """Which pause a :func:`device_state` is of."""
    return int(struct.unpack(">Q", state[len(MAGIC) + 1 : -1])[0])


class FakeOutput:
    """Implements :class:`nova_pmt.checkpoint.interfaces.OutputBuffer`; fails on wrong order."""

    def __init__(self, guest: Guest, faults: Faults | None = None) -> None:
        self.cuts: list[int] = []
        self.released: list[int] = []
        self.pressure = 0.0
        self.broken = ""
        self.held_s: float | None = None
        self.on_release: Callable[[int], None] = lambda _epoch: None
        self.waiting_since = 0.0
        self.on_output: Callable[[], None] | None = None
        self._guest = guest
        self._faults = faults or Faults()

    def cut(self, epoch: int) -> None:
        self._faults.enter("cut")
        assert self._guest.paused, "an epoch's output ends in a pause"
        assert not self.cuts or epoch > self.cuts[-1], "epochs end in order, once each"
        self.cuts.append(epoch)
        self.waiting_since = 0.0
        self._faults.leave()

    def watch(self, on_output: Callable[[], None]) -> None:
        self.on_output = on_output

    def send(self, now: float) -> None:
        """The guest puts something out."""
        assert not self._guest.paused, "a paused guest has no output"
        if not self.waiting_since:
            self.waiting_since = now
            if self.on_output is not None:
                self.on_output()

    def release(self, epoch: int) -> float | None:
        assert epoch in self.cuts, "released before its end"
        assert self.released == list(range(1, epoch)), "released out of order"
        self.released.append(epoch)
        self.on_release(epoch)
        return self.held_s
