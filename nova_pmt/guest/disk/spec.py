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

"""What primary and standby must both know of a disk."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

SECTOR = 512
_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
_PATH = re.compile(r"/[^\x00-\x1f\x7f]{1,1000}")
_CLUSTERS = (0, *(1 << bits for bits in range(9, 22)))


@dataclass(frozen=True)
class DiskSpec:
    """A disk of a guest that is replicated.

    :param name: target device (``vda``).
    :param format: of the image: ``qcow2`` or ``raw``. The standby's has no backing file.
    :param path: of the image; the same on both hosts.
    :param size: what the guest sees, in bytes.
    :param readonly: copied once, and never written (a config drive).
    :param cluster_bytes: of a qcow2 image, the same on both hosts: a discard of the guest zeroes
        whole clusters only. 0: not known, or raw.
    """

    name: str
    format: str
    path: str
    size: int
    readonly: bool = False
    cluster_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DiskSpec:
        """From what a peer or the agent sent.

        :raises ValueError: it is none.
        """
        disk = cls(**data)
        if (
            not isinstance(disk.name, str)
            or not _NAME.fullmatch(disk.name)
            or disk.format not in ("qcow2", "raw")
            or not isinstance(disk.path, str)
            or not _PATH.fullmatch(disk.path)
            or type(disk.size) is not int
            or not 0 < disk.size <= 1 << 60
            or not isinstance(disk.readonly, bool)
            or disk.cluster_bytes not in _CLUSTERS
        ):
            raise ValueError(f"not a disk: {data!r:.200}")
        return disk
