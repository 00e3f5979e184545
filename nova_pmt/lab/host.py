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

"""One host of the lab: its namespaces, its processes, its power switch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nova_pmt.exception import LabError
from nova_pmt.lab import image, lab_guest, libvirtd, network, process, view
from nova_pmt.lab.domain import BOOT, CONSOLES, GuestSpec
from nova_pmt.lab.lab_guest import LabGuest
from nova_pmt.lab.process import LabProcess

if TYPE_CHECKING:
    from nova_pmt.lab.lab import Lab

T = TypeVar("T")

SHARED = view.SHARED
_INIT = Path(__file__).with_name("host_init.py")


class LabHost:
    """A compute host, or ``ctl`` (index 0: bridges, RabbitMQ, clients; no libvirtd).

    ``disk`` is the host's directory in the root namespace; ``init_pid`` its PID 1 as seen there.
    """

    def __init__(self, lab: Lab, name: str, index: int) -> None:
        self.lab = lab
        self.name = name
        self.index = index
        self.mgmt_ip = network.MGMT.address(index)
        self.repl_ip = network.REPL.address(index)
        self.disk = lab.directory / name
        self.log_directory = lab.directory / "logs"
        self.processes: dict[str, LabProcess] = {}
        self.init_pid = 0
        self._unshare: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._ready = -1

    def __repr__(self) -> str:
        return f"<LabHost {self.name}{'' if self.powered else ' (off)'}>"

    # -- power -------------------------------------------------------------------------------

    @property
    def powered(self) -> bool:
        """Whether its PID 1 runs."""
        return self._unshare is not None and self._unshare.poll() is None

    def power_on(self) -> None:
        """Start the host again after :meth:`power_off`, up to a libvirtd that answers.

        Its disk is as it was, its memory is not. Nothing else is started.
        """
        if self.powered:
            return
        if not self.index:
            raise LabError("ctl cannot come back: its networks are gone", cure="Start a new lab.")
        libvirtd.forget_owners(self.disk)
        self.start_namespaces()
        self.wait_namespaces()
        self.start_services()
        self.wait_services()

    def power_off(self, *, silent: bool = False, timeout: float = 30.0) -> None:
        """Pull the power plug: SIGKILL to PID 1; returns when all its processes are gone.

        :param silent: cut the network first. The kernel closes the connections of killed
            processes, so peers learn of the death at once; after a real power cut they hear
            nothing, and neither do they with ``silent``.
        """
        if self._unshare is None:
            return
        if silent and self.index and self.powered and self.lab.ctl.powered:
            for net in network.NETWORKS:
                self.link(net.name).down()
        if self.init_pid and self._unshare.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init_pid, signal.SIGKILL)
        elif self._unshare.poll() is None:
            self._unshare.kill()  # and its child with it (--kill-child)
        for running in self.processes.values():
            running.kill()
        self.processes.clear()
        try:
            # PID 1 is reaped only after the last process of its namespace.
            self._unshare.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self!r}: processes are left {timeout:g} s after SIGKILL") from None
        finally:
            self._close("_lifeline")
            self._close("_ready")
            self._unshare, self.init_pid = None, 0
        if self.index and self.lab.ctl.powered:
            network.disconnect(self.lab.ctl.init_pid, self.index)
        self.lab.remember()

    def freeze(self) -> None:
        """SIGSTOP to all processes but PID 1, until :meth:`thaw`: the host stands still.

        Its kernel does not: connections stay, packets that have left QEMU go on.
        """
        stopped: set[int] = set()
        while (
            new := self._pids() - stopped
        ):  # whoever was just being started is found the next time
            self._signal(new, signal.SIGSTOP)
            stopped |= new

    def thaw(self) -> None:
        """SIGCONT to all of them."""
        self._signal(self._pids(), signal.SIGCONT)
        for running in self.processes.values():
            running.go_on()

    def _pids(self) -> set[int]:
        namespace = os.readlink(f"/proc/{self._init()}/ns/pid")
        found = set()
        for link in Path("/proc").glob("[0-9]*/ns/pid"):
            with contextlib.suppress(OSError):
                if os.readlink(link) == namespace:
                    found.add(int(link.parts[2]))
        return found - {self.init_pid}

    @staticmethod
    def _signal(pids: Iterable[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _close(self, pipe: str) -> None:
        if getattr(self, pipe) >= 0:
            os.close(getattr(self, pipe))
            setattr(self, pipe, -1)

    # -- start, in steps, so that the lab can start all hosts at once -----------------------------

    def prepare_disk(self) -> None:
        """Make the host's directories; once in its life."""
        for path in (*view.OWN, CONSOLES):
            self.disk_path(path).mkdir(parents=True, exist_ok=True)
        hosts = "".join(f"{h.mgmt_ip} {h.name}\n" for h in self.lab.hosts)
        (self.disk / "etc/hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        if self.index:
            libvirtd.configure(self.disk, self.lab.id, self.name)
        tls = self.lab.authority.issue(self.name, (self.mgmt_ip, self.repl_ip))
        self.lab.authority.install(self.disk_path("/etc/nova_pmt/tls"), tls)

    def start_namespaces(self) -> None:
        """Start PID 1 in its namespaces; :meth:`wait_namespaces` waits for it."""
        lifeline, self._lifeline = os.pipe2(os.O_CLOEXEC)
        self._ready, ready = os.pipe2(os.O_CLOEXEC)
        argv = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        argv += ["--mount-proc", sys.executable, "-I", "-S", str(_INIT)]
        sight = view.describe(
            self.name,
            self.disk,
            self.lab.shared_directory,
            compute=self.index > 0,
            kvm=self.lab.offers_kvm(),
        )
        argv += [json.dumps(sight), str(lifeline), str(ready)]
        with open(self.log_directory / f"{self.name}-init.log", "ab") as log:
            self._unshare = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lifeline, ready),
                start_new_session=True,  # Ctrl-C is for the lab, which ends the hosts in order
            )
        os.close(lifeline)
        os.close(ready)

    def wait_namespaces(self, timeout: float = 20.0) -> None:
        """Wait for PID 1 and plug the host into the networks."""
        assert self._unshare is not None
        answer = b""
        if select.select([self._ready], [], [], timeout)[0]:
            answer = os.read(self._ready, 4096)
        self._close("_ready")
        if answer != b"ready":
            reason = answer.decode() or f"see {self.log_directory}/{self.name}-init.log"
            raise LabError(
                f"{self.name}: namespaces could not be made: {reason}",
                cure="The lab needs root with CAP_SYS_ADMIN, util-linux and iproute2.",
            )
        self.init_pid = process.only_child(self._unshare.pid)
        if self.index:
            network.connect(self.lab.ctl.init_pid, self.init_pid, self.index, self.lab.mtu)
        else:
            network.create_bridges(self.init_pid, self.lab.mtu)
        self.lab.remember()

    def start_services(self) -> None:
        """Start libvirtd; :meth:`wait_services` waits for it."""
        if self.index:
            self.spawn("libvirtd", ["/usr/sbin/libvirtd"])

    def wait_services(self) -> None:
        """Wait until libvirtd answers."""
        if self.index:
            libvirtd.wait_ready(self.processes["libvirtd"], self.init_pid)

    # -- running things ----------------------------------------------------------------------

    def run(
        self, argv: Sequence[str], *, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the host to its end; see :func:`nova_pmt.lab.process.run`."""
        return process.run(self._init(), argv, check=check, **options)

    def spawn(
        self, tag: str, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> LabProcess:
        """Start a long-running process inside the host.

        Its output goes to ``logs/HOST-TAG.log`` of the lab's directory. It ends with the host.
        """
        old = self.processes.get(tag)
        if old is not None and old.alive():
            raise LabError(f"{self!r}: {tag} runs already (pid {old.pid})")
        log = self.log_directory / f"{self.name}-{tag}.log"
        name = f"{tag} on {self.name}"
        self.processes[tag] = process.spawn(self._init(), name, argv, log, env)
        return self.processes[tag]

    def in_network(self, function: Callable[[], T]) -> T:
        """Call ``function`` in this host's network namespace; the sockets it opens stay there."""
        return process.in_network(self._init(), function)

    def dial(self, address: str, port: int, timeout: float | None = 30.0) -> socket.socket:
        """A TCP connection that starts in this host."""
        return self.in_network(lambda: socket.create_connection((address, port), timeout))

    def _init(self) -> int:
        if not self.powered:
            raise LabError(f"{self!r} has no power", cure="power_on() it first.")
        return self.init_pid

    # -- what it has -------------------------------------------------------------------------

    def commands(self) -> dict[int, list[str]]:
        """Command lines of its processes but PID 1, by their ids in the root namespace."""
        found = {}
        for pid in self._pids():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                found[pid] = line.rstrip("\0").split("\0")
        return found

    def path(self, inside: str | os.PathLike[str]) -> Path:
        """Path by which the root namespace sees ``inside`` of the running host."""
        return Path(f"/proc/{self._init()}/root{os.fspath(inside)}")

    def disk_path(self, inside: str) -> Path:
        """As :meth:`path`, but what is on the host's disk is found without power, too."""
        return view.on_disk(self.disk, inside) or self.path(inside)

    def outside_pid(self, inside: int) -> int:
        """The process id, as the root namespace sees it, of a process of this host."""
        namespace = os.readlink(f"/proc/{self._init()}/ns/pid")
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                numbers = _field(status, "NSpid:")
                here = os.readlink(status.parent / "ns/pid") == namespace
                if here and numbers[-1] == str(inside):
                    return int(numbers[0])
        raise LabError(f"{self!r} has no process {inside}")

    def link(self, name: str) -> network.Link:
        """The host's cable to network ``mgmt``, ``repl`` or ``data``."""
        for net in network.NETWORKS:
            if net.name == name:
                return network.Link(net, self.index, self.lab.ctl.init_pid, self._init())
        raise LabError(f"no network {name!r}", cure="Networks are mgmt, repl and data.")

    @property
    def libvirt_uri(self) -> str:
        """Connection URI for the root namespace."""
        return libvirtd.uri(self._init())

    @property
    def libvirt_uri_inside(self) -> str:
        """Connection URI for processes of this host."""
        return "qemu:///system"

    @contextlib.contextmanager
    def libvirt(self) -> Iterator[Any]:
        """A libvirt connection (``virConnect``) to this host, closed at the end."""
        import libvirt

        connection = libvirt.open(self.libvirt_uri)
        try:
            yield connection
        finally:
            connection.close()

    def boot(self, spec: GuestSpec) -> LabGuest:
        """Start a guest here; ``wait_ready()`` of the result waits for its workload."""
        for host in self.lab.computes:  # a standby on another host needs the same files
            image.install(self.lab.image(), host.disk_path(BOOT))
        return lab_guest.boot(self, self.lab.adapted(spec))

    def guests(self) -> list[str]:
        """Names of the running domains."""
        with self.libvirt() as connection:
            return [domain.name() for domain in connection.listAllDomains(1)]


def _field(status: Path, name: str) -> list[str]:
    for line in status.read_text().splitlines():
        if line.startswith(name):
            return line.split()[1:]
    return []
