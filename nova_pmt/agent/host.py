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

"""What the agent asks of its host's guests (libvirt: :mod:`nova_pmt.agent.libvirt_host`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from nova_pmt.exception import Refusal


@dataclass(frozen=True)
class DomainInfo:
    """A domain on this host.

    :param running: it is active and is not a standby of ours that waits. A guest that a
        dead worker left paused counts as running.
    """

    uuid: str
    name: str
    running: bool


@dataclass(frozen=True)
class GuestDescription:
    """What a standby must be told to make the same guest.

    :param domain_xml: the migratable XML.
    :param layout: the tracked memory blocks (:class:`nova_pmt.guest.layout.Layout`).
    :param memory_bytes: what the standby's host must have free.
    :param disks: what is replicated (:class:`nova_pmt.guest.disk.spec.DiskSpec`).
    """

    domain_xml: str
    layout: list[dict[str, Any]]
    memory_bytes: int
    disks: list[dict[str, Any]] = field(default_factory=list)


class Host(Protocol):
    """The guests of this host. Every method may raise :class:`nova_pmt.exception.GuestError`."""

    def find(self, domain: str) -> DomainInfo:
        """A domain by UUID or name.

        :raises nova_pmt.exception.UnknownDomain: there is none.
        """

    def domains(self) -> list[DomainInfo]:
        """Every domain that libvirt knows here."""

    def facts(self) -> dict[str, Any]:
        """What the managers go by: ``memory_free_bytes`` and ``cpu_model`` for the choice of a
        standby's host, ``running`` (UUIDs) for pairs whose agent knows nothing of them.
        """

    def abilities(self) -> dict[str, Any]:
        """What hardly ever changes: ``cpu_model``, ``machine_types``, and whether the kernel has
        what ``plug`` needs, of that name.
        """

    def check(self, uuid: str) -> tuple[list[Refusal], list[str]]:
        """Why the domain cannot be protected (all reasons), and what to be warned of."""

    def describe(self, uuid: str) -> GuestDescription:
        """What a standby needs to know.

        :raises nova_pmt.exception.Refusal: the domain cannot be protected.
        """

    def check_standby(
        self, uuid: str, memory_bytes: int, disks: list[dict[str, Any]]
    ) -> list[Refusal]:
        """Why this host cannot hold a standby of that size, with these disks (all reasons)."""

    def is_running(self, uuid: str) -> bool:
        """Whether the guest is active here and not a standby of ours that waits."""

    def recover(self, uuid: str) -> None:
        """Undo what a dead primary worker left: let a guest go on that it had paused, with its
        network open and its disks no longer logged.

        Called only after the primary won the pair. Idempotent.
        """

    def let_go(self, uuid: str) -> None:
        """Forget all that was kept for the next synchronisation: protection is not wanted any more.
        Idempotent.
        """

    def holds_state(self, uuid: str, generation: int) -> bool:
        """Whether our standby of that generation has loaded its state: its worker may have claimed,
        and :meth:`finish_takeover` could let it run.
        """

    def finish_takeover(self, uuid: str) -> bool:
        """Let a standby run that won the pair and whose worker died before it could.

        Called only when the arbiter says that the standby won. Idempotent.

        :returns: false when the domain holds no state that it could go on from.
        """

    def destroy(self, uuid: str) -> None:
        """End the domain at once: it lost the pair. No error when it is gone already."""

    def tidy(self, uuid: str) -> None:
        """Remove what a QEMU that was killed has left: its second monitor's socket, logs of its
        disks. Nothing while the domain is active. Idempotent.
        """

    def forget_images(self, uuid: str) -> None:
        """Delete the images of a standby that is gone. Idempotent; never those of a guest."""

    def cleanup_standby(self, uuid: str, generation: int) -> None:
        """Destroy a waiting standby that a dead worker left, with images that are of no use.
        Idempotent.

        Must never touch a domain that is not one of our waiting standbys.
        """
