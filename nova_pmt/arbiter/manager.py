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

"""The managers as arbiter: a compare-and-swap on the pair's row in their database."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from nova_pmt import exception
from nova_pmt.arbiter.base import Arbiter, Arrangement, Side
from nova_pmt.manager.rpcapi import ManagerAPI
from nova_pmt.messaging import oslo_messaging

T = TypeVar("T")
#: Of no server; asked about only to have the connection ready.
_NOBODY = "00000000-0000-0000-0000-000000000000"


class ManagerArbiter(Arbiter):
    """Asks any manager over the message bus; ``[manager] call_timeout_s`` bounds each question."""

    def __init__(self, conf: Any) -> None:
        transport = oslo_messaging.get_rpc_transport(conf)
        self._api = ManagerAPI(transport, timeout_s=conf.manager.call_timeout_s)

    def warm(self) -> None:
        with contextlib.suppress(exception.PmtError):
            self._api.winner(_NOBODY, 1)

    def begin(self, arrangement: Arrangement) -> None:
        self._ask(lambda: self._api.begin(dataclasses.asdict(arrangement)))

    def claim(
        self,
        pair: str,
        generation: int,
        side: Side,
        *,
        reason: str = "",
        other_stopped: bool = False,
    ) -> bool:
        return self._ask(
            lambda: self._api.claim(
                pair, generation, side, reason=reason, other_stopped=other_stopped
            )
        )

    def winner(self, pair: str, generation: int) -> Side | None:
        found = self._ask(lambda: self._api.winner(pair, generation))
        if found == "primary":
            return "primary"
        return "standby" if found == "standby" else None

    def challenge(self, pair: str) -> str:
        return self._ask(lambda: self._api.challenge(pair))

    def answer(self, pair: str, token: str) -> bool:
        return self._ask(lambda: self._api.answer(pair, token))

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except (exception.PairMismatch, exception.ArbiterUnavailable, exception.InvalidInput):
            raise
        except exception.PmtError as error:
            raise exception.ArbiterUnavailable(
                f"no manager could decide: {error.message}",
                cure="Check the message bus, and that nova-pmt-manager runs; whoever waits goes on "
                "by itself.",
            ) from error
