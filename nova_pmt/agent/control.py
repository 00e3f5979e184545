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

"""What the agent and its workers say to each other: JSON lines over a socket pair.

The agent starts ``nova-pmt-worker --config-file ... --control-fd N`` with one end of
a socket pair as file descriptor N, and sends the worker's specification as the first
line. Nothing about a pair is on a command line. When the socket ends, the other side is gone:
a worker whose agent is gone tells its peer and ends in an orderly way.

Agent to worker::

    {"spec": {...}}                     first line: PrimarySpec or StandbySpec
    {"command": "unprotect"}            end protection; the guest (primary) runs on, untouched
    {"command": "switchover"}           primary only: final zero-loss round, standby goes on
    {"command": "takeover"}             standby only: operator's order to go on (claims first)

Worker to agent::

    {"event": "ready", ...}             standby: waits for its primary; has ``port``
    {"event": "state", "state": S, "reason": TEXT, "details": {...}}
    {"event": "progress", "done_pages": n, "total_pages": n, "sent_bytes": n}   first sync
    {"event": "progress", "done_bytes": n, "total_bytes": n, "sent_bytes": n}   its disks, before
    {"event": "stats", ...}             about twice a second: see nova_pmt.checkpoint.statistics
    {"event": "error", "error": {code, message, cure, details}}

States that a worker reports:

=================  =========  =============================================================
state              side       meaning
=================  =========  =============================================================
``syncing``        both       first synchronisation under way
``protected``      both       the first checkpoint is committed; rounds go on
``failing_over``   both       the standby is taking over (primary: the guest's QEMU died)
``standby_active`` both       final: the standby won and runs the guest; on the primary's
                              side the old domain is destroyed
``primary_alone``  primary    final: protection ended, the primary won and runs on
``cancelled``      standby    final: the standby domain was destroyed; it never ran
``unprotected``    both       final: protection was ended on request
``ended``          both       final: the guest was shut down on purpose
``error``          both       final: see the ``error`` event before it
=================  =========  =============================================================

After a final state the worker cleans up and exits with status 0. A worker that exits without
one has died: its agent claims the pair for a primary, and cleans up after a standby.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

#: A line longer than this is an error of ours.
MAX_LINE_BYTES = 8 << 20

FINAL_STATES = frozenset(
    {"standby_active", "primary_alone", "cancelled", "unprotected", "ended", "error"}
)


@dataclass(frozen=True)
class Pair:
    """A protected server: who it is and which arrangement of it this is.

    :param uuid: the domain's (and Nova server's) UUID.
    :param name: the domain's name.
    :param generation: grows with each new arrangement; decides between old and new.
    :param primary_host: name of the host whose guest runs.
    :param standby_host: name of the host whose guest waits.
    """

    uuid: str
    name: str
    generation: int
    primary_host: str
    standby_host: str


@dataclass(frozen=True)
class PrimarySpec:
    """What a primary worker is told.

    :param address: where its standby worker listens.
    :param strategy: plug-in name in ``nova_pmt.strategies``.
    :param options: overrides of the configuration for this pair: ``interval_ms``,
        ``epoch_limit_ms``, ``max_pause_ms``, ``cache_limit_mib``, ``passes``.
    """

    pair: Pair
    address: str
    port: int
    strategy: str = "pmt"
    options: dict[str, float] = field(default_factory=dict)
    role: str = "primary"


@dataclass(frozen=True)
class StandbySpec:
    """What a standby worker is told.

    :param domain_xml: the primary's migratable XML.
    :param layout: the primary's tracked blocks (:class:`nova_pmt.guest.layout.Layout`).
    :param disks: the primary's disks (:class:`nova_pmt.guest.disk.spec.DiskSpec`).
    """

    pair: Pair
    domain_xml: str
    layout: list[dict[str, Any]]
    disks: list[dict[str, Any]] = field(default_factory=list)
    role: str = "standby"


def to_line(message: dict[str, Any]) -> bytes:
    """One message as it goes over the socket."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def spec_line(spec: PrimarySpec | StandbySpec) -> bytes:
    """The first line that a worker gets."""
    return to_line({"spec": asdict(spec)})


def parse_spec(message: dict[str, Any]) -> PrimarySpec | StandbySpec:
    """The specification in a worker's first line."""
    data = dict(message["spec"])
    data["pair"] = Pair(**data["pair"])
    return PrimarySpec(**data) if data["role"] == "primary" else StandbySpec(**data)


class Lines:
    """Splits what a socket brings into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what came in.

        :raises ValueError: a message is longer than any of ours.
        """
        self._buffer += data
        if len(self._buffer) > MAX_LINE_BYTES:
            raise ValueError("control message is too long")

    def messages(self) -> Iterator[dict[str, Any]]:
        """Take out the messages that are complete now."""
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            message = json.loads(line)
            if isinstance(message, dict):
                yield message


def receive_one(sock: socket.socket, lines: Lines) -> dict[str, Any] | None:
    """Block until one message is there; None when the other side has gone."""
    while True:
        for message in lines.messages():
            return message
        data = sock.recv(65536)
        if not data:
            return None
        lines.feed(data)
