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

"""A running guest of the lab, seen from outside."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from nova_pmt.exception import LabError
from nova_pmt.lab import transactions
from nova_pmt.lab.domain import CONSOLES, Disk, GuestSpec, domain_xml

if TYPE_CHECKING:
    from nova_pmt.lab.host import LabHost

CONTROL_PORT = 7000
ECHO_PORT = 7

T = TypeVar("T")


class LabGuest:
    """Handle on a guest; :meth:`on` makes the handle for another host after a failover."""

    def __init__(self, spec: GuestSpec, host: LabHost, *, moved: bool = False) -> None:
        self.spec = spec
        self.host = host
        self._moved = moved  # came running from another host: it does not boot here
        self._console_start = len(self._console_bytes())

    def __repr__(self) -> str:
        return f"<LabGuest {self.spec.name} on {self.host.name}>"

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.spec.name

    @property
    def uuid(self) -> str:
        """The domain's UUID."""
        return self.spec.uuid

    @property
    def xml(self) -> str:
        """The domain XML it was made from."""
        return domain_xml(self.spec)

    @property
    def pid(self) -> int:
        """QEMU's process id as seen from the root namespace."""
        inside = int(self.host.disk_path(f"/run/libvirt/qemu/{self.name}.pid").read_text())
        return self.host.outside_pid(inside)

    def on(self, host: LabHost) -> LabGuest:
        """The same guest where it runs now."""
        return LabGuest(self.spec, host, moved=True)

    # -- what it says ------------------------------------------------------------------------

    def console(self) -> str:
        """All that it wrote to the serial console of this host since this handle was made."""
        text = self._console_bytes()[self._console_start :].decode(errors="replace")
        return text.replace("\r\n", "\n")

    def _console_bytes(self) -> bytes:
        try:
            return self.host.disk_path(self.spec.console_path).read_bytes()
        except FileNotFoundError:
            return b""

    def wait_console(self, text: str, timeout: float = 30.0) -> None:
        """Return once ``text`` is on the console.

        :raises LabError: it is not within ``timeout`` seconds; with the console's end.
        """
        deadline = time.monotonic() + timeout
        while text not in self.console():
            if time.monotonic() > deadline:
                raise LabError(
                    f"{self!r}: no {text!r} on the console within {timeout:g} s;"
                    f" it ends in {self.console()[-1000:]!r}"
                )
            time.sleep(0.02)

    def wait_ready(self, timeout: float = 60.0) -> LabGuest:
        """Return once the workload runs, and answers if the guest has a NIC.

        :raises LabError: it does not within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        if not (self._moved and self.spec.nic):
            # Asking earlier would cost a second: that long an unanswered ARP request is repeated.
            self.wait_console("TICK" if self._moved else "READY boot=", timeout)
        while self.spec.nic:
            try:
                self.control("boot", 1.0)
                break
            except LabError:
                if time.monotonic() > deadline:
                    raise
        return self

    # -- what it is told ---------------------------------------------------------------------

    def control(self, command: str, timeout: float = 30.0) -> str:
        """Send one command line over the data network (from ctl) and return the answer.

        ``counter`` ``boot`` ``rounds`` ``sunk`` ``status`` ``verify`` ``reboot``
        ``dirty PAGES MS`` ``burst PAGES`` ``full 0|1`` ``skew 0|1`` ``fill MIB`` ``tick MS``
        ``console EVERY``

        Load for a disk behind its record area, that is beyond 48 MiB, where offsets begin. The
        answer is ``ok KIB MICROSECONDS``, and for ``fua`` a KIB is a write:

        ``disk write seq|rand|text BLOCK_KIB COUNT DEV`` ``disk fua COUNT DEV``
        ``disk discard|zero OFFSET_KIB LENGTH_KIB DEV``

        UDP datagrams to ctl's ``PORT`` in the background, in frames of ``MIN`` to ``MAX`` bytes;
        ``COUNT`` 0 is without end:

        ``packets COUNT MIN MAX INTERVAL_US PORT`` ``packets sent`` ``packets stop``

        :raises LabError: no answer within ``timeout`` seconds, or the answer is an error.
        """
        try:
            with self.connect(CONTROL_PORT, timeout) as connection:
                connection.sendall(command.encode() + b"\n")
                answer = connection.makefile().readline().strip()
        except OSError as e:
            raise LabError(f"{self!r} does not answer {command!r}: {e}") from e
        if not answer or answer.startswith("error"):
            raise LabError(f"{self!r}: {command}: {answer or 'connection closed'}")
        return answer

    def connect(self, port: int = ECHO_PORT, timeout: float | None = 30.0) -> socket.socket:
        """A TCP connection from ctl to the guest; by default to its echo server."""
        return self.host.lab.ctl.dial(self.spec.ip, port, timeout)

    def transactions(self, client: int, timeout: float | None = 30.0) -> transactions.Client:
        """A new client of the guest's transactional server, with its own connection from ctl.

        :param client: number that tells it from other clients.
        :param timeout: seconds, for each answer.
        """
        return transactions.Client(self.connect(transactions.PORT, timeout), client)

    def counter(self) -> int:
        """The workload's counter now."""
        return int(self.control("counter"))

    def boot_id(self) -> str:
        """Differs after each boot."""
        return self.control("boot")

    def verify(self) -> str:
        """Let the guest compare all its pages with what it wrote last.

        :raises LabError: a page holds something else.
        """
        return self.control("verify", 120)

    def reboot(self, timeout: float = 60.0) -> None:
        """Let the guest restart itself and wait until it is ready again."""
        self._console_start = len(self._console_bytes())
        self._moved = False
        self.control("reboot")
        self.wait_ready(timeout)

    # -- its life ----------------------------------------------------------------------------

    def destroy(self) -> None:
        """Take the domain away from this host, whatever state it is in."""
        with self.host.libvirt() as connection:
            # A lookup that fails would be printed by libvirt's default error handler.
            for domain in connection.listAllDomains():
                if domain.UUIDString() == self.uuid:
                    with contextlib.suppress(_Gone):
                        persistent = _unless_gone(domain.isPersistent)
                        if _unless_gone(domain.isActive):
                            with contextlib.suppress(_Gone):
                                _unless_gone(domain.destroy)
                        if persistent:
                            _unless_gone(domain.undefine)


class _Gone(Exception):
    """A domain ended between two looks at it."""


def _unless_gone(call: Callable[[], T]) -> T:
    """:raises _Gone: its QEMU was killed, and libvirtd has just seen that as well."""
    import libvirt

    try:
        return call()
    except libvirt.libvirtError as e:
        if e.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            raise _Gone from e
        raise


def boot(host: LabHost, spec: GuestSpec) -> LabGuest:
    """Start ``spec`` on ``host``; return as soon as libvirt says that it runs."""
    import libvirt

    for disk in spec.disks:
        _make_disk(host, disk)
    guest = LabGuest(spec, host)
    with host.libvirt() as connection:
        try:
            if spec.persistent:
                connection.defineXML(guest.xml).create()
            else:
                connection.createXML(guest.xml)
        except libvirt.libvirtError as e:
            cure = f"See {host.log_directory} and {host.disk_path(CONSOLES)}."
            raise LabError(f"{guest!r} does not start: {e}", cure=cure) from e
    return guest


def _make_disk(host: LabHost, disk: Disk) -> None:
    file = host.disk_path(disk.path)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        size = f"{disk.size_mib}M"
        host.run(["qemu-img", "create", "-q", "-f", disk.format, disk.path, size])
