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

"""Debian's own kernel with Python on it: a bare guest for what this machine's kernel lacks.

No libvirt, no disk, no network: a kernel, some of its modules, this interpreter with the modules of
one program, and programs such as ``tc``. The guest runs the Python program, whose lines of JSON on
its standard output come out here::

    image = build("tests.functional.plug_inside", modules=("sch_plug", "ifb"), programs=("tc",))
    lines, console = run(image, timeout_s=120)

Everything lies in the guest where it lies here, so that the interpreter finds what belongs to it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import marshal
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from nova_pmt.exception import LabError
from nova_pmt.lab import image as lab_image
from nova_pmt.lab import paths
from nova_pmt.lab.image import Image

_RECIPE = 3  # increase when this file makes something else of the same files
_KEPT = 2
_CURE = "Install what bindep.txt lists (qemu, busybox-static, iproute2), try again."
_BUSYBOX = Path("/usr/bin/busybox")
#: Backtraces are shown, and the guest ends when one of its CPUs makes no progress for 20 s.
_WATCHFUL = (
    "loglevel=5 panic=-1 softlockup_panic=1 softlockup_all_cpu_backtrace=1 "
    "sysctl.kernel.panic_on_rcu_stall=1"
)
_ENDED = "program ended: "
#: What the kernel's complaints begin with; of the console an error shows what follows the first.
_COMPLAINT = re.compile(r"BUG: |\[#1\]|rcu: INFO: |INFO: task |Kernel panic ")
_SHOWN = 12_000

#: Prints what an interpreter has loaded when it has imported the program, and the directories of
#: packages whose __init__ was left out.
_LIST = """\
import importlib, importlib.util, json, runpy, sys
program, *bare = sys.argv[1:]
for name in bare:
    spec = importlib.util.find_spec(name)
    sys.modules[name] = importlib.util.module_from_spec(spec)
