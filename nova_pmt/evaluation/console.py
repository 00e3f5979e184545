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

"""The operator's API in ctl, without the second that each start of ``nova-pmt`` takes.

:class:`Console` starts this module as a program inside ctl, where the message bus is; the two speak
JSON, a line for each question and each answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

from nova_pmt import exception
from nova_pmt.exception import LabError
from nova_pmt.lab import Lab, deployment, process

_END_S = 5.0


class Console:
    """Asks agents; a context manager. For one thread at a time, others wait."""

    def __init__(self, lab: Lab) -> None:
        argv = [sys.executable, "-m", "nova_pmt.evaluation.console", deployment.CONFIG]
        self._lock = threading.Lock()
        with (lab.ctl.log_directory / "ctl-console.log").open("ab") as log:
            self._process = subprocess.Popen(
                process.enter(lab.ctl.init_pid, argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=process.environment(),
                start_new_session=True,
            )

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of :class:`nova_pmt.agent.rpcapi.AgentAPI`.

        :raises nova_pmt.exception.PmtError: what the agent raised, or that it does not answer.
        :raises LabError: the console has ended.
        """
        question = {"method": method, "arguments": arguments, "named": named}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
            except OSError as error:
                raise LabError(f"the console in ctl has ended: {error}") from error
            line = self._process.stdout.readline()
        if not line:
            raise LabError("the console in ctl has ended", cure="See logs/ctl-console.log.")
        answer = json.loads(line)
        if "error" in answer:
            raise exception.from_dict(answer["error"])
        return answer["result"]

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its end
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Inside ctl: answer until there are no more questions."""
    from oslo_config import cfg

    from nova_pmt.agent.rpcapi import AgentAPI
    from nova_pmt.conf import opts
    from nova_pmt.messaging import oslo_messaging

    conf = cfg.CONF  # see nova_pmt.messaging
    opts.register(conf)
    conf(["--config-file", sys.argv[1]], project="nova_pmt", prog="nova-pmt")
    api = AgentAPI(oslo_messaging.get_rpc_transport(conf), conf.client.timeout_s)
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any]
        try:
            method = getattr(api, question["method"])
            answer = {"result": method(*question["arguments"], **question["named"])}
        except exception.PmtError as error:
            answer = {"error": error.to_dict()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
