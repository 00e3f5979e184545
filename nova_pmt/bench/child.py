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

"""Starts the measuring process inside a host, and talks to it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from nova_pmt import exception
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.process import enter, environment

Progress = Callable[[int, int], None]


class Child:
    """One measuring process; a context manager.

    :param module: what ``python -m`` runs.
    :param first: its first line.
    """

    def __init__(self, host: LabHost, module: str, first: dict[str, Any]) -> None:
        self._log = host.log_directory / f"{host.name}-bench.log"
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                enter(host.init_pid, [sys.executable, "-m", module]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                start_new_session=True,  # Ctrl-C is for us
            )
        self.started: dict[str, Any] = {}
        try:
            self.started = self.ask(first)
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
        """Send one request and wait for its answer.

        :param progress: called with rounds done and rounds to do.
        :raises nova_pmt.exception.PmtError: it failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "progress" in answer:
                if progress is not None:
                    progress(int(answer["progress"]), int(answer["total"]))
            elif answer["done"] == "error":
                raise exception.from_dict(answer["error"])
            else:
                return answer
        try:
            text = self._log.read_text(errors="replace")[-2000:].strip()
        except OSError:
            text = "no log"
        raise exception.PmtError(
            f"the measuring process ended: {text}",
            code="BENCH_FAILED",
            cure="This is a fault of nova-pmt-bench: report it with this message.",
        )

    def close(self) -> None:
        """End it: it takes the tracker out of QEMU and closes its monitor."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # nsenter; its child ends with the host at the latest
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
