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
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from nova_pmt import exception
from nova_pmt.guest.layout import Layout
from nova_pmt.guest.monitor import Monitor, QmpCommandError
from nova_pmt.guest.vmstate import Prelude, PreludeReader

REQUIRED_CAPABILITIES = ("x-ignore-shared", "pause-before-switchover", "events")
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


def _set_capabilities(monitor: Monitor, states: dict[str, bool]) -> None:
    if states:
        monitor.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": on} for name, on in states.items()],
        )


@contextlib.contextmanager
def _migration_settings(monitor: Monitor) -> Iterator[None]:
    """Set capabilities and parameters for the prelude; put back exactly what was there."""
    before = {
        entry["capability"]: bool(entry["state"])
        for entry in monitor.execute("query-migrate-capabilities")
    }
    wanted = {name: name in REQUIRED_CAPABILITIES for name in before}
    changed = {name: state for name, state in before.items() if wanted[name] != state}
    parameters = monitor.execute("query-migrate-parameters")
    saved: dict[str, Any] = {
        name: parameters[name] for name in ("max-bandwidth", "downtime-limit") if name in parameters
    }
    _set_capabilities(monitor, {name: wanted[name] for name in changed})
    try:
        # A short limit first, so that QEMU sends every block before it wants to switch over.
        monitor.execute(
            "migrate-set-parameters", **{"max-bandwidth": BANDWIDTH, "downtime-limit": 1}
        )
        yield
    finally:
        monitor.execute("migrate-set-parameters", **saved)
        _set_capabilities(monitor, changed)


def _end(monitor: Monitor, was_running: bool, timeout_s: float) -> None:
    """Bring the migration to an end, whatever state it is in, and see the guest run again."""
    with contextlib.suppress(QmpCommandError):
        monitor.execute("migrate_cancel")
    deadline = time.monotonic() + timeout_s
    while True:
        status = monitor.execute("query-migrate").get("status", "none")
        running = monitor.execute("query-status")["running"]
        if status in ("none", "cancelled", "failed", "completed") and running == was_running:
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
    :param directory: where the socket is made; QEMU's user must be able to enter it.
    :param timeout_s: for the whole; a guest with private memory sends all of it.
    :raises nova_pmt.exception.GuestError: it did not work; the guest runs on.
    """
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
        stack.enter_context(_migration_settings(monitor))
        stack.callback(_end, monitor, was_running, 5.0)
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
