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

"""What both kinds of worker tell their agent, and their log, in the same words."""

from __future__ import annotations

from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent.control import Pair
from nova_pmt.worker.io import AgentChannel

LOG = log.getLogger(__name__)


class Side:
    """One side of a pair. A worker sets ``agent`` and ``_pair``."""

    agent: AgentChannel
    _pair: Pair

    def _state(self, state: str, reason: str, **details: Any) -> None:
        """Report a state; see :mod:`nova_pmt.agent.control`."""
        LOG.info(
            "%s: generation %d is %s: %s", self._pair.uuid, self._pair.generation, state, reason
        )
        self.agent.tell("state", state=state, reason=reason, details=details)

    def _end_with_error(self, error: exception.PmtError) -> None:
        """Report an error and the final state ``error``."""
        LOG.error("%s: %s", self._pair.uuid, error)
        self.agent.tell("error", error=error.to_dict())
        self._state("error", error.message)
