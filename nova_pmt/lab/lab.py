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

"""The lab as a whole: start, use, end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import Literal

from nova_pmt.exception import LabError
from nova_pmt.lab import image as images
from nova_pmt.lab import kvm, paths, registry
from nova_pmt.lab.certificates import Authority
from nova_pmt.lab.domain import GuestSpec
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.rabbit import Rabbit, private_file
from nova_pmt.lab.view import MOUNTPOINTS

#: File in the lab's directory, of mode 0600, for tools that do not run in the lab's process.
TRANSPORT_URL = "transport_url"


class Lab:
    """``computes`` compute hosts and ``ctl`` on this machine, from ``with`` to its end.

    :param computes: how many compute hosts; they are called compute1, compute2, ...
    :param rabbit: with a RabbitMQ in ctl (the slowest part of the start).
    :param mtu: of the networks and of guests that name none, in bytes. The data network carries
        at least ``network.JUMBO``, for guests that do.
    :param accel: ``auto`` takes KVM for the guests if it really boots one.
    :param detached: for the registry only: the lab belongs to ``nova-pmt-lab up``.

    After an exception, Ctrl-C, SIGTERM or SIGHUP inside the ``with`` all is down, too. After a
    SIGKILL of this process the hosts die with it, and the next lab removes the files.
    """

    def __init__(
        self,
        computes: int = 2,
        *,
        rabbit: bool = True,
        mtu: int = 1500,
        accel: Literal["tcg", "auto"] = "tcg",
        detached: bool = False,
    ) -> None:
        if not 1 <= computes <= 80:
            raise LabError(f"{computes} compute hosts", cure="Ask for 1 to 80.")
        self.id = secrets.token_hex(3)
        self.mtu = mtu
        self.directory = paths.run_directory(self.id)
        self.shared_directory = self.directory / "shared"
        self.authority = Authority()
        self.ctl = LabHost(self, "ctl", 0)
        self.computes = [LabHost(self, f"compute{n}", n) for n in range(1, computes + 1)]
        self.rabbit = Rabbit(self.ctl, self.id) if rabbit else None
        self._accel = accel
        self._detached = detached
        self._image: Future[images.Image] | None = None
        self._stack = contextlib.ExitStack()

    @property
    def hosts(self) -> list[LabHost]:
        """ctl and the compute hosts."""
        return [self.ctl, *self.computes]

    def host(self, name: str) -> LabHost:
        """The host called ``name``."""
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(h.name for h in self.hosts)
        raise LabError(f"the lab has no host {name!r}", cure=f"It has {known}.")

    @property
    def transport_url(self) -> str:
        """For oslo.messaging; contains a password, so write it only to files of mode 0600."""
        if self.rabbit is None:
            raise LabError("this lab has no RabbitMQ", cure="Use Lab(rabbit=True).")
        return self.rabbit.url

    def image(self) -> images.Image:
        """The guest image; waits until it is built."""
        if self._image is None:
            raise LabError("the lab is not up", cure="Use it as 'with Lab() as lab:'.")
        return self._image.result()

    def offers_kvm(self) -> bool:
        """Whether the hosts have a /dev/kvm; the first call may have to boot a guest to know."""
        return self._accel == "auto" and kvm.usable(self.image())

    def adapted(self, spec: GuestSpec) -> GuestSpec:
        """``spec`` as it is run here: with the lab's MTU, if it names none, and under KVM if the
        lab may and can."""
        accel: Literal["kvm", "tcg"] = "kvm" if self.offers_kvm() else spec.accel
        return dataclasses.replace(spec, accel=accel, mtu=spec.mtu or self.mtu)

    # -- start and end -----------------------------------------------------------------------

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise LabError("the lab makes namespaces and needs root", cure="Run it as root.")
        with self._stack as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def _start(self, stack: contextlib.ExitStack) -> None:
        registry.clean()
        stack.callback(registry.forget, self.id)
        self.remember()
        self.directory.mkdir(parents=True)
        stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        stack.enter_context(_terminated_is_exit())
        (self.directory / "logs").mkdir()
        self.shared_directory.mkdir()

        # All that is slow is started first and waited for last.
        pool = ThreadPoolExecutor(1, thread_name_prefix="lab-image")
        stack.callback(pool.shutdown)
        self._image = pool.submit(images.build)
        registry.make_mountpoints(MOUNTPOINTS)
        for host in self.hosts:
            host.prepare_disk()
            stack.callback(host.power_off)
            host.start_namespaces()
        for host in self.hosts:
            host.wait_namespaces()
            if host is self.ctl and self.rabbit is not None:
                stack.callback(self.rabbit.stop)
                self.rabbit.start()
            host.start_services()
        for host in self.computes:
            host.wait_services()
        self._image.result()
        if self.rabbit is not None:
            self.rabbit.wait_ready()
            private_file(self.directory / TRANSPORT_URL, self.transport_url + "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def remember(self) -> None:
        """Write down which processes are ours, for whoever has to clean up after a crash."""
        hosts = {h.name: registry.Process.of(h.init_pid) for h in self.hosts if h.init_pid}
        owner = registry.Process.of(os.getpid())
        registry.Entry(self.id, owner, str(self.directory), hosts, self._detached).save()


@contextlib.contextmanager
def _terminated_is_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does, through all ``with`` blocks.

    Only in the main thread, and only where the program has no handler of its own.
    """
    taken = []

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