importlib.import_module(program)
files = {getattr(m, "__file__", None) or "" for m in list(sys.modules.values())}
directories = [sys.modules[name].__path__[0] for name in bare]
json.dump([sorted(f for f in files if f.startswith("/")), directories], sys.stdout)
"""

_INIT = """\
#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mkdir -p /tmp
for module in {modules}; do $bb insmod /modules/$module.ko || echo "insmod $module failed"; done
export PATH=/usr/sbin:/sbin:/usr/bin:/bin HOME=/tmp PYTHONPATH={pythonpath}
$bb stty -F /dev/ttyS1 raw
{python} -S -B -m {program} </dev/null >/dev/ttyS1
echo "{ended}$?"
$bb reboot -f
"""


def build(
    program: str,
    *,
    modules: Sequence[str],
    programs: Sequence[str] = (),
    bare: Sequence[str] = (),
    cache: Path | None = None,
) -> Image:
    """The image that runs ``program``, from the cache or newly built (about 5 s).

    :param program: a Python module, run as ``python -m``; must import all that it will need.
    :param modules: kernel modules, loaded in this order, each after what it depends on.
    :param programs: commands to have in the guest, with their libraries.
    :param bare: Python packages that are there with an empty ``__init__``, because theirs imports
        far more than the program uses (the emulated machine takes seconds for what is ms here).
    :param cache: by default ``build/lab/kernel-guest`` of the checkout.
    :raises LabError: a tool, package or module is missing.
    """
    cache = cache or paths.base_directory() / "kernel-guest"
    cache.mkdir(parents=True, exist_ok=True)
    kernel = _kernel()
    files = _files(kernel, program, modules, programs, bare)
    digest = hashlib.sha256(f"{_RECIPE} {kernel.name} {sys.version}".encode())
    for name, data in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    with lab_image._lock(cache / ".lock"):
        target = cache / f"{program}-{digest.hexdigest()[:12]}"
        if not target.exists():
            with lab_image._atomic_directory(target) as directory:
                (vmlinuz,) = (kernel / "boot").glob("vmlinuz-*")
                shutil.copyfile(vmlinuz, directory / "vmlinuz")
                (directory / "initrd.img").write_bytes(_archive(files))
        os.utime(target)
        others = sorted(cache.glob(f"{program}-*"), key=lambda path: path.stat().st_mtime)
        for old in others[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return Image(target / "vmlinuz", target / "initrd.img")


def run(
    image: Image, *, timeout_s: float, memory_mib: int = 512, vcpus: int = 2
) -> tuple[list[dict[str, Any]], str]:
    """Boot it, wait until it is off again.

    :returns: the program's JSON lines, and the console's text (the kernel's, and the program's
        standard error).
    :raises LabError: QEMU did not start, the guest was not done in time, or its kernel gave up.
    """
    argv = ["qemu-system-x86_64", "-machine", "q35"]
    # One thread for all vCPUs. With one for each, QEMU before 8.1 may go on with what it made of an
    # instruction that another vCPU has changed (its commit deba78709ae8 is the cure): when a kernel
    # turned a static key while packets came in, a vCPU met the breakpoint that was long gone again
    # and again. Nothing that is tested here needs two vCPUs at the very same time.
    argv += ["-accel", "tcg,thread=single"]
    argv += ["-smp", str(vcpus), "-m", str(memory_mib), "-nodefaults", "-no-reboot"]
    argv += ["-display", "none", "-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    # Mitigations cost time here and protect nobody from anything; so does a clock other than TSC.
    kernel = f"console=ttyS0 {_WATCHFUL} mitigations=off tsc=reliable clocksource=tsc"
    argv += ["-append", f"{kernel} rdinit=/init"]
    # The console goes to standard error: kernel messages do not mix with the program's lines.
    argv += ["-chardev", "file,id=console,path=/dev/stderr", "-serial", "chardev:console"]
    argv += ["-chardev", "file,id=results,path=/dev/stdout", "-serial", "chardev:results"]
    why = ""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except OSError as error:
        raise LabError(f"{argv[0]}: {error.strerror}", cure=_CURE) from error
    except subprocess.TimeoutExpired as error:
        done = subprocess.CompletedProcess(argv, 0, error.stdout or b"", error.stderr or b"")
        why = f"was not done after {timeout_s:.0f} s"
    console = done.stderr.decode(errors="replace").replace("\r", "")
    if done.returncode:
        why = "QEMU failed"
    elif not why and _ENDED not in console:
        why = "ended before its program did"
    if why:
        text = done.stdout.decode(errors="replace")[-2000:]
        raise LabError(f"bare guest: {why}; results: {text}; console: {_telling(console)}")
    lines = []
    for line in done.stdout.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            console += f"\nnot JSON: {line!r}"
    return lines, console


def _telling(console: str) -> str:
    """The part of the console's text that tells most: from the kernel's first complaint on."""
    found = _COMPLAINT.search(console)
    if found is None:
        return console[-_SHOWN:]
    start = console.rfind("\n", 0, found.start()) + 1
    return console[start : start + _SHOWN]


def _kernel() -> Path:
    cache = paths.image_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with lab_image._lock(cache / ".lock"):
        found = sorted(cache.glob("kernel-*"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else lab_image._kernel_package(cache)


def _files(
    kernel: Path,
    program: str,
    modules: Sequence[str],
    programs: Sequence[str],
    bare: Sequence[str],
) -> dict[str, bytes]:
    """Everything in the guest: absolute path to content; programs are what lies in a bin."""
    checkout = paths.checkout()
    if checkout is None or not _BUSYBOX.exists():
        missing = "a source checkout" if checkout is None else "busybox-static"
        raise LabError(f"bare guests need {missing}", cure=_CURE)
    site = [path for path in sys.path if path.endswith("-packages")]
    search = ":".join([str(checkout), *site])
    python = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    loaded, bare_directories = _loaded(python, search, program, bare)
    binaries = [python, *(_which(name) for name in programs)]
    files = {path: Path(path).read_bytes() for path in (*loaded, *binaries)}
    native = [path for path in (*loaded, *binaries) if files[path].startswith(b"\x7fELF")]
    files.update((path, Path(path).read_bytes()) for path in _libraries(native))
    empty = [f"{directory}/__init__.py" for directory in bare_directories]
    files.update((path, b"") for path in empty)
    for path in loaded:
        if path.endswith(".py") and path not in empty:
            files[importlib.util.cache_from_source(path)] = _compiled(path)
    order = _with_dependencies(kernel, modules)
    files.update((f"/modules/{path.stem}.ko", path.read_bytes()) for path in order)
    files["/bin/busybox"] = _BUSYBOX.read_bytes()
    files["/init"] = _INIT.format(
        modules=" ".join(path.stem for path in order),
        pythonpath=search,
        python=python,
        program=program,
        ended=_ENDED,
    ).encode()
    return files


def _which(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise LabError(f"no program {name}", cure=_CURE)
    return found


def _loaded(
    python: str, search: str, program: str, bare: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The files of all that the program imports, and the directories of ``bare`` packages.

    The interpreter is started as it will be in the guest.
    """
    done = subprocess.run(
        [python, "-S", "-B", "-c", _LIST, program, *bare],
        env={"PYTHONPATH": search, "PATH": os.environ.get("PATH", "")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LabError(f"{program} cannot be imported: {done.stderr.strip()[-2000:]}")
    loaded, empty = json.loads(done.stdout)
    # By os.py an interpreter knows its library; runpy is what "-m" is.
    library = sysconfig.get_path("stdlib")
    return sorted({*loaded, f"{library}/os.py", f"{library}/runpy.py"}), empty


def _compiled(path: str) -> bytes:
    """Byte code that is taken without a look at the source (PEP 552): the guest is slow."""
    code = SourceFileLoader("module", path).get_code("module")
    source = Path(path).read_bytes()
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")
    return header + importlib.util.source_hash(source) + marshal.dumps(code)


def _libraries(binaries: Iterable[str]) -> list[str]:
    """Shared libraries, and the loader, that ldd(1) names."""
    done = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False)
    return sorted(set(re.findall(r"(/\S+) \(0x", done.stdout)))


def _with_dependencies(kernel: Path, modules: Sequence[str]) -> list[Path]:
    """Module files in the order of loading; what the kernel has built in has none."""
    files = {path.stem.replace("-", "_"): path for path in (kernel / "lib/modules").rglob("*.ko")}

    def walk(name: str) -> Iterator[Path]:
        path = files.get(name.replace("-", "_"))
        if path is None:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in found[1].decode().split(",") if found else ():
            yield from walk(other)
        yield path

    order: dict[Path, None] = {}
    for module in modules:
        order.update(dict.fromkeys(walk(module)))
    return list(order)


def _archive(files: dict[str, bytes]) -> bytes:
    archive = lab_image._Archive()
    directories = {"dev", "proc", "sys", "tmp"}
    for path in files:
        directories.update(str(parent)[1:] for parent in Path(path).parents if parent.name)
    for directory in sorted(directories):
        archive.directory(directory)
    archive.device("dev/console", 5, 1)
    for path, data in sorted(files.items()):
        runs = data.startswith((b"\x7fELF", b"#!"))
        archive.file(path[1:], data, 0o755 if runs else 0o644)
    return archive.finish()
