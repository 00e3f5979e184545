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

"""Where the lab keeps things: image cache and run directories on disk, the registry in /run."""

from __future__ import annotations

import os
from pathlib import Path

#: One JSON file per lab that lives (or died without cleaning up). Host names, pids; root only.
REGISTRY = Path("/run/nova-pmt-lab")


def checkout() -> Path | None:
    """The source checkout this package lies in, or None when it is installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() or (root / "pyproject.toml").exists() else None


def base_directory() -> Path:
    """Directory for everything the lab writes to disk.

    ``$NOVA_PMT_LAB_DIR``, or ``build/lab`` of the checkout, or ``/var/cache/nova-pmt-lab``.
    """
    wanted = os.environ.get("NOVA_PMT_LAB_DIR")
    if wanted:
        return Path(wanted).resolve()
    root = checkout()
    return root / "build" / "lab" if root else Path("/var/cache/nova-pmt-lab")


def image_cache() -> Path:
    """Kernel packages and built guest images; kept between runs."""
    return base_directory() / "image"


def run_directory(lab_id: str) -> Path:
    """What the disks of one lab's hosts hold; on disk, because it outlives a host's power cut."""
    return base_directory() / "run" / lab_id
