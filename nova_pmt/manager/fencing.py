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

"""Making sure that a host is off before its standbys may go on.

Not needed for the product's own safety: a primary that cannot ask holds its output. It is for what
nova_pmt does not watch over on that host, and for ``on_isolation = release``. Plug-ins
``nova_pmt.fences``; with one configured the arbiter lets a standby win only after it said that the
primary's host is off.
"""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from oslo_log import log

from nova_pmt import exception

LOG = log.getLogger(__name__)

_OUTPUT_CHARACTERS = 500


class Fence(ABC):
    """The contract of a fence. Made with the loaded configuration: ``fence(conf)``."""

    #: False: every host counts as fenced, and nothing is asked.
    needed = True

    @abstractmethod
    def __init__(self, conf: Any) -> None: ...

    @abstractmethod
    def fence(self, host: str) -> None:
        """Turn a host off, and return when it is. May be called again for one that is off.

        :raises nova_pmt.exception.FencingFailed: it is not known to be off.
        """


class NoFence(Fence):
    """Nobody is turned off."""

    needed = False

    def __init__(self, conf: Any) -> None:
        pass

    def fence(self, host: str) -> None:
        """See the interface."""


class CommandFence(Fence):
    """``[manager] fence_command`` with the host's name as last argument; status 0: it is off."""

    def __init__(self, conf: Any) -> None:
        self._argv = shlex.split(conf.manager.fence_command)
        self._timeout_s = conf.manager.fence_timeout_s
        if not self._argv:
            raise exception.ConfigError(
                "[manager] fence is 'command', but fence_command is empty",
                cure="Set it to a program that turns a host off, such as a script around ipmitool.",
            )

    def fence(self, host: str) -> None:
        """See the interface."""
        try:
            # Host names were validated: none begins with a hyphen. No shell sees it.
            done = subprocess.run(
                [*self._argv, host],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise exception.FencingFailed(f"{host}: {error}") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-_OUTPUT_CHARACTERS:]
            raise exception.FencingFailed(
                f"{host}: {self._argv[0]} ended with {done.returncode}: {said}"
            )


class Fencing:
    """Fences hosts side by side, each once for all claims that want it. Nobody waits for one: a
    claim is asked again, and what answers claims has few threads.

    :param remember_s: for how long a host that was fenced counts as such.
    """

    def __init__(
        self,
        fence: Fence,
        *,
        remember_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fence = fence
        self._remember_s = remember_s
        self._clock = clock
        self._lock = threading.Lock()
        self._work: dict[str, Future[float]] = {}
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="fence")

    @property
    def needed(self) -> bool:
        """Whether hosts are turned off at all."""
        return self._fence.needed

    def demand(self, host: str) -> None:
        """Return if the host is off; else see that it is being turned off.

        :raises nova_pmt.exception.FencingFailed: it is not, or not yet: ask again.
        """
        if not self.needed:
            return
        with self._lock:
            before = self._work.get(host)
            if before is None or self._is_over(before):
                LOG.warning("host %s is being fenced", host)
                self._work[host] = self._pool.submit(self._turn_off, host)
            elif before.done():
                return
        failure = before.exception() if before is not None and before.done() else None
        if failure is None:
            raise exception.FencingFailed(f"{host} is being turned off")
        text = failure.message if isinstance(failure, exception.PmtError) else repr(failure)
        raise exception.FencingFailed(f"{text} (it is tried again)") from failure

    def _turn_off(self, host: str) -> float:
        """Returns when it was off."""
        try:
            self._fence.fence(host)
        except exception.FencingFailed as error:
            LOG.error("host %s could not be fenced: %s", host, error)
            raise
        LOG.warning("host %s is off", host)
        return self._clock()

    def _is_over(self, future: Future[float]) -> bool:
        """A failure is tried again at once; a success counts for a while."""
        if not future.done():
            return False
        if future.exception() is not None:
            return True
        return self._clock() - future.result() > self._remember_s

    def close(self) -> None:
        """Begin no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
