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
import os
import subprocess

from nova_pmt.lab.image import Image

TIMEOUT = 20.0


@functools.cache
def usable(image: Image) -> bool:
    """Boot the lab's guest under KVM once and see whether its workload says READY.

    Some machines have a /dev/kvm of a paravirtual kind on which stock kernels stop early ("Probing
    EDD"). The answer is kept for this process; a failing probe costs up to 20 s.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    argv = ["qemu-system-x86_64", "-machine", "q35", "-accel", "kvm", "-m", "128", "-nodefaults"]
    argv += ["-display", "none", "-no-reboot", "-kernel", str(image.kernel)]
    argv += ["-initrd", str(image.initrd), "-append", "console=ttyS0 quiet panic=-1"]
    argv += ["-serial", "stdio"]
    try:
        process = subprocess.Popen(
            ["timeout", "-s", "KILL", str(TIMEOUT), *argv],
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
