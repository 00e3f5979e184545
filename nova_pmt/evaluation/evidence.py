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

"""What can still be asked when a trial cannot go on: the state of both hosts, for a person."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from nova_pmt.exception import PmtError
from nova_pmt.lab import Lab, LabHost
from nova_pmt.lab.domain import CONSOLES

_TIMEOUT_S = 10.0
_MONITOR = ("info status", "info network", "info block", "info blockstats", "info chardev")


def collect(lab: Lab, guest: str, directory: Path) -> None:
    """Write a file for each host, and copy QEMU's logs and the guest's consoles.

    What does not answer is left out, and said so.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for host in lab.hosts:
        text = _state(host, guest) if host.powered else "no power\n"
        (directory / f"{host.name}-state.txt").write_text(text, encoding="utf-8")
        for log in host.disk_path(CONSOLES).glob(f"{guest}*.log"):
            with contextlib.suppress(OSError):
                shutil.copy(log, directory / f"{host.name}-{log.name}")


def _state(host: LabHost, guest: str) -> str:
    commands: list[Sequence[str]] = [("ip", "-s", "link"), ("ip", "neigh"), ("bridge", "fdb")]
    if host.index:
        commands += [("virsh", "list", "--all"), ("virsh", "domstate", "--reason", guest)]
        ask = ("virsh", "qemu-monitor-command", "--hmp", guest)
        commands += [(*ask, words) for words in _MONITOR]
        commands += [("df", "-h")]
    else:
        commands += [("ss", "-tnoi")]
    parts = []
    for command in commands:
        try:
            done = host.run(command, check=False, timeout=_TIMEOUT_S)
            parts.append(f"# {' '.join(command)}\n{done.stdout}{done.stderr}")
        except PmtError as error:
            parts.append(f"# {' '.join(command)}\n{error}\n")
    return "\n".join(parts)
