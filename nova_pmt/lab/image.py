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

"""The lab's guest: Debian's cloud kernel, our workload its only process; built once, then cached.

A build is a directory ``image/SOURCES-KERNEL`` with ``vmlinuz`` and ``initrd.img``: SOURCES is a
hash of what goes in from here, KERNEL the package. It appears by one rename or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nova_pmt.exception import LabError
from nova_pmt.lab import paths

_SOURCES = Path(__file__).with_name("guest")
_META_PACKAGE = "linux-image-cloud-amd64"
#: In this order, since nothing in the guest resolves dependencies.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
)
#: Only for guests with such disks: loading them takes time.
_SCSI_MODULES = ("scsi_common", "scsi_mod", "virtio_scsi", "sd_mod")
_COMPILER = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-s", "-pthread")
_RECIPE = 1  # increase when this file makes something else of the same sources
_CURE = "Install what bindep.txt lists (gcc, apt with Debian's archive), try again."


@dataclass(frozen=True)
class Image:
    """Files to boot the guest from."""

    kernel: Path
    initrd: Path


def build(cache: Path | None = None, *, refresh: bool = False) -> Image:
    """The guest image, from the cache or newly built (about 8 s).

    :param cache: directory; by default ``build/lab/image`` of the checkout.
    :param refresh: ask apt for a newer kernel even if an image is there.
    :raises LabError: a tool or package is missing, or the compiler failed.
    """
    cache = cache or paths.image_cache()
    cache.mkdir(parents=True, exist_ok=True)
    sources = _sources_hash()
    with _lock(cache / ".lock"):
        found = None if refresh else _newest(cache, sources)
        if found is None:
            kernel = _kernel_package(cache)
            found = cache / f"{sources}-{kernel.name.removeprefix('kernel-')}"
            if not found.exists():
                with _atomic_directory(found) as directory:
                    _assemble(directory, kernel)
        return Image(found / "vmlinuz", found / "initrd.img")


def _newest(cache: Path, sources: str) -> Path | None:
    images = sorted(cache.glob(f"{sources}-*"), key=lambda p: p.stat().st_mtime)
    return images[-1] if images else None


def _sources_hash() -> str:
    digest = hashlib.sha256(repr((_RECIPE, _MODULES, _SCSI_MODULES, _COMPILER)).encode())
    for source in sorted(p for p in _SOURCES.iterdir() if p.is_file()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two labs may start at once; the second waits and then finds the image."""
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _atomic_directory(target: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run(argv: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as e:
        raise LabError(f"{argv[0]}: {e.strerror}", cure=_CURE) from e
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()[-2000:]}", cure=_CURE)
    return done.stdout


def _kernel_package(cache: Path) -> Path:
    """Directory ``kernel-NAME`` with the unpacked kernel package."""
    depends = _run(["apt-cache", "depends", _META_PACKAGE])
    names = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line]
    if not names:
        raise LabError(f"apt knows no {_META_PACKAGE}", cure="Run 'apt-get update', try again.")
    target = cache / f"kernel-{names[0]}"
    if not target.exists():
        with _atomic_directory(target) as directory:
            # apt would drop to user _apt, who may not write here.
            options = ["-q", "-o", "APT::Sandbox::User=root"]
            _run(["apt-get", *options, "download", names[0]], directory)
            (package,) = directory.glob("*.deb")
            _run(["dpkg", "-x", str(package), "."], directory)
            package.unlink()
    return target


def _assemble(directory: Path, kernel: Path) -> None:
    (vmlinuz,) = (kernel / "boot").glob("vmlinuz-*")
    shutil.copyfile(vmlinuz, directory / "vmlinuz")
    program = directory / "init"
    _run([*_COMPILER, "-o", str(program), *map(str, sorted(_SOURCES.glob("*.c")))])

    archive = _Archive()
    for name in ("dev", "proc", "sys", "modules"):
        archive.directory(name)
    # The kernel opens it for init before anything is mounted.
    archive.device("dev/console", 5, 1)
    archive.file("init", program.read_bytes(), 0o755)
    for order, modules in (("order", _MODULES), ("order.scsi", _SCSI_MODULES)):
        present = []
        for module in modules:  # what the kernel has built in has no file
            for path in (kernel / "lib/modules").rglob(f"{module}.ko"):
                archive.file(f"modules/{module}.ko", path.read_bytes(), 0o644)
                present.append(module)
        archive.file(f"modules/{order}", "\n".join(present).encode() + b"\n", 0o644)
    # Not compressed: under TCG unpacking costs more than reading.
    (directory / "initrd.img").write_bytes(archive.finish())
    program.unlink()


class _Archive:
    """A cpio archive in the kernel's "newc" format; the same input makes the same bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def _entry(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (
            self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, device[0], device[1], len(encoded), 0,
        )  # fmt: skip
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts.append(_padded(header + encoded) + _padded(data))

    def directory(self, name: str) -> None:
        self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int) -> None:
        self._entry(name, stat.S_IFREG | mode, data)

    def device(self, name: str, major: int, minor: int) -> None:
        self._entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def install(image: Image, directory: Path) -> None:
    """Copy the image into a host's ``directory``.

    A copy per host: libvirt changes the owner of what it boots from, and two libvirtds that do
    so to one file fight over it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for source in (image.kernel, image.initrd):
        target = directory / source.name
        if not target.exists():
            temporary = target.with_suffix(".new")
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
