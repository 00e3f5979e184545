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
"""A TCP client that never stops asking, in a thread: what a server's users notice."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from nova_pmt.exception import LabError
from nova_pmt.lab.lab_guest import LabGuest
from nova_pmt.lab.transactions import Exchange

EVERY_S = 0.05
#: The longest silence that the connection is to live through, in seconds.
PATIENCE_S = 600.0


class Talker:
    """Sends a request, waits for its answer, pauses for 50 ms; one connection for all.

    :param guest: with the lab's transactional server.
    :param client: number that tells it from other clients of the guest.
    """

    def __init__(self, guest: LabGuest, client: int = 1) -> None:
        self._client = guest.transactions(client, PATIENCE_S)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="talker", daemon=True)
        self.problem = ""

    def _talk(self) -> None:
        try:
            while not self._end.is_set():
                self._client.request()
                self._end.wait(EVERY_S)
        except (OSError, LabError) as e:
            self.problem = f"{type(e).__name__}: {e}"

    @property
    def answered(self) -> list[Exchange]:
        """What was answered so far; times are CLOCK_MONOTONIC in seconds."""
        return [one for one in list(self._client.exchanges) if one.answered_at is not None]

    def wait_answer(self, after: float, timeout: float = PATIENCE_S) -> Exchange:
        """Wait for the first answer to a request that was sent after a moment.

        :raises LabError: the connection broke, or there is none in time.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for one in reversed(self.answered):
                if one.sent_at >= after:
                    return one
            if self.problem:
                raise LabError(f"the client's connection broke: {self.problem}")
            time.sleep(0.05)
        raise LabError(f"the client had no answer for {timeout:.0f} s")

    def gap(self, since: float = 0.0) -> tuple[float, float]:
        """The longest wait for an answer that came after ``since``: when it began, and seconds."""
        best = (since, 0.0)
        for one in self.answered:
            assert one.answered_at is not None
            if one.answered_at >= since and one.answered_at - one.sent_at > best[1]:
                best = (one.sent_at, one.answered_at - one.sent_at)
        return best

    def finish(self) -> int:
        """Stop asking, and let the server compare its disks with its memory; how many it holds.

        :raises LabError: the connection broke, or something is lost.
        """
        self._end.set()
        self._thread.join(PATIENCE_S)
        if self.problem:
            raise LabError(f"the client's connection broke: {self.problem}")
        answered = self.answered
        held = {(one.client, one.request): one.seq for one in self._client.dump()}
        lost = [one for one in answered if held.get((one.client, one.request)) != one.seq]
        if lost:
            raise LabError(f"{len(lost)} answered requests are lost, the first is {lost[0]}")
        return self._client.verify()

    def __enter__(self) -> Talker:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join(2 if error else PATIENCE_S)
        self._client.close()
