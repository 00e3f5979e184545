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

"""A paused guest's disk images, against what its clients were answered, and by themselves."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from nova_pmt.exception import LabError
from nova_pmt.lab import LabGuest, transactions
from nova_pmt.lab.transactions import Exchange

T = TypeVar("T")

_CHECK_S = 60
#: Checkpoints take most of a busy machine's time: to hit the rest may take many attempts.
_PAUSED_S, _PAUSE_AGAIN_S = 60.0, 0.1
#: "no errors", "corruptions", "leaks", and "this format has no check".
_CHECKED = (0, 2, 3, 63)


@dataclass(frozen=True)
class Finding:
    """What was found in one image.

    :param mismatches: differences to the model; none: every byte of the record area is right.
    :param errors: what ``qemu-img check`` could not read or calls corrupt.
    :param leaks: clusters that nothing refers to.
    """

    disk: str
    mismatches: list[str]
    errors: int = 0
    leaks: int = 0


def while_paused(guest: LabGuest, look: Callable[[], T]) -> T:
    """Look at something while the guest stands still, as after ``virsh suspend``.

    libvirt does nothing when the guest happens to stand still for a checkpoint just then; so it is
    tried again when the guest turns out to have run.

    :raises LabError: it always had.
    """
    deadline = time.monotonic() + _PAUSED_S
    while time.monotonic() < deadline:
        with _paused(guest) as stood:
            found = look()
        if stood:
            return found
        time.sleep(random.uniform(0.0, _PAUSE_AGAIN_S))  # not in step with the checkpoints
    raise LabError(f"{guest!r} does not stay paused")


@contextmanager
def _paused(guest: LabGuest) -> Iterator[list[bool]]:
    """Brings a list that has something in it at the end if the guest stood still."""
    import libvirt

    stood: list[bool] = []
    with guest.host.libvirt() as connection:
        domain = connection.lookupByUUIDString(guest.uuid)
        domain.suspend()
        try:
            yield stood
        finally:
            # By us: a checkpoint's pause has another reason.
            if domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]:
                stood.append(True)
                domain.resume()


def examine(
    guest: LabGuest, expected: Sequence[Exchange], possible: Sequence[Exchange], boot_id: int
) -> list[Finding]:
    """Look at all images of a guest that is paused.

    :param expected: what must be on each disk.
    :param possible: what may be there besides.
    :raises LabError: an image cannot be read.
    """
    found = []
    for disk, name in zip(guest.spec.disks, guest.spec.disk_names, strict=True):
        path = guest.host.disk_path(disk.path)
        mismatches = transactions.compare(path, disk.format, expected, possible, boot_id=boot_id)
        errors, leaks = check(str(path), disk.format)
        found.append(Finding(name, mismatches, errors, leaks))
    return found


def check(path: str, format: str) -> tuple[int, int]:
    """``qemu-img check`` of an image that a paused QEMU has open.

    :returns: errors with corruptions, and leaks.
    :raises LabError: it does not work.
    """
    argv = ["qemu-img", "check", "-U", "--output=json", "-f", format, path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_CHECK_S)
    if done.returncode not in _CHECKED:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")
    if done.returncode == 63:
        return 0, 0
    answer = json.loads(done.stdout)
    errors = int(answer.get("check-errors", 0)) + int(answer.get("corruptions", 0))
    return errors, int(answer.get("leaks", 0))
