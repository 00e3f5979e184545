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

"""What a lab host sees of the file system and of the machine's devices."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
import sys
from pathlib import Path
from typing import Any

from nova_pmt.lab import libvirtd, paths

#: Private and on disk: what is in them outlives a power cut.
OWN = (
    *libvirtd.DIRECTORIES,
    *("/etc/nova_pmt", "/var/lib/nova_pmt", "/var/log/nova_pmt"),
    *("/etc/nova", "/var/lib/nova", "/etc/ssh"),
)
#: One directory that all hosts of the lab share, as if it were on NFS.
SHARED = "/srv/nova_pmt"
#: Must exist in the root namespace, so that there is something to mount on.
MOUNTPOINTS = (*OWN, SHARED)

#: Private and in memory: a power cut empties them.
_TMPFS = (("/run", "755"), ("/dev/shm", "1777"), ("/tmp", "1777"))
#: Clients are in ctl, and a protected guest acknowledges only after some 30 ms: room for what is on
#: the way until then.
_CLIENT_SYSCTLS = (
    ("net/ipv4/tcp_rmem", "4096 131072 16777216"),
    ("net/ipv4/tcp_wmem", "4096 65536 16777216"),
)
_DEVICES = (
    *("null", "zero", "full", "random", "urandom", "tty", "fuse", "userfaultfd"),
    *("net/tun", "vhost-net", "vhost-vsock"),
)


def on_disk(disk: Path, inside: str) -> Path | None:
    """Where ``inside`` lies below the host's directory ``disk``; None if it is not on disk."""
    if any(inside == own or inside.startswith(own + "/") for own in OWN):
        return disk / inside.lstrip("/")
    return None


def describe(name: str, disk: Path, shared: Path, *, compute: bool, kvm: bool) -> dict[str, Any]:
    """What :mod:`nova_pmt.lab.host_init` shall make of the host's file system.

    :param disk: the host's directory; has a file for each of :data:`OWN` and ``etc/hosts``.
    :param kvm: give it the machine's /dev/kvm.
    """
    binds = [(str(on_disk(disk, path)), path) for path in OWN]
    binds += [(str(disk / "etc/hosts"), "/etc/hosts"), (str(shared), SHARED)]
    directories: list[tuple[str, str, int, int]] = [("/run/lock", "1777", 0, 0)]
    if compute:
        qemu = pwd.getpwnam("libvirt-qemu")
        directories += [
            ("/run/nova_pmt", "755", 0, 0),
            (libvirtd.MONITORS, "700", qemu.pw_uid, qemu.pw_gid),
            (libvirtd.MEMORY_BACKING, "755", 0, 0),
        ]
    return {
        "name": name,
        "devices": _devices(kvm=kvm),
        "sysctls": () if compute else _CLIENT_SYSCTLS,
        "tmpfs": _TMPFS,
        "keep": _kept(),
        "binds": binds,
        "directories": directories,
    }


def _kept() -> list[str]:
    """What we run from, where a tmpfs would cover it: a checkout in /tmp."""
    needed = {paths.checkout(), paths.base_directory(), Path(sys.prefix), Path(sys.base_prefix)}
    covered = tuple(target + "/" for target, _ in _TMPFS)
    return sorted(str(path) for path in needed if path and str(path).startswith(covered))


def _devices(*, kvm: bool) -> list[tuple[str, int, int, int]]:
    """Device nodes of a host (name, mode, number, group), as far as this machine has them."""
    found = []
    for name in (*_DEVICES, "kvm") if kvm else _DEVICES:
        with contextlib.suppress(FileNotFoundError):
            node = os.stat(f"/dev/{name}")
            found.append((name, node.st_mode, node.st_rdev, node.st_gid))
    if kvm:  # as udev has it on a compute host
        name, mode, number, _ = found.pop()
        found.append((name, stat.S_IFMT(mode) | 0o660, number, grp.getgrnam("kvm").gr_gid))
    return found
