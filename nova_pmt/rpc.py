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

"""Calls over the message bus: bounded in time, and with our own errors.

Every answer is an envelope, ``{"result": ...}`` or ``{"error": {code, message, cure, details}}``:
oslo.messaging's own way of passing exceptions would lose code, cure and details.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.messaging import oslo_messaging

LOG = log.getLogger(__name__)

#: Named here and not by control_exchange: agents, managers and command line must agree on it.
EXCHANGE = "nova_pmt"
VERSION = "1.0"
#: A server that is alive says so at least this often while it works on a long call, in seconds.
_ALIVE_S = 10
#: Beyond the timeout: oslo.messaging may wait for ever for a broker that is not there.
_GRACE_S = 3.0
#: So many calls that did not come back say that the bus is away: each holds a thread until it is
#: back, however often it is asked.
_MOST_STUCK = 4
_NO_BUS = "the message bus does not answer"

Envelope = dict[str, Any]


class Caller:
    """Calls the servers of one topic.

    :param what: their command, for errors.
    """

    def __init__(self, transport: Any, topic: str, what: str) -> None:
        target = oslo_messaging.Target(exchange=EXCHANGE, topic=topic, version=VERSION)
        self._client = oslo_messaging.get_rpc_client(transport, target)
        self._what = what
        self._lock = threading.Lock()
        self._stuck: list[threading.Thread] = []

    def call(
        self, server: str | None, method: str, timeout_s: float, arguments: dict[str, Any]
    ) -> Any:
        """Call one server, or any.

        :raises nova_pmt.exception.HostUnreachable: no answer in time; at once while the message bus
            holds earlier calls.
        :raises nova_pmt.exception.PmtError: what it raised there.
        """
        where = self._what if server is None else f"{self._what} on {server}"
        if self._is_held_up():
            raise exception.HostUnreachable(f"{where}: {_NO_BUS}", host=server or "")
        prepared: dict[str, Any] = {} if server is None else {"server": server}
        context = self._client.prepare(
            timeout=timeout_s,
            # A host that is dead is noticed long before the timeout of a call that takes long.
            call_monitor_timeout=_ALIVE_S if timeout_s > _ALIVE_S else None,
            retry=1,
            **prepared,
        )
        answer: dict[str, Any] = {}

        def call() -> None:
            try:
                answer["envelope"] = context.call({}, method, **arguments)
            except oslo_messaging.MessagingTimeout:
                answer["failed"] = f"no answer within {timeout_s:g} s"
            except oslo_messaging.MessagingException as error:
                answer["failed"] = str(error)
            except Exception as error:  # noqa: BLE001 - drivers raise their libraries' own, too
                answer["failed"] = f"{type(error).__name__}: {error}"

        # In a thread: a message bus that is away holds up a call for longer than its timeout.
        # (oslo.messaging makes its queue for replies under a lock, and tries for ever.)
        name = f"rpc-{method}-{server or 'any'}"
        thread = threading.Thread(target=call, name=name, daemon=True)
        thread.start()
        thread.join(timeout_s + _GRACE_S)
        if "envelope" in answer:
            return unwrap(answer["envelope"])
        if thread.is_alive():
            with self._lock:
                self._stuck.append(thread)
        why = answer.get("failed", _NO_BUS)
        raise exception.HostUnreachable(f"{where}: {why}", host=server or "")

    def _is_held_up(self) -> bool:
        with self._lock:
            self._stuck = [thread for thread in self._stuck if thread.is_alive()]
            return len(self._stuck) >= _MOST_STUCK


def unwrap(envelope: Any) -> Any:
    """The result in an envelope.

    :raises nova_pmt.exception.PmtError: the error in the envelope.
    """
    if isinstance(envelope, dict):
        if isinstance(envelope.get("error"), dict):
            raise exception.from_dict(envelope["error"])
        if "result" in envelope:
            return envelope["result"]
    raise exception.PeerError("the answer is not an envelope")


def enveloped(operation: Callable[..., Any]) -> Callable[..., Envelope]:
    """Answer with ``{"result": ...}`` or ``{"error": ...}``, and never raise."""

    @functools.wraps(operation)
    def answer(self: Any, ctxt: dict[str, Any], **arguments: Any) -> Envelope:
        name = operation.__name__
        try:
            try:
                call = functools.partial(operation, self, **arguments)
                return {"result": call()}
            except TypeError as error:
                if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                    # It comes from the call itself: the caller's arguments do not fit.
                    raise exception.InvalidInput(f"{name}: {error}") from error
                raise
        except exception.PmtError as error:
            LOG.info("%s(%s): %s", name, arguments.get("domain", arguments.get("uuid", "")), error)
            return {"error": error.to_dict()}
        except Exception as error:
            LOG.exception("%s failed", name)
            internal = exception.PmtError(f"{name} failed: {error!r}", code="INTERNAL")
            return {"error": internal.to_dict()}

    return answer


def server(transport: Any, topic: str, name: str, endpoint: Any, threads: int | None = None) -> Any:
    """An RPC server, not started.

    :param threads: that answer, unless the configuration says otherwise (64).
    """
    made = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(exchange=EXCHANGE, topic=topic, server=name),
        [endpoint],
        executor="threading",
    )
    if threads is not None:
        made.conf.set_default("executor_thread_pool_size", threads)
    return made
