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

"""The prelude: one short outgoing migration to ourselves, cancelled before it completes.

It tells what ``xen-save-devices-state`` does not: the machine's configuration section and
the contents of ROM-type RAM blocks, without which the guest could not reboot after a
failover. Everything that is set for it is put back: Nova's live migration would find it.
Meanwhile a file in the guest's directory says what that is, for who comes after one that died.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import BinaryIO, cast

from oslo_log import log

from nova_pmt import exception
from nova_pmt.guest.layout import Layout
from nova_pmt.guest.monitor import Monitor, QmpCommandError
from nova_pmt.guest.vmstate import Prelude, PreludeReader

LOG = log.getLogger(__name__)

#: No libvirt sets it: while it is on, a migration is ours, or finds what we left.
_OURS = "x-ignore-shared"
REQUIRED_CAPABILITIES = (_OURS, "pause-before-switchover", "events")
PARAMETERS = ("max-bandwidth", "downtime-limit")
#: In the guest's directory, from before anything is changed until all is as it was.
FILE = "prelude.json"
_MAX_FILE_BYTES = 65536
_ENDED = ("none", "cancelled", "failed", "completed")
#: How QEMU calls a guest that a migration holds; an operator's pause has another name.
_HELD = ("finish-migrate", "postmigrate")
_END_S = 5.0
#: For the copy of small blocks; the stream stays on this host.
BANDWIDTH = 4 << 30
LONGEST_DOWNTIME_MS = 2_000_000


def check(monitor: Monitor) -> None:
    """See whether this QEMU can do it, changing nothing.

    :raises nova_pmt.exception.UnsupportedQemu: a capability is missing.
    :raises nova_pmt.exception.UnsupportedDevice: something blocks migration, or one is under way.
    """
    known = {entry["capability"] for entry in monitor.execute("query-migrate-capabilities")}
    missing = [name for name in REQUIRED_CAPABILITIES if name not in known]
    if missing:
        raise exception.UnsupportedQemu(f"QEMU lacks migration capabilities {', '.join(missing)}")
    migration = monitor.execute("query-migrate")
    blockers = migration.get("blocked-reasons")
    if blockers:
        raise exception.UnsupportedDevice(
            f"a device of this server cannot be migrated: {'; '.join(blockers)}"
        )
    if migration.get("status") in ("setup", "active", "pre-switchover", "device", "cancelling"):
        raise exception.Refusal(
            f"a migration of this server is under way ({migration['status']})",
            code="MIGRATING",
            cure="Wait until the migration has ended, then protect the server.",
        )


@dataclass(frozen=True)
class _Before:
    """What there was before a prelude, and has to be again.

    :param running: whether the guest ran.
    """

    running: bool
    capabilities: dict[str, bool]
    parameters: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> _Before:
        """:raises ValueError, TypeError: it is not what :meth:`save` wrote."""
        found = cls(**json.loads(text))
        if not (
            isinstance(found.running, bool)
            and all(isinstance(on, bool) for on in found.capabilities.values())
            and all(type(number) is int for number in found.parameters.values())
            and set(found.parameters) <= set(PARAMETERS)
        ):
            raise ValueError("it is not a prelude's")
        return found

    def save(self, path: str) -> None:
        # (Not synced: who loses power loses the guest as well.)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".new")
        # QEMU may write in this directory: no link of its making is followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path + ".new", flags, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        os.replace(path + ".new", path)


def _left(path: str) -> _Before:
    """What one that died wrote down.

    :raises nova_pmt.exception.GuestError: it cannot be read.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags), encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise exception.GuestError(f"{path} is no file", cure="Remove it.")
            return _Before.parse(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        # It was written whole: nobody knows what to put back, and that must not stay unnoticed.
        raise exception.GuestError(
            f"{path} cannot be read: {error}",
            cure="Put the guest's migration capabilities and parameters back by hand "
            "('virsh qemu-monitor-command'), then remove the file.",
        ) from error


def _capabilities(monitor: Monitor) -> dict[str, bool]:
    return {
        entry["capability"]: bool(entry["state"])
        for entry in monitor.execute("query-migrate-capabilities")
    }


def _set_capabilities(monitor: Monitor, wanted: dict[str, bool]) -> None:
    """In one command, so that all are set or none; nothing where nothing differs."""
    now = _capabilities(monitor)
    changed = {name: on for name, on in wanted.items() if now.get(name, on) != on}
    if changed:
        monitor.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": on} for name, on in changed.items()],
        )


def _put_back(monitor: Monitor, before: _Before, path: str) -> None:
    """Capabilities last: while ours is on, there is something left to do (:func:`recover`)."""
    monitor.execute("migrate-set-parameters", **before.parameters)
    _set_capabilities(monitor, before.capabilities)
    os.unlink(path)


@contextlib.contextmanager
def _migration_settings(monitor: Monitor, running: bool, path: str) -> Iterator[None]:
    """Set capabilities and parameters for the prelude; put back exactly what was there."""
    capabilities = _capabilities(monitor)
    parameters = monitor.execute("query-migrate-parameters")
    before = _Before(
        running, capabilities, {name: parameters[name] for name in PARAMETERS if name in parameters}
    )
    before.save(path)
    try:
        _set_capabilities(monitor, {name: name in REQUIRED_CAPABILITIES for name in capabilities})
        # A short limit first, so that QEMU sends every block before it wants to switch over.
        monitor.execute(
            "migrate-set-parameters", **{"max-bandwidth": BANDWIDTH, "downtime-limit": 1}
        )
        yield
    finally:
        _put_back(monitor, before, path)


