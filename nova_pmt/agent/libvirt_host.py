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

"""The guests of this host, through libvirt: implements :class:`nova_pmt.agent.host.Host`."""

from __future__ import annotations

import contextlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import libvirt
from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent.host import DomainInfo, GuestDescription
from nova_pmt.exception import Refusal
from nova_pmt.guest import checks, layout, prelude
from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest.disk import discover
from nova_pmt.guest.disk.changes import forget_changes
from nova_pmt.guest.disk.leftover import log_directory, recover_logs, remove_logs
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.guest.domain import Domain
from nova_pmt.guest.execution import SAVE
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.network import choose, tapredirect
from nova_pmt.guest.tracker import MemoryTracker
from nova_pmt.plugins import load_class
from nova_pmt.standby import domainxml
from nova_pmt.standby.images import (
    became_primary,
    forget_primary,
    images_are_kept,
    standby_disks,
)
from nova_pmt.standby.settle import settle

LOG = log.getLogger(__name__)

#: Seconds in which a monitor of ours must answer; it does not when a worker has it.
MONITOR_TIMEOUT_S = 2.0
#: On top of the guest's memory: QEMU itself, and what is staged.
STANDBY_OVERHEAD_BYTES = 192 << 20
#: States of a QEMU that has not loaded what it was to go on from.
_INCOMING = frozenset({"inmigrate", "finish-migrate"})


