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

"""Versioned notifications: one for every change of a pair's state.

Event type ``nova_pmt.pair.<state>``, published as ``nova-pmt-agent.<host>``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from nova_pmt import outbox
from nova_pmt.agent.control import Pair

#: States of which an operator should hear at night.
_LEVELS: MappingProxyType[str, outbox.Level] = MappingProxyType(
    {
        "primary_alone": "warn",
        "failing_over": "warn",
        "standby_active": "warn",
        "undecided": "warn",
        "error": "error",
    }
)


def payload(
    pair: Pair, host: str, state: str, previous_state: str | None, reason: str, at: float
) -> dict[str, Any]:
    """The payload of one change.

    :param at: seconds since 1970.
    """
    return outbox.payload(
        "PairPayload",
        at,
        uuid=pair.uuid,
        name=pair.name,
        generation=pair.generation,
        primary_host=pair.primary_host,
        standby_host=pair.standby_host,
        state=state,
        previous_state=previous_state,
        reason=reason,
        host=host,
    )


class Notifications(outbox.Outbox):
    """An agent's."""

    def __init__(self, notifier: outbox.OsloNotifier | None) -> None:
        super().__init__(notifier, "pair", _LEVELS)
