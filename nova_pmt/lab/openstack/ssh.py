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
"""SSH between compute hosts: Nova resizes and migrates servers that are off through it.

Keys are the lab's own and go with it; all of it is in the hosts' private ``/etc/ssh``.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from nova_pmt.lab.host import LabHost
from nova_pmt.lab.openstack.control import wait_for
from nova_pmt.lab.rabbit import private_file

_PORT = 22
_DIRECTORY = "/etc/ssh"
_CLIENT = f"""\
Host *
    BatchMode yes
    IdentityFile {_DIRECTORY}/client
    GlobalKnownHostsFile {_DIRECTORY}/known_hosts
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""
_SERVER = """\
ListenAddress {address}
HostKey {directory}/host
AuthorizedKeysFile {directory}/client.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""


def configure(hosts: Iterable[LabHost]) -> None:
    """Write keys and configuration; each of the hosts trusts the others."""
    with tempfile.TemporaryDirectory() as directory:
        keys = {}
        for name in ("client", "host"):
            path = Path(directory) / name
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)],
                check=True,
            )
            keys[name] = path.read_text()
            keys[f"{name}.pub"] = path.with_suffix(".pub").read_text()
    for host in hosts:
        server = _SERVER.format(address=host.mgmt_ip, directory=_DIRECTORY)
        files = {
            **keys,
            "known_hosts": f"* {keys['host.pub']}",
            "ssh_config": _CLIENT,
            "sshd_config": server,
        }
        for name, text in files.items():
            private_file(host.disk_path(f"{_DIRECTORY}/{name}"), text)


def start(host: LabHost) -> None:
    """Start its server.

    :raises LabError: it ended, or does not listen.
    """
    host.path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    server = host.spawn("sshd", ["/usr/sbin/sshd", "-D", "-e"])
    wait_for(lambda: _listens(host), f"sshd on {host.name}", server.alive)


def _listens(host: LabHost) -> bool:
    try:
        host.dial(host.mgmt_ip, _PORT, timeout=1.0).close()
    except OSError:
        return False
    return True
