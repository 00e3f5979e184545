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

"""A lab that outlives the command that started it: a daemon holds it until it gets SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from nova_pmt.exception import LabError, PmtError
from nova_pmt.lab import deployment, image, process, registry
from nova_pmt.lab.domain import BOOT, GuestSpec, domain_xml
from nova_pmt.lab.lab import TRANSPORT_URL, Lab
from nova_pmt.lab.lab_guest import CONTROL_PORT
from nova_pmt.lab.view import SHARED

#: Ready-made guests, with their addresses.
_GUESTS = {"guest1": "10.77.2.100", "guest2": "10.77.2.101", "guest3": "10.77.2.102"}


def start(lab: Lab) -> registry.Entry:
    """Bring ``lab`` up in a daemon and return what the registry knows of it.

    :raises LabError: it did not come up; then nothing of it is left.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _daemon(lab, writer)
    os.close(writer)
    os.waitpid(child, 0)  # it forks once more and is gone at once
    with open(reader) as answers:
        answer = json.loads(answers.read() or '{"error": "the daemon died", "cure": "Try again."}')
    if "error" in answer:
        raise LabError(answer["error"], cure=answer["cure"])
    return find(answer["id"])


def _daemon(lab: Lab, writer: int) -> NoReturn:
    """Never returns: an exception must not come out in a second copy of the caller."""
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        # Ctrl-C is for the terminal's programs, of which this is none any more.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with _answering(writer) as answer, lab:
            _leave_terminal(lab.directory / "logs" / "lab.log")
            _prepare_guests(lab)
            if lab.rabbit is not None:
                deployment.deploy(lab)
            answer({"id": lab.id})
            while True:
                signal.pause()  # SIGTERM ends it by an exception, see Lab
    except SystemExit:
        status = 0
    finally:
        os._exit(status)


@contextlib.contextmanager
def _answering(writer: int) -> Iterator[Callable[[dict[str, str]], None]]:
    """Yield a function that tells the waiting command the result; an error is told, too."""

    def answer(result: dict[str, str]) -> None:
        nonlocal writer
        if writer >= 0:
            os.write(writer, json.dumps(result).encode())
            os.close(writer)
            writer = -1

    try:
        yield answer
    except Exception as e:
        cure = e.cure if isinstance(e, PmtError) else "This is a bug: report it with the log."
        message = e.message if isinstance(e, PmtError) else f"{type(e).__name__}: {e}"
        answer({"error": message, "cure": cure})
        raise


def _leave_terminal(log: Path) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(out)


def _prepare_guests(lab: Lab) -> None:
    """Domain XML that ``virsh create`` takes, in the directory that all hosts share."""
    for host in lab.computes:
        image.install(lab.image(), host.disk_path(BOOT))
    directory = lab.shared_directory / "guests"
    directory.mkdir()
    for name, ip in _GUESTS.items():
        spec = lab.adapted(GuestSpec(name, ip=ip))
        (directory / f"{name}.xml").write_text(domain_xml(spec) + "\n")


