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

"""Everything that can be known before a pair is begun: all refusals, nothing changed."""

from __future__ import annotations

from dataclasses import dataclass, field

from nova_pmt import exception
from nova_pmt.agent import pairs
from nova_pmt.agent.host import DomainInfo
from nova_pmt.agent.pairs import Entry
from nova_pmt.agent.parts import Parts


@dataclass(frozen=True)
class Findings:
    """Why a domain cannot be protected (nothing: it can), and what to be warned of."""

    refusals: list[exception.PmtError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Prechecks:
    """The checks of both sides, asked from the primary's host."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def find(self, info: DomainInfo, standby_host: str | None, again: bool = False) -> Findings:
        """Look at everything; the standby's host is asked only when there is one.

        :param again: the domain is in a pair of ours already, which is begun anew.
        """
        found = Findings()
        try:
            self._look(info, standby_host, again, found)
        except exception.PmtError as error:
            found.refusals.append(error)
        return found

    def demand(self, info: DomainInfo, standby_host: str, again: bool = False) -> None:
        """Raise the first refusal.

        :raises nova_pmt.exception.PmtError: its detail ``also`` has the others.
        """
        refusals = self.find(info, standby_host, again).refusals
        if refusals:
            first, *others = refusals
            if others:
                first.details["also"] = [other.to_dict() for other in others]
            raise first

    def demand_again(self, entry: Entry, standby_host: str) -> None:
        """The same for a pair that is to be begun anew.

        :raises nova_pmt.exception.PmtError: it cannot be, now.
        """
        info = DomainInfo(entry.uuid, entry.pair.name, running=True)
        self.demand(info, standby_host, again=True)

    def _look(
        self, info: DomainInfo, standby_host: str | None, again: bool, found: Findings
    ) -> None:
        parts, uuid = self._parts, info.uuid
        known = parts.pairs.settled(uuid, parts.timing.settle_s)
        if known is not None and not again:
            raise pairs.already_protected(known)
        if standby_host == parts.name:
            found.refusals.append(
                exception.SameHost(f"{standby_host} is the host on which {uuid} runs")
            )
        if not info.running:
            raise exception.NotRunning(f"domain {uuid} ({info.name}) does not run on {parts.name}")
        refusals, warnings = parts.host.check(uuid)
        found.refusals.extend(refusals)
        found.warnings.extend(warnings)
        if standby_host is None or found.refusals:
            return
        description = parts.host.describe(uuid)
        answers = parts.api.check_standby(
            standby_host,
            uuid=uuid,
            memory_bytes=description.memory_bytes,
            arbiter_token=parts.arbiter.challenge(uuid),
            primary_host=parts.name,
            disks=description.disks,
        )
        found.refusals.extend(exception.from_dict(answer) for answer in answers)
