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

"""The output-commit campaign: trials one after the other, on one guest with open connections.

The record area of the guest's disks holds some 96,000 records, so clients think between requests
for as long as it takes to have room for all trials. When it is full all the same, or a guest is
lost for no fault of the product's, the campaign goes on with another guest, and says so.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nova_pmt.evaluation import evidence
from nova_pmt.evaluation.plan import KINDS, plans
from nova_pmt.evaluation.session import Session
from nova_pmt.evaluation.site import Site
from nova_pmt.evaluation.trial import Pace, Result, Trial, Void
from nova_pmt.exception import PmtError
from nova_pmt.lab import Lab, deployment
from nova_pmt.lab.transactions import CAPACITY
from nova_pmt.unsafe import UNBUFFERED, VARIABLE

#: On top of the lab's configuration.
CONFIG: Mapping[str, Mapping[str, str]] = {"agent": {"resync_interval_s": "1"}}

THINK_S = 0.005
#: A connection without an answer for so long is broken, in seconds. In the negative most are.
ANSWER_S, NEGATIVE_ANSWER_S = 20.0, 3.0


@dataclass(frozen=True)
class Options:
    """What a campaign does.

    :param negative: the agents do not hold what the guest sends, so that answers must get lost.
    :param until_loss: end with the first trial that lost an answer.
    :param disks: off only to look for faults elsewhere.
    :param strategy: that the lab's agents are configured for.
    """

    trials: int
    seed: int
    kinds: tuple[str, ...] = KINDS
    clients: int = 4
    interval_ms: int = 20
    negative: bool = False
    until_loss: bool = False
    disks: bool = True
    strategy: str = "pmt"


class Campaign:
    """Trials in a lab that is up and configured; :attr:`results` has what was done so far.

    :param directory: for ``trials.jsonl`` and ``summary.json``.
    :param on_trial: told of each result.
    """

    def __init__(
        self,
        lab: Lab,
        options: Options,
        directory: Path,
        on_trial: Callable[[Result], None] = lambda result: None,
    ) -> None:
        self._lab = lab
        self._options = options
        self._directory = directory
        self._on_trial = on_trial
        self._begun = time.monotonic()
        self._plans: Iterator[Any] = itertools.islice(self._draw(), options.trials)
        self._think_s = THINK_S
        self.results: list[Result] = []
        self.guests = 0
        self.voids: list[str] = []
        self.stopped = ""

    # -- what a campaign of another kind does otherwise -----------------------------------

    #: Further members of the results to sum up.
    sums: Sequence[str] = ()
    #: Guests that may be lost for no fault of the product's.
    voids_allowed = 10

    @property
    def answer_s(self) -> float:
        """A connection without an answer for so long is broken."""
        return NEGATIVE_ANSWER_S if self._options.negative else ANSWER_S

    def _draw(self) -> Iterator[Any]:
        """What the trials do, one after the other."""
        return plans(self._options.seed, self._options.kinds)

    def _open(self) -> contextlib.AbstractContextManager[Any]:
        """Start what the hosts have, and end it."""
        return Site.open(self._lab, {VARIABLE: UNBUFFERED} if self._options.negative else {})

    def _trial(self, site: Any, session: Session, plan: Any) -> Trial:
        """One trial, yet to be run."""
        return Trial(
            site,
            session,
            plan,
            Pace(self._think_s),
            {"interval_ms": self._options.interval_ms},
            fenced=not self._options.negative,
        )

    def _examine(self, result: Result, session: Session) -> None:
        """Look closer at a trial that has just ended, while everything is still there."""

    # -- running them -------------------------------------------------------------------

    def run(self) -> None:
        """All trials, or as many as can be. What there is, is written also when it fails.

        :raises PmtError: the lab or the product failed; :attr:`stopped` tells why.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._directory / "logs", ignore_errors=True)
        try:
            with (
                (self._directory / "trials.jsonl").open(
                    "w", encoding="utf-8", buffering=1
                ) as lines,
                self._open() as site,
            ):
                while self._left and not self.stopped:
                    self._guest(site, lines.write)
        except KeyboardInterrupt:
            self.stopped = "interrupted"
            raise
        except PmtError as error:
            self.stopped = error.message
            raise
        finally:
            if self.stopped or not self.succeeded:
                self._keep_logs()

    def _keep_logs(self, logs: Path | None = None) -> None:
        """What the agents and workers said, before the lab is gone."""
        logs = logs or self._directory / "logs"
        shutil.copytree(self._lab.ctl.log_directory, logs, dirs_exist_ok=True)

    @property
    def _left(self) -> int:
        return self._options.trials - len(self.results) - len(self.voids)

    def _guest(self, site: Any, write: Callable[[str], object]) -> None:
        """Trials with one guest, for as long as it lives and has room."""
        options = self._options
        self.guests += 1
        with Session.start(
            self._lab,
            clients=options.clients,
            seed=options.seed,
            answer_s=self.answer_s,
            disks=options.disks,
        ) as session:
            for plan in self._plans:
                trial = self._trial(site, session, plan)
                before = session.ledger.records
                try:
                    result = trial.run()
                except PmtError:
                    self._keep_logs()  # before what they tell of is gone
                    evidence.collect(self._lab, session.guest.name, self._directory / "logs")
                    raise
                except Void as void:
                    self.voids.append(f"trial {plan.number} ({plan.kind}): {void}")
                    if len(self.voids) >= self.voids_allowed:
                        self.stopped = f"{len(self.voids)} guests were lost before their trials"
                    return
                self.results.append(result)
                write(json.dumps(result.to_dict()) + "\n")
                self._on_trial(result)
                self._examine(result, session)
                if options.until_loss and result.lost:
                    self.stopped = "the first loss"
                    return
                if not session.room:
                    return
                self._keep_pace(result.records - before, session)

    def _keep_pace(self, used: int, session: Session) -> None:
        """Have clients think longer when the record area would be full before the last trial."""
        if self._left:
            quota = (CAPACITY - session.ledger.records) / self._left
            factor = 1.25 if used > 0.9 * quota else 0.8
            self._think_s = min(1.0, max(THINK_S, self._think_s * factor))

    @property
    def succeeded(self) -> bool:
        """It saw what it should: nothing wrong; in the negative, losses."""
        if self._options.negative:
            return any(result.lost for result in self.results)
        return bool(self.results) and all(result.clean for result in self.results)

    # -- the result ---------------------------------------------------------------------

    def summary(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """What ``summary.json`` has.

        :param machine: and what else is to be told of the run.
        """
        return summarise(
            self.results,
            self._options,
            machine,
            also=self.sums,
            guests=self.guests,
            void=self.voids,
            stopped=self.stopped,
            seconds=round(time.monotonic() - self._begun, 1),
        )

    def write(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``summary.json`` and return it."""
        summary = self.summary(machine)
        path = self._directory / "summary.json"
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
        return summary


_SUMS = (
    *("answered", "lost", "repeated", "broken_connections", "image_mismatches"),
    *("unexplained", "image_check_errors", "image_leaks", "disks_unlike_memory", "two_survivors"),
)
_TIMES = (
    *("failover_ms", "detection_ms", "silence_ms", "output_delay_ms"),
    *("protect_s", "check_s", "duration_s"),
)


def summarise(
    results: Sequence[Result],
    options: Options,
    machine: Mapping[str, Any],
    *,
    also: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Sums over all trials, quantiles of times, and what happened to each kind.

    :param also: further members of the results to sum up.
    """

    def total(key: str, of: Sequence[Result] = results) -> int:
        return sum(getattr(result, key) for result in of)

    def failovers(of: Sequence[Result]) -> int:
        return sum(result.winner == "standby" for result in of)

    kinds = {}
    for kind in options.kinds:
        of = [result for result in results if result.kind == kind]
        kinds[kind] = {
            "trials": len(of),
            "failovers": failovers(of),
            "lost": total("lost", of),
            "failover_ms": quantiles(result.failover_ms for result in of),
            "silence_ms": quantiles(result.silence_ms for result in of),
        }
    sums = {key: total(key) for key in (*_SUMS, *also)}
    return {
        "trials": len(results),
        "failovers": failovers(results),
        **{key: sums.pop(key) for key in _SUMS[:5]},
        "seed": options.seed,
        **sums,
        "trials_with_loss": sum(result.lost > 0 for result in results),
        "kinds": kinds,
        **{key: quantiles(getattr(result, key) for result in results) for key in _TIMES},
        "records": max((result.records for result in results), default=0),
        "options": asdict(options),
        **more,
        "machine": dict(machine),
    }


def quantiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """p50, p90, p99 and max of the values that are known; None when there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = {f"p{q}": round(float(np.percentile(known, q)), 1) for q in (50, 90, 99)}
    return {**found, "max": round(float(max(known)), 1)}


@contextlib.contextmanager
def campaign_lab(strategy: str = "pmt") -> Iterator[Lab]:
    """A lab of two hosts, configured."""
    with Lab(computes=2) as lab:
        deployment.configure(lab, extra={**CONFIG, "checkpoint": {"strategy": strategy}})
        yield lab
