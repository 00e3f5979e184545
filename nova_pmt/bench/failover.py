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

"""``nova-pmt-bench failover``: how long clients get no answer, and what the old primary does then.

Whole pairs with agents and managers; the guest goes back and forth between two hosts. Clients
outside send a request when they have the last answer, each on its own TCP connection. Both hosts
are on this machine, so that one clock (CLOCK_MONOTONIC) tells all times.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nova_pmt.bench.gaps import Samples, row
from nova_pmt.bench.report import Report
from nova_pmt.evaluation import wire
from nova_pmt.evaluation.cloud import Cloud
from nova_pmt.evaluation.session import Session
from nova_pmt.evaluation.site import Pair, until
from nova_pmt.evaluation.timeline import Event, Timeline
from nova_pmt.evaluation.traffic import silence_s
from nova_pmt.exception import LabError
from nova_pmt.lab import Lab, LabHost, deployment

CLIENTS = 4
INTERVAL_MS = 20
THINK_S = 0.002
PROTECTED_S = 1.0
_ANSWER_S = 60.0
_RUNS_S = 30.0
_ENDED_S = 60.0
_AGAIN_S = 120.0
#: Clients are listened to for so long after the standby went on.
_AFTER_S = 0.5
_POLL_S = 0.01


@dataclass(frozen=True)
class Options:
    """What is measured.

    :param peer_timeout_ms: of both sides.
    :param away_s: a host is silent, or stands still, for so long.
    """

    causes: Sequence[str] = ("qemu",)
    runs: int = 10
    peer_timeout_ms: int = 500
    away_s: float = 10.0


class _Failovers:
    """One guest, failed over again and again."""

    def __init__(self, cloud: Cloud, session: Session, options: Options) -> None:
        self._cloud = cloud
        self._session = session
        self._options = options
        self._timeline = Timeline(session.guest.host.name)
        self._asked = {"interval_ms": float(INTERVAL_MS)}

    def once(self, cause: str, samples: Samples) -> None:
        """Let it happen once, and see the guest protected again.

        :raises LabError: nobody goes on, or it is not protected again.
        """
        cloud, session = self._cloud, self._session
        pair, _ = cloud.protected(session.guest, self._asked, timeout_s=_AGAIN_S)
        failed, survivor = (
            cloud.lab.host(pair["primary_host"]),
            cloud.lab.host(pair["standby_host"]),
        )
        strike, heal = self._fault(cause, failed)
        session.traffic.go(THINK_S)
        time.sleep(PROTECTED_S)
        events = cloud.traces.read(session.guest.uuid)
        struck = time.monotonic()
        strike()
        try:
            ran = self._ran(events, survivor, struck)
            session.moved(session.guest.on(survivor))
            until(lambda: session.traffic.latest() > ran.at, _RUNS_S, "no client gets an answer")
            if cause != "qemu":
                time.sleep(max(0.0, struck + self._options.away_s - time.monotonic()))
            time.sleep(_AFTER_S)
        finally:
            heal()
        healed = time.monotonic()
        self._ended(failed)
        samples.destroyed.append((time.monotonic() - healed) * 1e3)
        details = until(
            lambda: cloud.takeover(survivor, session.guest.uuid, pair["generation"]),
            _RUNS_S,
            f"{survivor.name} knows of no takeover",
        )
        broken = session.traffic.quiesce()
        if broken:
            raise LabError(f"connections broke: {'; '.join(broken)}")
        gap = silence_s(session.traffic.take(), struck)
        if gap is None:
            raise LabError("no client was answered after it")
        samples.gap.append(gap * 1e3)
        samples.total.append((details["running_at"] - struck) * 1e3)
        samples.detection.append((details["detected_at"] - struck) * 1e3)
        samples.activation.append(details["failover_ms"])
        self._judge(events, pair, samples)

    def _fault(self, cause: str, host: LabHost) -> tuple[Callable[[], None], Callable[[], None]]:
        if cause == "qemu":
            pid = self._session.guest.on(host).pid
            return lambda: os.kill(pid, signal.SIGKILL), lambda: None
        if cause == "stopped":
            return host.freeze, host.thaw
        links = [host.link(name) for name in ("repl", "data", "mgmt")]

        def cut() -> None:
            for link in links:
                link.down()

        def mend() -> None:
            for link in links:
                link.up()

        return cut, mend

    def _ran(self, events: list[Event], survivor: LabHost, struck: float) -> Event:
        """When the standby went on."""

        def found() -> Event | None:
            events.extend(self._cloud.traces.read(self._session.guest.uuid))
            return next(
                (
                    event
                    for event in events
                    if (event.kind, event.host) == ("run", survivor.name) and event.at >= struck
                ),
                None,
            )

        return until(found, _RUNS_S, f"{survivor.name} does not go on", poll_s=_POLL_S)

    def _ended(self, failed: LabHost) -> None:
        """Wait until the old primary's domain is destroyed, and no standby there runs."""
        uuid = self._session.guest.uuid
        until(
            lambda: not self._cloud.runs(failed, uuid),
            _ENDED_S,
            f"{failed.name} still runs it",
        )

    def _judge(self, events: list[Event], pair: Pair, samples: Samples) -> None:
        """What was let out by whom, and when."""
        uuid, mac = self._session.guest.uuid, self._session.guest.spec.mac
        events.extend(self._cloud.traces.read(uuid))
        found = self._timeline.feed(sorted(events, key=lambda event: event.at))
        samples.late_releases += len(found.split_brain) + len(found.early)
        late = wire.strays(self._cloud.wire.take(mac), self._timeline)
        samples.late_frames += len(late.get(pair["primary_host"], ()))


def run(options: Options, report: Report) -> list[dict[str, Any]]:
    """Measure. Returns a row for each cause.

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    rows = []
    with Lab(computes=2) as lab:
        report.note("two hosts with agents, two managers, a guest of 128 MiB, four clients")
        deployment.configure(
            lab, peer_timeout_ms=options.peer_timeout_ms, extra=deployment.WITH_MANAGERS
        )
        with (
            Cloud.open(lab, {}) as cloud,
            Session.start(lab, clients=CLIENTS, seed=1, answer_s=_ANSWER_S, disks=False) as session,
        ):
            failovers = _Failovers(cloud, session, options)
            for cause in options.causes:
                samples = Samples()
                for done in range(options.runs):
                    failovers.once(cause, samples)
                    report.progress(f"failovers: {cause}", done + 1, options.runs)
                rows.append(row(cause, samples, options.peer_timeout_ms))
    return rows
