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

"""One trial of a fault campaign: protected, requests, faults, put right, protected again by itself.

What is checked of the answers, the disks and the connections is the same as in every campaign
(:mod:`nova_pmt.evaluation.trial`). On top of that: the timeline of what was let out, and what is
left over on the hosts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nova_pmt.evaluation import observed, wire
from nova_pmt.evaluation.cloud import Cloud, Lost
from nova_pmt.evaluation.faults import CLUSTER, STEP, Fault, FaultPlan
from nova_pmt.evaluation.injection import Injector, Strike
from nova_pmt.evaluation.plan import Plan
from nova_pmt.evaluation.session import Session
from nova_pmt.evaluation.site import Pair, until
from nova_pmt.evaluation.timeline import Event, Timeline, decided
from nova_pmt.evaluation.trial import AFTER_S, Pace, Result, Trial, Void, seconds_since
from nova_pmt.exception import LabError, PmtError

#: Until a guest whose pair was broken, and put right, is protected again by itself.
AGAIN_S = 120.0
#: Until nothing of older arrangements is left.
CLEAN_S = 20.0
#: Who waits until it is decided who goes on waits no longer than this, in seconds.
PATIENCE_S = 12.0
#: A fault is put right so long after it was decided who goes on, in seconds.
_SETTLED_S = 0.2
#: Until a worker comes to the step at which it dies.
_STEP_S = 45.0
_STEP_ATTEMPTS = 3
_ORDER_S = 60.0
_POLL_S = 0.03


@dataclass
class FaultResult(Result):
    """One line of ``trials.jsonl``; see :class:`~nova_pmt.evaluation.trial.Result`.

    :param faults: what was done, in words.
    :param steps: names of the steps at which a worker died.
    :param standby: the host of the standby, before.
    :param winner: the side that went on without the other first; empty: none had to.
    :param after: generation, primary and standby in the end.
    :param split_brain: what the loser let out after the winner went on, and the like.
    :param early_releases: epochs let out before they were committed.
    :param stray_frames: of the guest, that came out of a host after another one went on: these are
        a split brain, too, unless something on that host had been stopped before it could send
        what it was allowed to.
    :param leftovers: what is left on the hosts of older arrangements.
    :param unrecovered: the guest was not protected again, or was lost.
    :param missed: faults that could not be done, since the one before had left nothing to do it to.
    :param again_s: from when all was put right until it was protected again.
    """

    faults: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    standby: str = ""
    after: str = ""
    split_brain: int = 0
    early_releases: int = 0
    stray_frames: int = 0
    leftovers: int = 0
    unrecovered: int = 0
    missed: list[str] = field(default_factory=list)
    again_s: float | None = None

    @property
    def what(self) -> str:
        """What was done, in few words."""
        return " + ".join(self.faults) or self.kind

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        return super().clean and not (
            self.split_brain or self.early_releases or self.leftovers or self.unrecovered
        )


class FaultTrial(Trial):
    """See the module's text.

    :param timeline: of the guest, over all trials.
    """

    def __init__(
        self,
        cloud: Cloud,
        session: Session,
        plan: FaultPlan,
        pace: Pace,
        options: Mapping[str, float],
        timeline: Timeline,
    ) -> None:
        result = FaultResult(
            plan.number,
            plan.kind,
            plan.moment_s,
            plan.silent,
            faults=[fault.name for fault in plan.faults],
        )
        same = Plan(plan.number, plan.kind, plan.moment_s, plan.silent)
        super().__init__(cloud, session, same, pace, options, result=result)
        self._cloud = cloud
        self._faults = plan
        self._found = result
        self._timeline = timeline
        self._events: list[Event] = []

    def run(self) -> FaultResult:
        """Do it, to the end: afterwards everything is put right, and the guest is protected.

        :raises Void: the guest is lost, for no fault of the product's.
        """
        import libvirt

        begun = time.monotonic()
        try:
            self._do()
        except Void:
            self._judge()
            if self._found.clean:
                raise
            self._session.room = False
        except (PmtError, Lost, libvirt.libvirtError) as error:
            # The campaign goes on, with another guest.
            self._found.unrecovered = 1
            self._blame([f"{type(error).__name__}: {error}"])
            self._session.room = False
            self._mended()
            self._judge()
        else:
            self._judge()
        self._found.duration_s = seconds_since(begun)
        return self._found

    def _do(self) -> None:
        result, session, cloud = self._found, self._session, self._cloud
        begun = time.monotonic()
        session.traffic.go(self._pace.syncing_s)
        pair, result.refused = cloud.protected(session.guest, self._options)
        result.protect_s = seconds_since(begun)
        self._look()
        session.moved(session.guest.on(cloud.lab.host(pair["primary_host"])))
        step = next((fault for fault in self._faults.faults if fault.kind == STEP), None)
        struck = self._step(step) if step is not None else self._simple(pair)
        cloud.mend()
        mended = time.monotonic()
        try:
            after, refused = cloud.protected(
                session.guest, self._options, ask=step is not None, timeout_s=AGAIN_S
            )
        except Lost as lost:
            if self._faults.may_lose:
                raise Void(f"{self._faults.name}: {lost}") from lost
            raise
        result.refused += refused
        result.again_s = seconds_since(mended)
        result.survivor = after["primary_host"]
        result.after = "{generation} {primary_host} {standby_host}".format(**after)
        if result.kind in CLUSTER and result.kind.startswith("database-"):
            self._demand_unmoved(pair, after)
        session.moved(session.guest.on(cloud.lab.host(after["primary_host"])))
        with contextlib.suppress(LabError):  # then the check tells what is wrong
            until(lambda: session.traffic.latest() > mended, AGAIN_S, "no client gets an answer")
        time.sleep(AFTER_S)
        self._check(struck)
        self._leftovers()
        self._look()
        self._outcome(struck)

    def _demand_unmoved(self, before: Pair, after: Pair) -> None:
        """A database that is away changes no pair: the rounds need nobody else."""
        if before["generation"] != after["generation"]:
            self._found.unrecovered = 1
            self._blame([f"it came apart while the database was away: {after['reason']}"])

    def _before(self, pair: Pair) -> None:
        result = self._found
        result.primary, result.standby = pair["primary_host"], pair["standby_host"]
        result.generation = pair["generation"]

    # -- faults at a moment ---------------------------------------------------------------

    def _simple(self, pair: Pair) -> float:
        """Requests until the moment, the faults, and their ends; when the first came."""
        self._before(pair)
        injector = Injector(self._cloud, self._session.guest, pair)
        strikes = [injector.prepare(fault) for fault in self._faults.faults]
        moment = time.monotonic() + self._faults.moment_s
        self._session.traffic.go(self._pace.think_s)
        time.sleep(max(0.0, moment - time.monotonic()))
        return self._strike(strikes)

    def _strike(self, strikes: Sequence[Strike]) -> float:
        struck = time.monotonic()
        try:
            self._unbroken()
            for strike in strikes:
                time.sleep(max(0.0, struck + strike.fault.after_s - time.monotonic()))
                try:
                    strike.strike()
                except PmtError as error:
                    if len(strikes) == 1:
                        raise
                    self._found.faults.remove(strike.fault.name)
                    self._found.missed.append(f"{strike.fault.name}: {error.message}")
            self._hold(strikes, struck)
        finally:
            with contextlib.ExitStack() as stack:  # whatever happens, nothing stays stopped or cut
                for strike in strikes:
                    stack.callback(strike.heal_once)
        return struck

    def _unbroken(self) -> None:
        """A pair that has come apart by itself is looked at, and not broken a second time."""
        row = self._cloud.row(self._session.guest.uuid)
        expected = ("protected", self._found.generation)
        if row is not None and (row["state"], row["generation"]) != expected:
            raise Void(
                f"{self._faults.name}: the pair had come apart before: {row['state']}, "
                f"generation {row['generation']}, {row['reason']}"
            )

    def _hold(self, strikes: Sequence[Strike], struck: float) -> None:
        """Put each right when its time is over."""
        left = [strike for strike in strikes if strike.lasts]
        while left:
            self._look()
            first = decided(self._events, struck)
            for strike in list(left):
                if self.is_over(strike, first, time.monotonic()):
                    left.remove(strike)
                    strike.heal_once()
            time.sleep(_POLL_S)

    @staticmethod
    def is_over(strike: Strike, first: Event | None, now: float) -> bool:
        """Whether it is time to put it right.

        :param first: by which it was decided who goes on; None: not yet.
        """
        lasted = now - strike.begun_at
        if lasted < strike.fault.seconds:
            return False
        if not strike.fault.patient or lasted >= PATIENCE_S:
            return True
        return first is not None and now - first.at >= _SETTLED_S

    # -- faults at a step -----------------------------------------------------------------

    def _step(self, fault: Fault) -> float:
        """Begin a new generation whose worker dies at a step; when it died.

        That worker may be lost before it comes to its step, on a machine that is too busy: then
        there is another generation, whose worker knows nothing of it, and all begins anew.
        """
        for _ in range(_STEP_ATTEMPTS):
            if died := self._try_step(fault):
                self._found.steps.append(died.step)
                return died.at
            self._found.missed.append(f"{fault.name}: its worker was lost before")
            self._cloud.mend()
        raise Void(f"{fault.name}: no worker came to it, {_STEP_ATTEMPTS} times")

    def _try_step(self, fault: Fault) -> Event | None:
        """The event of its death; None: its worker is gone, or does not come to it."""
        cloud, guest = self._cloud, self._session.guest
        self._end_protection()
        side: Literal["primary", "standby"] = "primary" if fault.side == "primary" else "standby"
        observed.arm(cloud.armed, side, f"{fault.step}:kill:{fault.nth}")
        armed = time.monotonic()
        try:
            pair, refused = cloud.protected(guest, self._options)
            self._found.refused += refused
            self._before(pair)
            self._session.traffic.go(self._pace.think_s)
            if fault.trigger:
                time.sleep(self._faults.moment_s)
                self._strike([self._trigger(fault, pair)])
            return self._wait_event(
                lambda event: event.kind == "fault" and event.at >= armed,
                _STEP_S,
                over=lambda: self._is_gone(armed),
            )
        finally:
            observed.disarm(cloud.armed)

    def _is_gone(self, armed: float) -> bool:
        """Whether the worker that took the fault is of a generation that is over."""
        taken = [event for event in self._events if event.kind == "taken" and event.at >= armed]
        row = self._cloud.row(self._session.guest.uuid)
        if not taken or row is None or row["state"] != "protected":
            return False
        return bool(row["generation"] > max(event.generation or 0 for event in taken))

    def _trigger(self, fault: Fault, pair: Pair) -> Strike:
        injector = Injector(self._cloud, self._session.guest, pair)
        if fault.trigger == "switchover":
            return injector.switchover(fault)
        trigger = Fault(fault.trigger, "primary", seconds=fault.seconds, patient=fault.patient)
        return injector.prepare(trigger)

    def _end_protection(self) -> None:
        """As an operator does: the next generation shall be one that has this worker."""
        cloud, uuid = self._cloud, self._session.guest.uuid

        def ended() -> bool:
            row = cloud.row(uuid)
            if row is not None and row["state"] == "unprotected":
                return True
            with contextlib.suppress(PmtError):
                cloud.ask("unprotect", self._session.guest.host.name, uuid)
            return False

        until(ended, _ORDER_S, "protection does not end", poll_s=0.2)

    def _wait_event(
        self,
        wanted: Callable[[Event], bool],
        timeout_s: float,
        over: Callable[[], bool] = lambda: False,
    ) -> Event | None:
        """The first that is wanted; None when there is none in time, or it is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._look()
            for event in self._events:
                if wanted(event):
                    return event
            if time.monotonic() > deadline or over():
                return None
            time.sleep(_POLL_S)

    # -- what it came to ------------------------------------------------------------------

    def _look(self) -> None:
        self._events += self._cloud.traces.read(self._session.guest.uuid)

    def _mended(self) -> None:
        """As far as it can be."""
        try:
            self._cloud.mend()
        except PmtError as error:
            self._blame([f"not put right: {error.message}"])

    def _judge(self) -> None:
        """The timeline of all that happened."""
        self._look()
        found = self._timeline.feed(sorted(self._events, key=lambda event: event.at))
        self._found.split_brain = len(found.split_brain)
        self._found.early_releases = len(found.early)
        self._blame(found.split_brain)
        self._blame(found.early)
        self._judge_frames()

    def _judge_frames(self) -> None:
        """What came out of the hosts, whatever they say of it."""
        late = wire.strays(self._cloud.wire.take(self._session.guest.spec.mac), self._timeline)
        self._found.stray_frames = sum(map(len, late.values()))
        for host in self._stopped():
            # What was let go of before a process was stopped comes out when it goes on.
            late.pop(host, None)
        self._found.split_brain += len(late)
        self._blame(wire.told(late))

    def _stopped(self) -> set[str]:
        """Hosts on which something was stopped."""
        hosts = {"primary": self._found.primary, "standby": self._found.standby}
        stops = (fault for fault in self._faults.faults if fault.kind.endswith("-stop"))
        return {hosts[fault.side] for fault in stops if fault.side}

    def _outcome(self, struck: float) -> None:
        """Who went on first, and when."""
        first = decided(self._events, struck)
        if first is None:
            return
        self._found.winner = "standby" if first.kind == "run" else "primary"
        if first.kind == "run":
            self._found.epoch = first.epoch
            self._found.failover_ms = round((first.at - struck) * 1e3, 1)

    def _leftovers(self) -> None:
        """What is being cleaned up just now is not left over, nor is what is being made.

        A pair that has come apart since, on a machine that is too busy, has its time to be
        protected again before one looks.
        """
        last = time.monotonic() + AGAIN_S
        deadline = time.monotonic() + CLEAN_S
        while found := self._cloud.leftovers(self._session.guest):
            row = self._cloud.row(self._session.guest.uuid)
            if row is None or row["state"] != "protected":
                deadline = min(last, time.monotonic() + CLEAN_S)
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        self._found.leftovers = len(found)
        self._blame(found)
