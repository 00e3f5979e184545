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

"""The fault campaign: three hosts, two managers, and everything of them that can fail."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nova_pmt import unsafe
from nova_pmt.evaluation import evidence, injection
from nova_pmt.evaluation.campaign import CONFIG, Campaign, Options, quantiles, summarise
from nova_pmt.evaluation.cloud import DATABASE, TRACE, Cloud, ControlPlane
from nova_pmt.evaluation.faults import FaultPlan, fault_plans
from nova_pmt.evaluation.faulttrial import FaultResult, FaultTrial
from nova_pmt.evaluation.session import Session
from nova_pmt.evaluation.timeline import Timeline
from nova_pmt.evaluation.trial import Pace, Result
from nova_pmt.lab import Lab, deployment
from nova_pmt.lab.mariadb import MariaDB

#: What a campaign can be run without, and what it must find then.
NEGATIVES: Mapping[str, str] = MappingProxyType(
    {unsafe.AT_ONCE: "early_releases", unsafe.UNDECIDED: "split_brain"}
)
#: The message bus may be away for a while, and takes its time to come back.
FAULT_ANSWER_S = 120.0
#: What is kept of so many trials in which something was wrong.
_KEPT = 20
#: And of each host's trace so many lines.
_LINES = 5000


class FaultCampaign(Campaign):
    """See :class:`~nova_pmt.evaluation.campaign.Campaign`.

    Kinds that this machine cannot do are left out, which :attr:`skipped` tells.

    :param without: what is done without, of :data:`NEGATIVES`: the campaign must find out.
    """

    answer_s = FAULT_ANSWER_S
    sums = ("split_brain", "early_releases", "leftovers", "unrecovered")

    def __init__(
        self,
        lab: Lab,
        options: Options,
        directory: Path,
        on_trial: Callable[[Result], None] = lambda result: None,
        plane: ControlPlane | None = None,
        without: str = "",
    ) -> None:
        self._without = without
        self._plane = plane or ControlPlane()
        self.skipped = injection.skipped(lab, options.kinds, self._plane)
        self.voids_allowed = max(10, options.trials // 4)
        self._timelines: dict[str, Timeline] = {}
        self._kept = 0
        super().__init__(lab, options, directory, on_trial)

    def _draw(self) -> Iterator[FaultPlan]:
        possible = [kind for kind in self._options.kinds if kind not in self.skipped]
        return fault_plans(self._options.seed, possible)

    def _open(self) -> contextlib.AbstractContextManager[Cloud]:
        env = {unsafe.VARIABLE: self._without} if self._without else {}
        return Cloud.open(self._lab, env, self._plane)

    def _trial(self, site: Cloud, session: Session, plan: FaultPlan) -> FaultTrial:
        guest = session.guest
        timeline = self._timelines.setdefault(guest.uuid, Timeline(guest.host.name))
        pace = Pace(self._think_s)
        options = {"interval_ms": self._options.interval_ms}
        return FaultTrial(site, session, plan, pace, options, timeline)

    def _examine(self, result: Result, session: Session) -> None:
        if not result.clean and self._kept < _KEPT:
            self._kept += 1
            directory = self._directory / f"trial-{result.trial}"
            self._keep_logs(directory)
            evidence.collect(self._lab, session.guest.name, directory)
            if self._plane.server is None:
                shutil.copy(self._lab.ctl.disk_path(deployment.DATABASE), directory)
            for host in self._lab.computes:
                with contextlib.suppress(OSError):
                    lines = host.disk_path(TRACE).read_text().splitlines(keepends=True)
                    (directory / f"{host.name}.trace").write_text("".join(lines[-_LINES:]))

    @property
    def succeeded(self) -> bool:
        """It saw what it should: nothing wrong; in a negative, what it looks for."""
        if self._without:
            key = NEGATIVES[self._without]
            return any(getattr(result, key) for result in self.results)
        return super().succeeded

    def summary(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """What ``summary.json`` has."""
        results = [result for result in self.results if isinstance(result, FaultResult)]
        return {
            **super().summary(machine),
            **of_faults(results),
            "skipped": self.skipped,
            "without": self._without,
            "managers": self._plane.managers,
            "database": "SQLite" if self._plane.server is None else "MariaDB",
        }


def of_faults(results: Sequence[FaultResult]) -> dict[str, Any]:
    """What a summary has on top: how often each fault was done, and what clients saw."""
    kinds = Counter(fault.split()[0] for result in results for fault in result.faults)
    steps = Counter(step for result in results for step in result.steps)
    silences = [result.silence_ms for result in results if result.silence_ms is not None]
    gap = None
    if silences:
        gap = {f"p{q}": round(float(np.percentile(silences, q)), 1) for q in (50, 99)}
        gap["max"] = max(silences)
    return {
        "faults": {"kinds": dict(sorted(kinds.items())), "steps": dict(sorted(steps.items()))},
        "gap_ms": gap,
        "gaps": gaps(results),
    }


def gaps(results: Iterable[FaultResult]) -> dict[str, dict[str, Any]]:
    """What clients missed, by fault and side, of trials that had one fault at a moment.

    One that was drawn in two directions counts as one; a host that falls silent does not.
    """
    found: dict[str, list[float]] = {}
    for result in results:
        if len(result.faults) == 1 and not result.steps and result.silence_ms is not None:
            words = [word for word in result.faults[0].split() if word not in ("in", "out")]
            found.setdefault(" ".join(words), []).append(result.silence_ms)
    return {
        name: {"trials": len(values), **(quantiles(values) or {})}
        for name, values in sorted(found.items())
    }


def summarise_again(directory: Path) -> dict[str, Any]:
    """The summary of a campaign of faults, from its trials: what an older release left out.

    :raises OSError: ``summary.json`` or ``trials.jsonl`` is not there.
    :raises ValueError: or is something else, as :exc:`KeyError` and :exc:`TypeError`.
    """
    before = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    lines = (directory / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    results = [FaultResult(**json.loads(line)) for line in lines]
    options = Options(**{**before["options"], "kinds": tuple(before["options"]["kinds"])})
    facts = {key: before[key] for key in ("guests", "void", "stopped", "seconds")}
    return {
        **summarise(results, options, before["machine"], also=FaultCampaign.sums, **facts),
        **of_faults(results),
        "skipped": before["skipped"],
        "without": before.get("without", ""),
        "managers": before.get("managers", ControlPlane.managers),
        "database": before.get("database", "SQLite"),
    }


@contextlib.contextmanager
def fault_lab(cluster: bool = False, strategy: str = "pmt") -> Iterator[tuple[Lab, ControlPlane]]:
    """A lab of three hosts, configured.

    :param cluster: for three managers over MariaDB, in place of two over SQLite.
    """
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(computes=3))
        extra = {**deployment.WITH_MANAGERS, **CONFIG, "checkpoint": {"strategy": strategy}}
        plane = ControlPlane()
        if cluster:
            server = stack.enter_context(MariaDB(lab.directory / "mariadb"))
            extra["database"] = {"connection": server.create(DATABASE)}
            plane = ControlPlane(3, server)
        deployment.configure(lab, extra=extra)
        yield lab, plane
