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

"""What the algorithm knows of the world: a guest's memory, its execution, its output, a standby."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

#: Bytes of a page, everywhere.
PAGE_SIZE = 4096
#: Page numbers, int64, each page once.
PageNumbers = npt.NDArray[np.int64]
#: Contents of pages, uint8 of shape (n, 4096).
Pages = npt.NDArray[np.uint8]


class GuestMemory(Protocol):
    """The RAM of a guest that may be running."""

    page_count: int

    def scan(self) -> PageNumbers:
        """Pages written since the last call, protected again before they are reported.

        The array is valid until the next call.
        """

    def populated(self) -> PageNumbers:
        """All pages that may hold other than zeros."""

    def copy(self, pages: PageNumbers, out: Pages) -> None:
        """Copy pages as they are now into ``out``, shape (len(pages), 4096)."""


class GuestExecution(Protocol):
    """Stopping and starting a guest and saving its devices."""

    def prepare(self) -> None:
        """The next call is :meth:`pause`, in a moment."""

    def pause(self) -> None:
        """Stop the guest and start to save its devices; returns when it has stopped."""

    def saved(self) -> None:
        """Wait until the devices are saved."""

    def hold(self) -> None:
        """Stop the guest, and save nothing; :meth:`resume` lets it run on."""

    def resume(self) -> None:
        """Let the guest run on, in whatever state the calls before were left."""

    def running(self) -> bool:
        """Whether the guest runs; false when its operator paused it."""

    def device_state(self) -> bytes:
        """What was saved last. Not called in a pause."""


class OutputBuffer(Protocol):
    """Output that is held until the checkpoint that contains its cause is committed."""

    def cut(self, epoch: int) -> None:
        """End of the epoch's output: called in the pause; must not block or allocate."""

    def release(self, epoch: int) -> float | None:
        """Checkpoint ``epoch`` is committed: let out what was held up to its cut.

        :returns: seconds for which the oldest of it was held; None when there was none.
        """

    def watch(self, on_output: Callable[[], None]) -> None:
        """Have ``on_output`` called, from any thread, with the first output after each cut."""

    @property
    def waiting_since(self) -> float:
        """``time.perf_counter`` when the first output since the last cut came; 0: none did."""

    @property
    def pressure(self) -> float:
        """How full it is, 0 to 1."""

    @property
    def broken(self) -> str:
        """Why it cannot go on; empty while it can."""


class WriteLog(OutputBuffer, Protocol):
    """The log of a disk's writes: output that goes to the standby with its checkpoint.

    Before checkpoint 1 it may be cut, read and released under one and the same number, 0.
    """

    def segments(self, epoch: int) -> Iterator[memoryview]:
        """The log between the cut before and the epoch's, in parts. Not called in a pause.

        A part stays valid until it was sent.
        """


class DiskSource(Protocol):
    """The disks of a guest that runs, for their first copy."""

    @property
    def total_bytes(self) -> int:
        """What :meth:`blocks` will bring, as far as known."""

    def blocks(self) -> Iterator[tuple[int, int, memoryview]]:
        """Disk, offset and data of one block after the other, each read when it is asked for."""


class CheckpointSink(Protocol):
    """Where checkpoints go. Calls return at once; the sending happens elsewhere."""

    def send_pages(
        self, epoch: int, numbers: PageNumbers, data: Pages, sent: Callable[[], None] | None
    ) -> None:
        """Send pages of checkpoint ``epoch``; of a page that is sent twice the last one counts.

        :param numbers: (n,) page numbers; not to be changed until sent.
        :param data: (n, 4096) contents, C-contiguous; not to be changed until sent.
        :param sent: called, from any thread, when both may be reused.
        """

    def send_log(
        self, epoch: int, disk: int, part: memoryview, sent: Callable[[], None] | None
    ) -> None:
        """Send a part of a disk's write log; parts of a disk are put together in order."""

    def send_block(
        self, disk: int, offset: int, data: memoryview, sent: Callable[[], None] | None
    ) -> None:
        """Send a block of a disk's first copy, before checkpoint 1."""

    def send_commit(self, epoch: int, device_state: bytes) -> None:
        """Checkpoint ``epoch`` is complete; the standby may commit it."""

    def hold(self) -> None:
        """Send nothing that is not under way already: a pause begins."""

    def go_on(self) -> None:
        """The pause is over."""
