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

"""Whether KVM really runs guests here. That /dev/kvm exists proves nothing."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from nova_pmt.lab import paths
from nova_pmt.lab.image import Image

TIMEOUT = 20.0


@functools.cache
def usable(image: Image) -> bool:
    """Boot the lab's guest under KVM and see whether its workload says READY.

    Some machines have a /dev/kvm of a paravirtual kind on which stock kernels stop early ("Probing
    EDD"). A failing probe costs up to 20 s, so the answer is kept until the machine boots anew.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    key = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + f" {image.kernel}"
    note = paths.base_directory() / "kvm.json"
    try:
        known = json.loads(note.read_text())
        return bool(known[key])
    except (OSError, ValueError, KeyError):
        pass
    answer = boots(["-accel", "kvm"], image)
    note.write_text(json.dumps({key: answer}) + "\n")
    return answer


def boots(options: Sequence[str], image: Image, timeout: float = TIMEOUT) -> bool:
    """Whether QEMU with ``options`` brings the guest up to its READY within ``timeout`` seconds."""
    argv = ["qemu-system-x86_64", "-machine", "q35", *options, "-m", "128", "-nodefaults"]
    argv += ["-display", "none", "-no-reboot", "-kernel", str(image.kernel)]
    argv += ["-initrd", str(image.initrd), "-append", "console=ttyS0 quiet", "-serial", "stdio"]
    try:
        process = subprocess.Popen(
            ["timeout", "-s", "KILL", str(timeout), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return False
    with process:
        assert process.stdout is not None
        try:
            return any(line.startswith(b"READY boot=") for line in process.stdout)
        finally:
            process.terminate()  # timeout(1) hands it on to QEMU
