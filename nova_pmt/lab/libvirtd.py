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

"""A lab host's own libvirtd: its configuration, its start, its connection URI."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from nova_pmt.exception import LabError

if TYPE_CHECKING:
    from nova_pmt.lab.process import LabProcess

SOCKET = "/run/libvirt/libvirt-sock"

#: Directories libvirt has compiled in, private to each host. Two libvirtds would share them else.
DIRECTORIES = ("/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt")

#: File-backed guest memory: on a tmpfs of the host, so that a power cut frees it.
MEMORY_BACKING = "/dev/shm/libvirt"

#: Sockets of the guests' second QMP monitors: QEMU's user makes them, only root comes in besides.
MONITORS = "/run/nova_pmt/qmp"

_DAEMON = """\
host_uuid = "{uuid}"
unix_sock_rw_perms = "0700"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_level = 3
log_outputs = "3:stderr"
"""

# User libvirt-qemu, seccomp and dynamic ownership stay as the distribution has them: a lab that
# is laxer than a real compute host would prove nothing.
_QEMU = """\
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
memory_backing_dir = "{memory}"
max_core = 0
"""


def host_uuid(lab_id: str, host: str) -> str:
    """The host's own UUID: it survives power cuts and differs between labs."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{host}.{lab_id}.nova-pmt-lab.invalid"))


def configure(disk: Path, lab_id: str, host: str) -> None:
    """Write the configuration below ``disk``, where the host's directories lie."""
    directory = disk / "etc/libvirt"
    (directory / "qemu").mkdir(parents=True, exist_ok=True)
    text = _DAEMON.format(uuid=host_uuid(lab_id, host))
    (directory / "libvirtd.conf").write_text(text)
    (directory / "qemu.conf").write_text(_QEMU.format(memory=MEMORY_BACKING))


def forget_owners(disk: Path) -> None:
    """Do what a reboot of the host does to libvirt's notes about who owned a file.

    libvirt keeps them in extended attributes and drops those from before the machine's boot. For
    it a lab host never boots anew, and after a power cut it would find its files "in use".
    """
    for file in disk.rglob("*"):
        if file.is_symlink():
            continue
        for name in os.listxattr(file):
            if name.startswith("trusted.libvirt.security."):
                os.removexattr(file, name)


def uri(pid: int) -> str:
    """Connection URI for processes of the root namespace; ``pid`` is the host's PID 1."""
    return f"qemu+unix:///system?socket=/proc/{pid}/root{SOCKET}"


def wait_ready(process: LabProcess, pid: int, timeout: float = 120.0) -> None:
    """Return once libvirtd answers.

    :raises LabError: it ended, or does not answer within ``timeout`` seconds.
    """
    import libvirt  # needs the C library: only where it is used

    deadline = time.monotonic() + timeout
    while process.alive() and time.monotonic() < deadline:
        # By hand first: libvirt prints a refused connection whether it is caught or not.
        with socket.socket(socket.AF_UNIX) as probe:
            listens = probe.connect_ex(f"/proc/{pid}/root{SOCKET}") == 0
        if listens:
            # Answered only after the drivers are initialised.
            libvirt.open(uri(pid)).close()
            return
        time.sleep(0.01)
    raise LabError(f"{process.name} is not ready: {process.tail()}", cure=f"See {process.log}")
