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

"""A libvirt domain on this host: lifecycle through libvirt's API, facts about its QEMU."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import threading
from collections.abc import Callable
from typing import Any

import libvirt

from nova_pmt import exception
from nova_pmt.guest import process
from nova_pmt.guest.monitor import DirectMonitor, LibvirtMonitor, Monitor

#: A QMP monitor of a domain that belongs to us lies in this sub-directory of the runtime directory.
QMP_DIRECTORY = "qmp"
GUEST_DIRECTORY = "guests"
_UUID = re.compile(r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")
_QMP_ARGUMENT = re.compile(r"""<qemu:arg value=["']unix:([^,"']+),""")
_event_loop: list[threading.Thread] = []


def start_event_loop() -> None:
    """Run libvirt's event loop in a thread of this process; call before the first connection."""
    if _event_loop:
        return
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    thread = threading.Thread(target=run, name="libvirt-events", daemon=True)
    thread.start()
    _event_loop.append(thread)


def connect(uri: str) -> libvirt.virConnect:
    """Connect to libvirt.

    :raises nova_pmt.exception.GuestError: libvirtd does not answer.
    """
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # errors come as exceptions
    start_event_loop()
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise exception.GuestError(
            f"libvirt at {uri} cannot be reached: {error}",
            code="LIBVIRT_UNREACHABLE",
            cure="Start libvirtd on this host; [guest] libvirt_uri names its address.",
        ) from error


class Domain:
    """One domain.

    :param connection: an open libvirt connection; stays the caller's.
    """

    def __init__(self, connection: libvirt.virConnect, handle: libvirt.virDomain) -> None:
        self.connection = connection
        self.handle = handle
        self.uuid = handle.UUIDString()
        self.name = handle.name()

    @classmethod
    def find(cls, connection: libvirt.virConnect, name: str) -> Domain:
        """Look a domain up by UUID or name.

        :raises nova_pmt.exception.UnknownDomain: there is none.
        """
        lookups = [connection.lookupByName]
        if _UUID.fullmatch(name):
            lookups.insert(0, connection.lookupByUUIDString)
        for lookup in lookups:
            try:
                return cls(connection, lookup(name))
            except libvirt.libvirtError as error:
                # No other code: a connection that broke is an INTERNAL_ERROR, and a guest that
                # nobody could ask for must not be taken for one that is not there.
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise exception.GuestError(
                        f"libvirt does not tell about domain '{name}': {error}",
                        code="LIBVIRT_UNREACHABLE",
                    ) from error
        raise exception.UnknownDomain(f"this host has no domain '{name}'")

    @property
    def active(self) -> bool:
        """Whether it has a QEMU.

        :raises nova_pmt.exception.GuestError: libvirt does not tell.
        """
        try:
            return bool(self.handle.isActive())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return False
            raise exception.GuestError(f"domain {self.name}: {error}") from error

    @property
    def persistent(self) -> bool:
        return bool(self.handle.isPersistent())

    def xml(self, flags: int = 0) -> str:
        """Its live XML."""
        try:
            return str(self.handle.XMLDesc(flags))
        except libvirt.libvirtError as error:
            gone = error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN
            kind = exception.GuestGone if gone else exception.GuestError
            raise kind(f"domain {self.name}: {error}") from error

    def pid(self) -> int:
        """Process id of its QEMU.

        :raises nova_pmt.exception.NotRunning: it has none.
        """
        needle = self.uuid.encode()
        with contextlib.suppress(OSError, ValueError):
            with open(f"/run/libvirt/qemu/{self.name}.pid", encoding="ascii") as file:
                pid = int(file.read())
            if _is_guest(pid, needle):
                return pid
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _is_guest(int(entry), needle):
                return int(entry)
        raise exception.NotRunning(f"domain {self.name} is not running")

    def monitor(self, runtime_directory: str, timeout_s: float = 10.0) -> Monitor:
        """Its QMP monitor of ours, or libvirt's where it has none (or another one uses it)."""
        prefix = os.path.join(runtime_directory, QMP_DIRECTORY) + os.sep
        for path in _QMP_ARGUMENT.findall(self.xml()):
            if path.startswith(prefix) and os.path.exists(path):
                with contextlib.suppress(exception.GuestError):
                    return DirectMonitor(path, timeout_s)
        return LibvirtMonitor(self.handle, self.connection)

    def watch_devices(self, on_change: Callable[[str], None]) -> Callable[[], None]:
        """Call ``on_change`` with a text, from another thread, when a device comes or goes.

        Needs libvirt's event loop: see :func:`start_event_loop`.

        :returns: ends the watch.
        """

        def changed(what: str) -> Callable[..., None]:
            return lambda _conn, _domain, alias, _opaque: on_change(f"device {alias} was {what}")

        ids = [
            self.connection.domainEventRegisterAny(self.handle, event, changed(what), None)
            for event, what in (
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, "added"),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, "removed"),
            )
        ]

        def end() -> None:
            for ident in ids:
                with contextlib.suppress(libvirt.libvirtError):
                    self.connection.domainEventDeregisterAny(ident)

        return end

    def resume(self) -> None:
        """Let it run, through libvirt.

        :raises nova_pmt.exception.GuestError: libvirt or QEMU refused.
        """
        try:
            self.handle.resume()
        except libvirt.libvirtError as error:
            raise exception.GuestError(f"domain {self.name} cannot be resumed: {error}") from error

    def destroy(self) -> None:
        """End its QEMU at once. Does nothing when it has none."""
        try:
            self.handle.destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() in (
                libvirt.VIR_ERR_OPERATION_INVALID,
                libvirt.VIR_ERR_NO_DOMAIN,
            ):
                return
            raise exception.GuestError(f"domain {self.name} cannot be ended: {error}") from error


def _is_guest(pid: int, uuid: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")
    except OSError:
        return False
    return b"-uuid" in arguments and uuid in arguments and process.is_qemu(pid)


def guest_directory(runtime_directory: str, uuid: str, pid: int) -> str:
    """A directory that only root and this guest's QEMU can enter; made when it is not there."""
    parent = os.path.join(runtime_directory, GUEST_DIRECTORY)
    os.makedirs(parent, mode=0o711, exist_ok=True)
    path = os.path.join(parent, uuid)
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.chown(path, *process.owner(pid))
    return path


def qemu_owner(conf: Any) -> tuple[int, int]:
    """User and group ids that libvirt runs QEMU with.

    :raises nova_pmt.exception.ConfigError: there is no such user.
    """
    try:
        user = pwd.getpwnam(conf.guest.qemu_user)
    except KeyError as error:
        raise exception.ConfigError(
            f"[guest] qemu_user: there is no user '{conf.guest.qemu_user}'"
        ) from error
    return user.pw_uid, user.pw_gid


def qmp_path(conf: Any) -> str:
    """The directory of second monitors, whether it is there or not."""
    return os.path.join(conf.guest.runtime_directory, QMP_DIRECTORY)


def qmp_directory(conf: Any) -> str:
    """The directory of second monitors, owned by QEMU's user; made when it is not there.

    :raises nova_pmt.exception.ConfigError: there is no such user.
    """
    path = qmp_path(conf)
    owner = qemu_owner(conf)
    os.makedirs(conf.guest.runtime_directory, mode=0o711, exist_ok=True)
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.chown(path, *owner)
    return path
