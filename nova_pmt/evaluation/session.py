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

"""One guest and its clients, for as long as it lives: a whole campaign, if all goes well."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from nova_pmt.evaluation.ledger import Ledger
from nova_pmt.evaluation.traffic import Traffic
from nova_pmt.exception import LabError
from nova_pmt.lab import Disk, GuestSpec, Lab, LabGuest, Workload
from nova_pmt.lab.transactions import Client, Record

IMAGES = "/var/lib/libvirt/images"
#: About 500 different pages in 20 ms.
LOAD = Workload(console_every=0, dirty_pages=300, dirty_ms=20)
_BOOT_S = 120.0
#: Numbers of clients that only look; others are below.
_WATCHERS = itertools.count(1_000_000)
_guests = itertools.count(1)


@dataclass(frozen=True)
class View:
    """The guest's own view.

    :param table: what it has in memory.
    :param problem: its disks do not hold what its memory does; empty: they do.
    :param broken: connections that broke meanwhile, a line each.
    """

    table: list[Record]
    problem: str
    broken: list[str]


def _end(lab: Lab, guest: LabGuest) -> None:
    """Take the guest away from all hosts, whatever state they are in."""
    import libvirt

    for host in lab.computes:
        if host.powered:
            with contextlib.suppress(LabError, libvirt.libvirtError):
                guest.on(host).destroy()


class Session:
    """See the module's text.

    :param answer_s: how long an answer may take before its connection counts as broken.
    """

    def __init__(self, guest: LabGuest, clients: int, seed: int, answer_s: float) -> None:
        self.guest = guest
        self.boot_id = int(guest.boot_id(), 16)
        self.ledger = Ledger()
        self.room = True
        self._answer_s = answer_s
        self.traffic = Traffic(self._client, clients, seed=seed)
        self._watcher = self._client(next(_WATCHERS))

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, lab: Lab, *, clients: int, seed: int, answer_s: float, disks: bool = True
    ) -> Iterator[Session]:
        """Boot a guest with two disks on the first host, and connect to it."""
        number = next(_guests)
        name = f"campaign{number}"
        for host in lab.computes:
            host.path(IMAGES).mkdir(parents=True, exist_ok=True)
        two = (
            Disk(f"{IMAGES}/{name}-a.qcow2"),
            Disk(f"{IMAGES}/{name}-b.raw", format="raw", bus="scsi"),
        )
        spec = GuestSpec(
            name, ip=f"10.77.2.{50 + number % 50}", disks=two if disks else (), workload=LOAD
        )
        guest = lab.computes[0].boot(spec)
        try:
            guest.wait_ready(_BOOT_S)
            session = cls(guest, clients, seed, answer_s)
            try:
                yield session
            finally:
                session.close()
        finally:
            _end(lab, guest)

    def _client(self, number: int) -> Client:
        return self.guest.transactions(number, self._answer_s)

    def moved(self, guest: LabGuest) -> None:
        """The guest runs elsewhere now."""
        self.guest = guest

    def view(self) -> View:
        """Ask the guest for its table, and to compare its disks with it.

        :raises LabError: it answers nobody.
        """
        broken: list[str] = []
        for _ in range(2):
            try:
                table = self._watcher.dump()
                return View(table, self._verify(len(table)), broken)
            except (OSError, ValueError) as error:
                broken.append(f"watcher: {type(error).__name__}: {error}")
                self.reconnect_watcher()
        raise LabError(f"{self.guest!r} answers nobody: {'; '.join(broken)}")

    def _verify(self, records: int) -> str:
        try:
            count = self._watcher.verify()
        except LabError as error:
            return error.message
        return "" if count == records else f"{records} records, but V counts {count}"

    def reconnect(self, *, everybody: bool) -> None:
        """New clients in place of those that are broken, or of all.

        :raises LabError: the guest cannot be reached.
        """
        try:
            self.traffic.reconnect(everybody=everybody)
        except OSError as error:
            raise LabError(f"{self.guest!r} cannot be reached: {error}") from error

    def reconnect_watcher(self) -> None:
        """A new connection to look with.

        :raises LabError: the guest cannot be reached.
        """
        with contextlib.suppress(OSError):
            self._watcher.close()
        try:
            self._watcher = self._client(next(_WATCHERS))
        except OSError as error:
            raise LabError(f"{self.guest!r} cannot be reached: {error}") from error

    def close(self) -> None:
        """Hang up."""
        self.traffic.close()
        with contextlib.suppress(OSError):
            self._watcher.close()