class LibvirtHost:
    """See the module's text. Connects when it must, and anew when the connection broke."""

    def __init__(self, conf: Any) -> None:
        self._conf = conf
        guest_domain.qmp_directory(conf)  # operators put second monitors of their domains there
        self._connection: libvirt.virConnect | None = None

    def _connect(self) -> libvirt.virConnect:
        if self._connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                if self._connection.isAlive():
                    return self._connection
        self._connection = guest_domain.connect(self._conf.guest.libvirt_uri)
        return self._connection

    def _find(self, name: str) -> Domain:
        return Domain.find(self._connect(), name)

    @staticmethod
    def _info(domain: Domain) -> DomainInfo:
        running = False
        with contextlib.suppress(exception.GuestGone):
            running = domain.active and domainxml.read_mark(domain.xml()) is None
        return DomainInfo(domain.uuid, domain.name, running)

    def find(self, domain: str) -> DomainInfo:
        """See the interface."""
        return self._info(self._find(domain))

    def domains(self) -> list[DomainInfo]:
        """See the interface."""
        connection = self._connect()
        return [self._info(Domain(connection, handle)) for handle in connection.listAllDomains()]

    def is_running(self, uuid: str) -> bool:
        """See the interface."""
        try:
            return self.find(uuid).running
        except exception.UnknownDomain:
            return False

    @contextlib.contextmanager
    def _monitor(self, domain: Domain) -> Iterator[Monitor]:
        with domain.monitor(self._conf.guest.runtime_directory, MONITOR_TIMEOUT_S) as monitor:
            yield monitor

    def facts(self) -> dict[str, Any]:
        """See the interface."""
        try:
            connection = self._connect()
            capabilities = ET.fromstring(connection.getCapabilities())
            return {
                "memory_free_bytes": int(connection.getFreeMemory()),
                "cpu_model": capabilities.findtext("host/cpu/model", ""),
                "running": [info.uuid for info in self.domains() if info.running],
            }
        except (libvirt.libvirtError, ET.ParseError) as error:
            raise exception.GuestError(f"libvirt does not tell of this host: {error}") from error

    def abilities(self) -> dict[str, Any]:
        """See the interface."""
        try:
            capabilities = ET.fromstring(self._connect().getCapabilities())
        except (libvirt.libvirtError, ET.ParseError) as error:
            raise exception.GuestError(f"libvirt does not tell of this host: {error}") from error
        machine = os.uname().machine
        types = capabilities.iterfind(f"guest/arch[@name='{machine}']/machine")
        return {
            "cpu_model": capabilities.findtext("host/cpu/model", ""),
            "machine_types": sorted({kind.text for kind in types if kind.text}),
            "plug": not tapredirect.missing_feature(),
        }

    def check(self, uuid: str) -> tuple[list[Refusal], list[str]]:
        """See the interface."""
        domain = self._find(uuid)
        if not self._info(domain).running:
            return [exception.NotRunning(f"domain {domain.name} is not running")], []
        xml = domain.xml()
        refusals = [*checks.refusals(xml), *checks.disk_problems(xml)]
        refusals += self._autostart_problems(domain)
        for problem in self._tracker_problems(), self._qemu_problems(domain):
            refusals += problem
        warnings = checks.warnings(xml)
        if "<disk " in xml:
            with self._monitor(domain) as monitor:
                warnings += discover.warnings(monitor)
        return refusals, warnings

    @staticmethod
    def _autostart_problems(domain: Domain) -> list[Refusal]:
        """libvirt would start what it has defined before any agent could ask who won."""
        try:
            if not domain.handle.autostart():
                return []
        except libvirt.libvirtError as error:
            raise exception.GuestError(f"domain {domain.name}: {error}") from error
        return [
            Refusal(
                f"libvirt starts domain {domain.name} with its host (autostart): when a lost host "
                "returns, that would be a second copy",
                code="AUTOSTART",
                cure=f"virsh autostart --disable {domain.name}",
            )
        ]

    def _tracker_problems(self) -> list[Refusal]:
        try:
            load_class(
                "nova_pmt.memory_trackers", self._conf.checkpoint.memory_tracker, MemoryTracker
            ).check()
        except Refusal as refusal:
            return [refusal]
        return []

    def _qemu_problems(self, domain: Domain) -> list[Refusal]:
        found: list[Refusal] = []
        with self._monitor(domain) as monitor:
            names = {entry["name"] for entry in monitor.execute("query-commands")}
            if SAVE not in names:
                found.append(exception.UnsupportedQemu(f"QEMU has no command '{SAVE}'"))
            nics = choose.nics(domain.xml(), domain.pid())
            found += choose.problems(self._conf.network.egress_buffer, nics, monitor)
            found += discover.problems(monitor)
            for check in (lambda: prelude.check(monitor), lambda: layout.discover(monitor)):
                try:
                    check()
                except Refusal as refusal:
                    found.append(refusal)
        return found

    def describe(self, uuid: str) -> GuestDescription:
        """See the interface."""
        domain = self._find(uuid)
        if not domain.active:
            raise exception.NotRunning(f"domain {domain.name} is not running")
        with self._monitor(domain) as monitor:
            blocks = layout.discover(monitor)
            disks = discover.disks(domain.xml(), monitor)
        xml = domainxml.with_mark(
            domain.xml(libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE),
            domainxml.Mark(0, "", domain.persistent),
        )
        return GuestDescription(
            xml,
            [block.to_dict() for block in blocks.blocks],
            blocks.memory_bytes,
            [disk.spec.to_dict() for disk in disks],
        )

    def check_standby(
        self, uuid: str, memory_bytes: int, disks: list[dict[str, Any]]
    ) -> list[Refusal]:
        """See the interface."""
        found = checks.standby_memory(
            self._conf.guest.memory_backing_dir, memory_bytes + STANDBY_OVERHEAD_BYTES
        )
        specs = [DiskSpec.from_dict(disk) for disk in disks]
        if specs:
            found += standby_disks(self._conf, uuid, specs).check()
        with contextlib.suppress(exception.UnknownDomain):  # it has run here before
            found += self._autostart_problems(self._find(uuid))
        found += self._tracker_problems()  # it must be able to protect the guest after a failover
        return found

    def recover(self, uuid: str) -> None:
        """See the interface."""
        domain = self._find(uuid)
        with contextlib.ExitStack() as stack:  # each is done, whatever becomes of those before it
            stack.callback(self._let_run, domain)
            stack.callback(self._recover_output, domain)
            self._recover_prelude(domain)

    def _recover_prelude(self, domain: Domain) -> None:
        """First: while a migration is under way, QEMU refuses much."""
        directory = guest_domain.guest_directory(
            self._conf.guest.runtime_directory, domain.uuid, domain.pid()
        )
        with self._monitor(domain) as monitor:
            prelude.recover(monitor, directory)

    def _let_run(self, domain: Domain) -> None:
        """Let a guest go on that its worker had stopped."""
        try:
            state, reason = domain.handle.state()
        except libvirt.libvirtError as error:
            raise exception.GuestError(f"domain {domain.name}: {error}") from error
        # libvirt saw a STOP that nobody asked it for; an operator's pause has reason USER.
        if state == libvirt.VIR_DOMAIN_PAUSED and reason != libvirt.VIR_DOMAIN_PAUSED_USER:
            LOG.warning("%s: its worker died in a pause; letting it run", domain.uuid)
            domain.resume()

    def _recover_output(self, domain: Domain) -> None:
        """Open the network of a guest whose worker died, and end the logs of its disks.

        Each by itself: a disk that cannot be helped must not keep the network closed.
        """
        pid = domain.pid()
        xml = domain.xml()
        with self._monitor(domain) as monitor:
            try:
                choose.recover(choose.nics(xml, pid), monitor)
            finally:
                recover_logs(self._conf, domain.uuid, xml, pid, monitor)

    def let_go(self, uuid: str) -> None:
        """See the interface."""
        domain = self._find(uuid)
        if domain.active:
            pid, xml = domain.pid(), domain.xml()
            with self._monitor(domain) as monitor:
                forget_changes(
                    discover.disks(xml, monitor), monitor, log_directory(self._conf, uuid, pid)
                )
        forget_primary(self._conf, uuid)

    def holds_state(self, uuid: str, generation: int) -> bool:
        """See the interface."""
        try:
            domain = self._find(uuid)
            mark = domainxml.read_mark(domain.xml())
        except (exception.UnknownDomain, exception.GuestGone):
            return False
        if not domain.active or mark is None or mark.generation != generation:
            return False
        with self._monitor(domain) as monitor:
            return monitor.execute("query-status")["status"] not in _INCOMING

    def finish_takeover(self, uuid: str) -> bool:
        """See the interface."""
        try:
            domain = self._find(uuid)
        except exception.UnknownDomain:
            return False
        if not domain.active:
            return False
        with self._monitor(domain) as monitor:
            status = monitor.execute("query-status")["status"]
            if status in _INCOMING:
                return False
            if status != "running":
                LOG.warning("%s: won, but its worker died: letting it run", uuid)
                domain.resume()
            settle(domain, monitor)
        became_primary(self._conf, uuid)
        return True

    def destroy(self, uuid: str) -> None:
        """See the interface."""
        with contextlib.suppress(exception.UnknownDomain):
            self._find(uuid).destroy()
        self.tidy(uuid)

    def tidy(self, uuid: str) -> None:
        """See the interface."""
        with contextlib.suppress(exception.UnknownDomain):
            if self._find(uuid).active:
                return
        remove_logs(self._conf, uuid)
        # A QEMU that is killed cannot remove the socket that it listened on.
        path = domainxml.monitor_path(guest_domain.qmp_path(self._conf), uuid)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # the next QEMU replaces it
            LOG.warning("%s: its monitor's socket is left: %s", uuid, error)

    def forget_images(self, uuid: str) -> None:
        """See the interface."""
        with (
            contextlib.suppress(exception.ImageExists),
            standby_disks(self._conf, uuid, ()) as disks,
        ):
            disks.remove()

    def cleanup_standby(self, uuid: str, generation: int) -> None:
        """See the interface."""
        try:
            domain = self._find(uuid)
            mark = domainxml.read_mark(domain.xml())
            active = domain.active
        except (exception.UnknownDomain, exception.GuestGone):
            active = False
        if not active:
            self.tidy(uuid)
            return
        if mark is None or mark.generation > generation:
            return
        with self._monitor(domain) as monitor:
            status = monitor.execute("query-status")["status"]
        if status != "inmigrate":
            LOG.warning("%s: a standby of generation %d is '%s'", uuid, mark.generation, status)
            if status == "running":
                return
        self.destroy(uuid)
        if not images_are_kept(self._conf, uuid):
            self.forget_images(uuid)
