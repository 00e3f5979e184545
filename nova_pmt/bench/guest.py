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

"""The parts of a primary worker around one guest, without a standby: made for measuring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from oslo_config import cfg

from nova_pmt import exception
from nova_pmt.checkpoint.cache import SlabCache
from nova_pmt.checkpoint.interfaces import PageNumbers, Pages
from nova_pmt.checkpoint.round import Checkpointer
from nova_pmt.checkpoint.statistics import RoundRecord
from nova_pmt.conf import opts
from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest import layout as guest_layout
from nova_pmt.guest.execution import make_execution
from nova_pmt.guest.memory import TrackedMemory
from nova_pmt.guest.monitor import DirectMonitor
from nova_pmt.guest.uffd import UffdTracker

MIB = 1 << 20
MONITOR_TIMEOUT_S = 30.0


class NullSink:
    """A standby that has everything at once and keeps nothing."""

    def __init__(self) -> None:
        self.checkpointer: Checkpointer | None = None
        self.last_pages: list[PageNumbers] = []
        self._pages: list[PageNumbers] = []

    def send_pages(
        self, epoch: int, numbers: PageNumbers, data: Pages, sent: Callable[[], None] | None
    ) -> None:
        """Remember the numbers, drop the contents."""
        self._pages.append(numbers.copy())
        if sent is not None:
            sent()

    def send_commit(self, epoch: int, device_state: bytes) -> None:
        """Say that it is committed."""
        checkpointer = self.checkpointer
        assert checkpointer is not None
        self.last_pages, self._pages = self._pages, []
        checkpointer.post(lambda: checkpointer.commit(epoch))

    def hold(self) -> None:
        """Nothing is under way."""

    def go_on(self) -> None:
        """Nothing was held."""


class BenchGuest:
    """A running domain on this host, tracked, with the product's own checkpointer above it.

    A context manager: at its end the guest runs on as before, without our userfaultfd.

    :param threads: of the scan; 0 lets the tracker choose.
    :param cache_mib: limit of the cache.
    :raises nova_pmt.exception.PmtError: it cannot be tracked, or has no monitor of ours.
    """

    def __init__(self, name: str, *, threads: int = 0, cache_mib: int = 512) -> None:
        conf = cfg.ConfigOpts()
        opts.register(conf)
        conf([], project="nova_pmt", prog="nova-pmt", default_config_files=[])
        runtime = conf.guest.runtime_directory
        self.last: RoundRecord | None = None
        with contextlib.ExitStack() as stack:
            connection = guest_domain.connect(conf.guest.libvirt_uri)
            stack.callback(connection.close)
            domain = guest_domain.Domain.find(connection, name)
            self.pid = domain.pid()
            directory = guest_domain.guest_directory(runtime, domain.uuid, self.pid)
            monitor = stack.enter_context(domain.monitor(runtime, MONITOR_TIMEOUT_S))
            if not isinstance(monitor, DirectMonitor):
                raise exception.GuestError(
                    f"domain {name} has no QMP monitor of ours that is free",
                    cure="Boot it by the lab with second_monitor=True, and end who uses it.",
                )
            self.monitor: DirectMonitor = monitor
            version = monitor.execute("query-version")["qemu"]
            self.qemu_version = ".".join(str(version[part]) for part in ("major", "minor", "micro"))
            self.layout = guest_layout.discover(monitor)
            self.execution = make_execution(monitor, directory)
            stack.callback(self.execution.close)
            UffdTracker.check()
            self.tracker = UffdTracker(self.pid, self.layout, threads=threads)
            self.tracker.attach()
            stack.callback(self.tracker.detach)
            self.memory = TrackedMemory(self.layout, self.pid, self.tracker)
            stack.callback(self.memory.close)
            cache = SlabCache(cache_mib * MIB)
            stack.callback(cache.close)
            self.sink = NullSink()
            self.checkpointer = Checkpointer(
                self.memory, self.execution, self.sink, cache, on_round=self._on_round
            )
            self.sink.checkpointer = self.checkpointer
            self.checkpointer.synchronise()  # and so all guest memory is mapped here, too
            self._stack = stack.pop_all()

    def _on_round(self, record: RoundRecord) -> None:
        self.last = record

    def __enter__(self) -> BenchGuest:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
