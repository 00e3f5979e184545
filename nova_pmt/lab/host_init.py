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

"""PID 1 of a lab host: makes the host's file system view, then reaps orphans for ever.

Not imported but run as a script, ``unshare ... python3 -I -S host_init.py CONFIG LIFELINE READY``:
it is the first process of new mount, network, uts, ipc and pid namespaces. CONFIG is JSON (see
``LabHost``), LIFELINE a pipe whose other end only the lab holds, READY a pipe to tell the result.

- Its death takes every process of the host with it at once: the kernel kills a pid namespace
  together with its first process. That is the lab's power cut.
- When the lab dies, even by SIGKILL, LIFELINE reports the end of file and the host ends. A parent
  death signal alone would not do: it is bound to the parent's *thread*.
- It must reap: QEMU daemonises, and a zombie looks alive to libvirt.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from typing import Any

MS_BIND, MS_REC, MNT_DETACH = 4096, 16384, 2


def mount(
    source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    """mount(2); the util-linux program would cost a process for each of the many mounts."""
    encoded = [None if a is None else os.fsencode(a) for a in (source, target, kind, data)]
    if ctypes.CDLL(None, use_errno=True).mount(
        encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]
    ):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {source} on {target}: {os.strerror(code)}")


def write_file(path: str, text: str) -> None:
    try:
        with open(path, "w") as f:
            f.write(text)
    except FileNotFoundError:
        pass  # a kernel without that feature


def private_dev(devices: list[tuple[str, int, int, int]]) -> None:
    """A small /dev of the host's own, with those ``devices`` ([name, mode, rdev, gid]) only.

    What a host shall not have (/dev/kvm) must really be absent: libvirt asks whether it exists,
    and one that exists and does not work makes it probe QEMU again and again.
    """
    mount("tmpfs", "/dev", "tmpfs", 0, "mode=755")
    for directory in ("net", "pts", "shm"):
        os.mkdir("/dev/" + directory)
    for name, mode, rdev, gid in devices:
        os.mknod("/dev/" + name, mode, rdev)
        os.chown("/dev/" + name, 0, gid)
        os.chmod("/dev/" + name, mode & 0o7777)
    mount("devpts", "/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=620,gid=5")
    os.symlink("pts/ptmx", "/dev/ptmx")
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink("/proc/self/fd" + target, "/dev/" + name)


def set_up(config: dict[str, Any]) -> None:
    """Make the host's private view; the root namespaces are not touched."""
    socket.sethostname(config["name"])
    for scope in ("all", "default"):
        # Router solicitations and MLD reports of every tap would be noise in packet tests.
        write_file(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
    for name, value in config["sysctls"]:
        write_file(f"/proc/sys/{name}", value)
    # Paths that must stay visible although a tmpfs is about to cover them (a checkout in /tmp).
    kept = [(os.open(path, os.O_PATH), path) for path in config["keep"]]
    binds = [(os.open(source, os.O_PATH), target) for source, target in config["binds"]]
    # With all that is mounted below it: libvirt would look for its cgroups there.
    ctypes.CDLL(None).umount2(b"/sys", MNT_DETACH)
    mount("sysfs", "/sys", "sysfs")  # this network namespace's /sys/class/net
    if os.path.isdir("/sys/fs/cgroup"):
        mount("tmpfs", "/sys/fs/cgroup", "tmpfs", 0, "mode=755")
    private_dev(config["devices"])
    for target, mode in config["tmpfs"]:
        mount("tmpfs", target, "tmpfs", 0, "mode=" + mode)
    for fd, target in kept:
        os.makedirs(target, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)
    for fd, target in binds:
        mount(f"/proc/self/fd/{fd}", target, None, MS_BIND)
    for fd, _ in kept + binds:
        os.close(fd)
    for path, mode, uid, gid in config["directories"]:
        os.makedirs(path, exist_ok=True)
        os.chmod(path, int(mode, 8))
        os.chown(path, uid, gid)


def reap_until_closed(lifeline: int) -> None:
    """Reap whatever is orphaned; return when the lab is gone."""
    woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poller = select.poll()
    poller.register(woken, select.POLLIN)
    poller.register(lifeline, select.POLLIN)
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        for fd, _ in poller.poll():
            if fd == lifeline:
                return
            os.read(woken, 512)


def main() -> None:
    lifeline, ready = int(sys.argv[2]), int(sys.argv[3])
    os.set_inheritable(lifeline, False)
    try:
        set_up(json.loads(sys.argv[1]))
    except Exception as e:  # noqa: BLE001 - whatever it is, the lab shall tell it
        os.write(ready, f"{type(e).__name__}: {e}".encode())
        sys.exit(1)
    os.chdir("/")
    os.write(ready, b"ready")
    os.close(ready)
    reap_until_closed(lifeline)


if __name__ == "__main__":
    main()
