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

"""Beginning one generation of a pair from its primary's host, or undoing what was begun."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent.control import Pair, PrimarySpec
from nova_pmt.agent.pairs import Entry
from nova_pmt.agent.parts import Parts
from nova_pmt.agent.supervisor import Worker
from nova_pmt.arbiter.base import Arrangement

LOG = log.getLogger(__name__)


class Beginner:
    """Makes standby and primary worker of a generation, in this order."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def new_generation(self, uuid: str) -> int:
        """A number that was never decided upon.

        :raises nova_pmt.exception.PmtError: the arbiter or the clock does not allow one.
        """
        generation = self._parts.generations.next(uuid)
        for _ in range(100):
            # A clock that was set back: what was decided before must not decide again.
            if self._parts.arbiter.winner(uuid, generation) is None:
                return generation
            generation = self._parts.generations.next(uuid)
        raise exception.ConfigError(
            f"the next 100 generations of {uuid} are all decided at the arbiter",
            cure="Set this host's clock right (NTP), then try again.",
        )

    def announce(self, entry: Entry) -> None:
        """Begin the generation at the arbiter; can be done again.

        :raises nova_pmt.exception.PmtError: another host has the guest, or nobody could be asked.
        """
        record = entry.record
        self._parts.arbiter.begin(
            Arrangement(**asdict(entry.pair), strategy=record.strategy, options=record.options)
        )

    def start(self, entry: Entry) -> Worker:
        """Make the standby, then start the worker; undo both, in reverse, when it fails.

        :returns: the worker, whose first synchronisation is under way.
        :raises nova_pmt.exception.PmtError: it failed and was undone.
        """
        parts, pair = self._parts, entry.pair
        record = entry.record
        description = parts.host.describe(pair.uuid)
        self.announce(entry)
        with contextlib.ExitStack() as undo:
            # Before the call: when only its answer gets lost the standby exists all the same.
            undo.callback(self.released, pair)
            place = parts.api.prepare_standby(
                pair.standby_host,
                pair=asdict(pair),
                domain_xml=description.domain_xml,
                layout=description.layout,
                disks=description.disks,
            )
            spec = PrimarySpec(
                pair, str(place["address"]), int(place["port"]), record.strategy, record.options
            )
            worker = parts.supervisor.start(spec, entry.on_event, entry.on_exit)
            undo.callback(worker.stop, parts.timing.stop_s)
            with entry.changed:
                entry.worker = worker
                entry.changed.wait_for(
                    lambda: entry.begun or worker.outcome, parts.timing.worker_start_s
                )
                if not entry.begun:
                    raise self._not_begun(entry, worker)
            undo.pop_all()
        self.pass_on(entry)  # an operator may have changed their mind meanwhile
        return worker

    def _not_begun(self, entry: Entry, worker: Worker) -> exception.PmtError:
        outcome = worker.outcome
        if outcome is None:
            limit_s = self._parts.timing.worker_start_s
            return exception.WorkerDied(
                f"the primary worker of {entry.uuid} did not begin within {limit_s:g} s",
                cure="See the worker's log; [agent] worker_start_timeout_s bounds the wait.",
            )
        if outcome.error is not None:
            return outcome.error
        return exception.WorkerDied(
            f"the primary worker of {entry.uuid} ended as {outcome.state}: {outcome.reason}"
        )

    def released(self, pair: Pair, *, forget: bool = False) -> bool:
        """Whether it is sure that no standby of this generation is left that could go on.

        :param forget: delete the images of its disks as well.
        """
        try:
            answer = self._parts.api.release_standby(
                pair.standby_host, uuid=pair.uuid, generation=pair.generation, forget=forget
            )
        except exception.PmtError as error:
            LOG.warning("%s: its standby on %s: %s", pair.uuid, pair.standby_host, error)
            return False
        return bool(answer.get("gone"))

    def pass_on(self, entry: Entry) -> None:
        """Tell the worker when protection is not wanted any more."""
        with entry.changed:
            if entry.wanted or entry.worker is None or entry.worker.outcome is not None:
                return
            worker = entry.worker
        with contextlib.suppress(exception.WorkerDied):  # then its end is decided upon anyway
            worker.command("unprotect")
