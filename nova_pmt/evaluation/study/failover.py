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

"""The guest's QEMU dies under the scenario's load: for how long no client is answered."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from nova_pmt.bench import loads
from nova_pmt.evaluation.study.cell import SETTLE_S, Place
from nova_pmt.exception import LabError
from nova_pmt.lab import LabGuest, LabHost

_ASK_S = 0.002
_ANSWER_S = 60.0


class _Client:
    """Asks all the time, over one TCP connection, and notes when it is answered."""

    def __init__(self, guest: LabGuest) -> None:
        self._guest = guest
        self._news = threading.Condition()
        self._latest = 0.0
        self._error: Exception | None = None
        self._end = False
        self._thread = threading.Thread(target=self._ask, name="client", daemon=True)

    def __enter__(self) -> _Client:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end = True
        self._thread.join(_ANSWER_S)

    def _ask(self) -> None:
        try:
            with self._guest.connect(timeout=_ANSWER_S) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while not self._end:
                    loads.exchange(connection)
                    with self._news:
                        self._latest = time.monotonic()
                        self._news.notify_all()
                    time.sleep(_ASK_S)
        except (OSError, LabError) as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def answered(self, after: float) -> float:
        """When it was answered first (nearly) since then, of CLOCK_MONOTONIC.

        :raises LabError: it is not.
        """
        with self._news:
            self._news.wait_for(lambda: self._latest > after or self._error, _ANSWER_S)
            if self._latest <= after:
                raise LabError(f"the client is not answered any more: {self._error or 'no answer'}")
            return self._latest


def measure(
    place: Place,
    guest: LabGuest,
    standby: LabHost,
    *,
    interval_ms: float,
    epoch_limit_ms: float,
) -> tuple[dict[str, Any], LabGuest]:
    """The row, and the guest where it runs then: ``failover_ms`` from the death of QEMU to the
    first answer of the standby, with what the client's TCP makes of it; ``activation_ms`` from when
    the standby's worker knew until the guest ran.

    :raises nova_pmt.exception.PmtError: the lab or the product failed.
    """
    with (
        place.protect(guest, standby, interval_ms, epoch_limit_ms) as protection,
        place.scenario.driven(guest, SETTLE_S),
        _Client(guest) as client,
    ):
        client.answered(time.monotonic() + SETTLE_S)
        moved, killed, details = protection.fail_over()
        back = client.answered(details["running_at"])
    row = {
        **place.facts(),
        "failover_ms": round((back - killed) * 1e3, 3),
        "activation_ms": float(details["failover_ms"]),
    }
    return row, moved