def find(lab_id: str | None = None) -> registry.Entry:
    """The running lab ``lab_id``, or the only one that was started detached.

    :raises LabError: there is none, or more than one.
    """
    alive = [e for e in registry.entries() if e.alive()]
    found = [e for e in alive if (e.id == lab_id if lab_id else e.detached)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(e.id for e in alive) or "none"
    if found:
        raise LabError("more than one lab is up", cure=f"Name one with --lab: {known}.")
    raise LabError(
        f"no lab {lab_id} is up" if lab_id else "no lab is up",
        cure=f"Start one with 'nova-pmt-lab up' (labs that are up: {known}).",
    )


def stop(entry: registry.Entry, timeout: float = 60.0) -> None:
    """End a lab, in order if its owner still can, by force if not."""
    if not entry.owner.signal(signal.SIGTERM, timeout):
        entry.owner.signal(signal.SIGKILL, 5)
    entry.destroy()  # the owner has done this already, if all is well


def shell(entry: registry.Entry, host: str, command: Sequence[str]) -> NoReturn:
    """Replace this process by a shell, or by ``command``, inside ``host``."""
    init = entry.hosts.get(host)
    if init is None or not init.alive():
        known = ", ".join(entry.hosts)
        raise LabError(f"lab {entry.id} has no running host {host!r}", cure=f"It has {known}.")
    env = process.environment(
        {
            "NOVA_PMT_LAB": entry.id,
            "LIBVIRT_DEFAULT_URI": "qemu:///system",
            "PS1": f"\\[\\e[1;33m\\]lab {entry.id}\\[\\e[0m\\] {host}:\\w# ",
        }
    )
    if not command:
        rc = Path(entry.directory) / "shell.rc"
        hints = "".join(f"echo {shlex.quote(line)}\n" for line in _hints(entry, host))
        rc.write_text(f"PS1={shlex.quote(env['PS1'])}\n{hints}")
        command = ["bash", "--rcfile", str(rc), "-i"]
    argv = process.enter(init.pid, command)
    os.execvpe(argv[0], argv, env)


def _hints(entry: registry.Entry, host: str) -> Iterator[str]:
    yield f"You are on {host} of lab {entry.id}; leave with exit. Files: {entry.directory}"
    if host == "ctl":
        url = f"{entry.directory}/{TRANSPORT_URL}"
        yield f"Clients and RabbitMQ live here. Transport URL: {url}"
        yield "Guests answer on ports 7 (echo) and 7000 (control): nova-pmt-lab tell guest1 status"
    else:
        yield f"virsh create {SHARED}/guests/guest1.xml; virsh list; virsh destroy guest1"
        yield "Its console: tail -f /var/log/libvirt/qemu/guest1-console.log"
        yield "Certificates: /etc/nova_pmt/tls; networks: ip -br addr"


def tell(entry: registry.Entry, guest: str, command: Sequence[str], timeout: float = 120) -> str:
    """Send a command line to a guest's control server and return its answer.

    :param guest: name of a ready-made guest, or any guest's address.
    """
    address = _GUESTS.get(guest, guest)

    def ask() -> str:
        with socket.create_connection((address, CONTROL_PORT), timeout) as connection:
            connection.sendall(" ".join(command).encode() + b"\n")
            return connection.makefile().readline().strip()

    try:
        answer = process.in_network(entry.hosts["ctl"].pid, ask)
    except OSError as e:
        cure = "Is it running ('virsh list' on the hosts) and booted (its console)?"
        raise LabError(f"{guest} ({address}) does not answer: {e}", cure=cure) from e
    if not answer or answer.startswith("error"):
        raise LabError(f"{guest}: {answer or 'connection closed'}", cure="Send 'status' to try.")
    return answer


def usage(entry: registry.Entry) -> str:
    """What a person wants to know once the lab is up."""
    hosts = " ".join(name for name in entry.hosts if name != "ctl")
    return f"""\
Lab {entry.id} is up: ctl {hosts}

  nova-pmt-lab shell compute1     a shell on a host (without a name: ctl)
      virsh create {SHARED}/guests/guest1.xml
  nova-pmt-lab tell guest1 dirty 1500 20
  nova-pmt-lab status             what runs
  nova-pmt-lab down               end it; nothing is left

Logs, disks and the transport URL (mode 0600): {entry.directory}
"""


def status() -> list[dict[str, object]]:
    """All labs on this machine, as plain data."""
    return [
        {
            "id": entry.id,
            "state": "up" if entry.alive() else "dead",
            "detached": entry.detached,
            "owner": entry.owner.pid,
            "directory": entry.directory,
            "hosts": {n: p.pid if p.alive() else None for n, p in entry.hosts.items()},
        }
        for entry in registry.entries()
    ]
