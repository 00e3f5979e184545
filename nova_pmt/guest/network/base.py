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

"""The contract of an egress buffer (plug-ins ``nova_pmt.egress_buffers``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from nova_pmt.exception import Refusal
from nova_pmt.guest.monitor import Monitor


@dataclass(frozen=True)
class Nic:
    """A network interface of a running guest.

    :param alias: libvirt's device alias (``net0``).
    :param netdev: id of QEMU's network backend (``hostnet0``).
    :param mac: the guest's address, for people.
    :param tap: the host's interface; None when there is none.
    :param vhost: packets bypass QEMU (vhost-net in the kernel).
    :param queues: pairs of queues.
    """

    alias: str
    netdev: str
    mac: str
    tap: str | None
    vhost: bool
    queues: int = 1


class EgressBuffer(ABC):
    """Holds what one NIC sends; implements :class:`nova_pmt.checkpoint.interfaces.OutputBuffer`.

    Made for one NIC: ``buffer(nic, monitor, directory, limit_bytes)``. Whatever happens to this
    process, a packet that was not released never leaves the host.

    :param monitor: of the guest's QEMU.
    :param directory: on tmpfs; QEMU's user may make sockets there.
    :param limit_bytes: most that is held; what the guest sends beyond is dropped, and counted.
    """

    #: The plug-in's name.
    name: ClassVar[str]
    nic: Nic

    @abstractmethod
    def __init__(self, nic: Nic, monitor: Monitor, directory: str, limit_bytes: int) -> None: ...

    @classmethod
    @abstractmethod
    def problems(cls, nic: Nic, monitor: Monitor) -> list[Refusal]:
        """Why this buffer cannot hold what that NIC sends; changes nothing. Empty: it can."""

    @abstractmethod
    def attach(self) -> None:
        """Hold packets from now on; idempotent, and takes over what a dead worker left.

        What the dead worker held is dropped, never released.

        :raises nova_pmt.exception.GuestError: it did not work; what was done is undone.
        """

    @abstractmethod
    def cut(self, epoch: int) -> None:
        """End of the epoch's packets: called in the pause; must not block or allocate."""

    @abstractmethod
    def release(self, epoch: int) -> float | None:
        """Checkpoint ``epoch`` is committed: let out what was held up to its cut. Does not wait.

        :returns: seconds for which its oldest packet was held; None when there was none, or
            nobody knows.
        """

    @abstractmethod
    def watch(self, on_output: Callable[[], None]) -> None:
        """Have ``on_output`` called, from any thread, with the first packet after each cut.

        A buffer that cannot tell by itself leaves it to those who look at ``waiting_since``.
        """

    @property
    @abstractmethod
    def waiting_since(self) -> float:
        """``time.perf_counter`` when the first packet since the last cut came; 0: none did."""

    @abstractmethod
    def detach(self) -> None:
        """Let out all that is held, in order, and take the buffer off the guest.

        Called only when the guest may go on unprotected. The guest is paused meanwhile.

        :raises nova_pmt.exception.GuestError: it did not work; packets stay held or are dropped.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what this process has open, and leave the buffer closed: nothing leaks."""

    @classmethod
    @abstractmethod
    def recover(cls, nic: Nic, monitor: Monitor) -> bool:
        """Take off what a dead worker left. Held packets are lost. Idempotent.

        Called only when the guest may go on unprotected.

        :returns: whether there was something to take off.
        """

    @property
    def broken(self) -> str:
        """Why nothing passes any more; empty while it works."""
        return ""

    @property
    @abstractmethod
    def pressure(self) -> float:
        """How full it is, 0 to 1."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """For the status: nic, mac, buffer, held_bytes, peak_bytes, limit_bytes, dropped_packets,
        released_bytes. Any thread."""
