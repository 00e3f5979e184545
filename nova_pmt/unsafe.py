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

"""What tests take away, to see that they notice: never for anybody else.

``NOVA_PMT_UNSAFE`` in the environment of agents, or of a worker, names it. Without it nothing here
does anything.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from nova_pmt.checkpoint.wrapped import Wrapped

VARIABLE = "NOVA_PMT_UNSAFE"
#: Packets are not held.
UNBUFFERED = "no-egress-buffer"
#: Packets are held until the end of their epoch, and not until it is committed.
AT_ONCE = "release-at-once"
#: Whoever claims has won, whatever the arbiter says.
UNDECIDED = "no-arbiter"

LOG = logging.getLogger(__name__)


def asked(what: str) -> bool:
    """Whether this is to be done without."""
    if os.environ.get(VARIABLE) != what:
        return False
    LOG.warning("%s=%s: NOT safe", VARIABLE, what)
    return True


class ReleasedAtOnce(Wrapped):
    """An output buffer whose epochs are let out as soon as they end."""

    def cut(self, epoch: int) -> None:
        super().cut(epoch)
        super().release(epoch)

    def release(self, epoch: int) -> float | None:
        return None


def everybody_wins(arbiter: Any) -> Any:
    """An arbiter that asks, and lets whoever claims go on."""
    claim = arbiter.claim

    def won(*arguments: Any, **named: Any) -> bool:
        try:
            claim(*arguments, **named)
        except Exception as error:  # noqa: BLE001  whatever it says
            LOG.warning("the arbiter is not listened to: %s", error)
        return True

    arbiter.claim = won
    return arbiter