def recover(monitor: Monitor, directory: str) -> None:
    """Undo what a prelude left whose process died: end its migration, put back what it had set.

    Nothing where no prelude was cut short: a migration of somebody else's is not touched. Does not
    let a guest run on that an operator has paused meanwhile. Idempotent.

    :param directory: as given to :func:`take`.
    :raises nova_pmt.exception.GuestError: something is left; ask again.
    """
    path = os.path.join(directory, FILE)
    if not os.path.lexists(path):
        return
    if not _capabilities(monitor).get(_OURS):
        # Nothing was changed yet, or all is put back; or it is another QEMU by now.
        os.unlink(path)
        return
    before = _left(path)
    LOG.warning("%s: a prelude was cut short; ending its migration", directory)
    _end_left(monitor, before.running)
    with contextlib.suppress(exception.GuestError):
        while True:  # a prelude waits for its own
            monitor.wait_event("MIGRATION", 0.0)
    _put_back(monitor, before, path)


def _end_left(monitor: Monitor, was_running: bool) -> None:
    deadline = time.monotonic() + _END_S
    if monitor.execute("query-migrate").get("status", "none") not in _ENDED:
        with contextlib.suppress(QmpCommandError):
            monitor.execute("migrate_cancel")
    while True:
        status = monitor.execute("query-migrate").get("status", "none")
        held = monitor.execute("query-status")["status"] in _HELD
        if status in _ENDED and not (was_running and held):
            return
        if time.monotonic() > deadline:
            if status in ("cancelled", "failed"):  # (a guest that was moved must not run here)
                monitor.execute("cont")
                return
            raise exception.GuestError(f"migration of a dead prelude stays in state '{status}'")
        time.sleep(0.002)


def _end(monitor: Monitor, was_running: bool, timeout_s: float) -> None:
    """Bring the migration to an end, whatever state it is in, and see the guest run again."""
    with contextlib.suppress(QmpCommandError):
        monitor.execute("migrate_cancel")
    deadline = time.monotonic() + timeout_s
    while True:
        status = monitor.execute("query-migrate").get("status", "none")
        running = monitor.execute("query-status")["running"]
        if status in _ENDED and running == was_running:
            return
        if time.monotonic() > deadline:
            if was_running and not running:
                monitor.execute("cont")
                return
            raise exception.GuestError(f"migration of the prelude stays in state '{status}'")
        time.sleep(0.002)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def take(monitor: Monitor, layout: Layout, directory: str, timeout_s: float = 60.0) -> Prelude:
    """Run the prelude on a running guest.

    :param layout: its tracked blocks; their pages are not kept.
    :param directory: the guest's, for the socket and :data:`FILE`; QEMU's user must be able to
        enter it.
    :param timeout_s: for the whole; a guest with private memory sends all of it.
    :raises nova_pmt.exception.GuestError: it did not work; the guest runs on.
    """
    recover(monitor, directory)
    path = os.path.join(directory, "prelude.sock")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    was_running = bool(monitor.execute("query-status")["running"])
    complete = threading.Event()
    failure: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.settimeout(timeout_s)
        listener.bind(path)
        stack.callback(os.unlink, path)
        os.chmod(path, 0o666)  # the directory is closed to everyone but QEMU's user and root
        listener.listen(1)
        settings = _migration_settings(monitor, was_running, os.path.join(directory, FILE))
        stack.enter_context(settings)
        stack.callback(_end, monitor, was_running, _END_S)
        monitor.execute("migrate", uri="unix:" + path)
        connection = stack.enter_context(listener.accept()[0])
        connection.settimeout(None)
        stream = stack.enter_context(cast("BinaryIO", connection.makefile("rb", 1 << 20)))
        # The reader may wait for more: closing the stream would wait for the reader.
        stack.callback(_hang_up, connection)
        skip = frozenset(block.name for block in layout.blocks)
        reader = PreludeReader(stream, skip, complete.set)

        def drain() -> None:
            try:
                reader.read()
                if not complete.is_set():
                    raise exception.GuestError("QEMU ended the migration of the prelude too early")
                while connection.recv(1 << 20):
                    pass
            except BaseException as error:  # noqa: BLE001  reported below, by the caller's thread
                failure.append(error)
                complete.set()

        thread = threading.Thread(target=drain, name="prelude", daemon=True)
        thread.start()
        if not complete.wait(timeout_s):
            raise exception.GuestError(f"the prelude was not complete after {timeout_s:.0f} s")
        if failure:
            raise failure[0]
        # Everything is here; now let it reach the one state in which a cancel is safe.
        monitor.execute("migrate-set-parameters", **{"downtime-limit": LONGEST_DOWNTIME_MS})
        monitor.wait_event("MIGRATION", timeout_s, status="pre-switchover")
        monitor.execute("migrate_cancel")
        monitor.wait_event("MIGRATION", timeout_s, status="cancelled")
        thread.join(timeout_s)
    return reader.prelude
