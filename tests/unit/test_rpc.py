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

"""RPC servers: how many threads answer. Callers: what a message bus that is away costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from oslo_config import cfg

from nova_pmt import exception, rpc
from nova_pmt.messaging import oslo_messaging


@pytest.mark.parametrize(("threads", "found"), [(None, 64), (16, 16)])
def test_a_server_has_its_number_of_threads(threads: int | None, found: int) -> None:
    conf = cfg.ConfigOpts()
    transport = oslo_messaging.get_rpc_transport(conf, "fake://")
    server = rpc.server(transport, "topic", "name", object(), threads)
    assert server.conf.executor_thread_pool_size == found


def test_an_operator_has_the_last_word() -> None:
    conf = cfg.ConfigOpts()
    transport = oslo_messaging.get_rpc_transport(conf, "fake://")
    rpc.server(transport, "topic", "name", object())
    conf.set_override("executor_thread_pool_size", 5)
    server = rpc.server(transport, "topic", "name", object(), 16)
    assert server.conf.executor_thread_pool_size == 5


class Bus:
    """An oslo.messaging client whose calls come back only while the bus is there."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.asked = 0
        self.lost = False

    def prepare(self, **_options: Any) -> Bus:
        return self

    def call(self, _context: Any, method: str, **_arguments: Any) -> Any:
        self.asked += 1
        assert self.there.wait(30)
        if self.lost:
            raise oslo_messaging.MessagingTimeout
        return {"result": method}


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    found = Bus()
    monkeypatch.setattr(rpc.oslo_messaging, "get_rpc_client", lambda *_args: found)
    monkeypatch.setattr(rpc, "_GRACE_S", 0.0)
    yield found
    found.there.set()


def held_up() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rpc-ask-")]


def wait_until_free() -> None:
    for thread in held_up():
        thread.join(30)
        assert not thread.is_alive()


def test_a_bus_that_is_away_holds_few_threads_however_often_it_is_asked(bus: Bus) -> None:
    caller = rpc.Caller(None, "topic", "nova-pmt-agent")
    for _ in range(20):
        with pytest.raises(exception.HostUnreachable, match="agent on b: the message bus does not"):
            caller.call("b", "ask", 0.01, {})
    assert len(held_up()) == 4
    before = time.monotonic()
    with pytest.raises(exception.HostUnreachable, match="nova-pmt-agent: the message bus") as found:
        caller.call(None, "ask", 30.0, {})
    assert time.monotonic() - before < 10, "nobody waits for a bus that is known to be away"
    assert found.value.details["host"] == ""
    bus.there.set()
    wait_until_free()
    assert caller.call("b", "ask", 30.0, {}) == "ask"
    assert bus.asked == 5


def test_a_bus_that_is_back_for_one_call_is_asked_again(bus: Bus) -> None:
    """Dead threads do not count, whatever became of their calls."""
    caller = rpc.Caller(None, "topic", "nova-pmt-agent")
    bus.lost = True
    for _ in range(3):
        for _ in range(3):
            with pytest.raises(exception.HostUnreachable, match="bus"):
                caller.call("b", "ask", 0.01, {})
        bus.there.set()
        wait_until_free()
        bus.there.clear()
    assert bus.asked == 9


def test_a_server_that_does_not_answer_is_no_bus_that_is_away(bus: Bus) -> None:
    caller = rpc.Caller(None, "topic", "nova-pmt-agent")
    bus.lost = True
    bus.there.set()
    for _ in range(10):
        with pytest.raises(exception.HostUnreachable, match="no answer within 30 s"):
            caller.call("b", "ask", 30.0, {})
    assert bus.asked == 10
