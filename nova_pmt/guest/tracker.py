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

"""The contract of a dirty-page tracker (plug-ins ``nova_pmt.memory_trackers``)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from nova_pmt.guest.layout import Layout
from nova_pmt.guest.pagemap import PageNumbers

#: Name of a tracker's threads: a guest that is paused waits for them.
SCAN_THREAD = "scan"


class MemoryTracker(ABC):
    """Tells which pages of a running guest were written.

    A tracker is made for one guest: ``tracker(pid, layout, threads=n)``. What it
    did to the guest's QEMU it takes back in :meth:`detach`.
    """

    @abstractmethod
    def __init__(self, pid: int, layout: Layout, threads: int = 0) -> None: ...

    @classmethod
    @abstractmethod
    def check(cls) -> None:
        """See whether this host can do it, changing nothing.

        :raises nova_pmt.exception.Refusal: it cannot; the text names what is missing.
        """

    @abstractmethod
    def attach(self) -> None:
        """Start tracking.

        :raises nova_pmt.exception.GuestError: it did not work; QEMU is as before.
        """

    @abstractmethod
    def scan(self) -> PageNumbers:
        """Pages written since the last call; from now on a write to them counts anew.

        Protects first and reports then: a page that is copied after this call
        returns, and written during or after the copy, is reported again.

        :returns: page numbers, each once. The array is valid until the next call.
        """

    @abstractmethod
    def detach(self) -> None:
        """Stop tracking and leave QEMU as it was. Does nothing when QEMU has ended."""

    @abstractmethod
    def close(self) -> None:
        """Free what this process holds, without touching QEMU."""
