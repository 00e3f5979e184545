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

"""What a measurement was made on: the header of a JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nova_pmt import exception
from nova_pmt.bench.rows import SCHEMA


def header(benchmark: str, command: Sequence[str], qemu: str) -> dict[str, Any]:
    """Facts about the machine and the run.

    :param command: the command line.
    :param qemu: version of the QEMU that was measured.
    """
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "kernel": platform.release(),
        "qemu": qemu,
        "python": platform.python_version(),
        "nova_pmt": _version(),
        "cpus": os.cpu_count() or 1,
        "cpu_model": _cpu_model(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def qemu_version() -> str:
    """Version of the QEMU that the lab's guests run on."""
    command = ["qemu-system-x86_64", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.split()[3].split("(")[0]


def _version() -> str:
    try:
        return importlib.metadata.version("nova-pmt")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "unknown"
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def write(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the file, whole or not at all.

    :raises nova_pmt.exception.PmtError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"header": header, "rows": _finite(rows)}, indent=2, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise exception.PmtError(
            f"{path} cannot be written: {error.strerror}",
            cure="Give --json a path in a directory that you may write.",
        ) from error


def _finite(value: Any) -> Any:
    """JSON has no infinity: it becomes null."""
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
