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

"""What Nova really sends makes managers look at the right servers; nothing else does, or harms.

``notifications.json`` was written by ``tests/functional_nova/record_notifications.py``.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oslo_config import cfg

from nova_pmt import exception
from nova_pmt.conf import opts
from nova_pmt.messaging import oslo_messaging
from nova_pmt.openstack.notifications import EVENTS, Endpoint, Listener, servers_of

RECORDED = json.loads(Path(__file__).with_name("notifications.json").read_text())
SERVER, STANDBY = RECORDED["server"], RECORDED["standby"]
ENDED = (
    "create", "delete", "pause", "unpause", "suspend", "resume", "power_off", "power_on", "shelve",
    "shelve_offload", "unshelve", "shutdown",
)  # fmt: skip
_WAIT_S = 30.0


def of(event_type: str, *, standby: bool = False) -> dict[str, Any]:
    """What was recorded."""
    for sent in RECORDED["sent"]:
        data = sent["payload"]["nova_object.data"]
        if sent["event_type"] == event_type and (data.get("uuid") == STANDBY) is standby:
            found: dict[str, Any] = sent
            return found
    raise LookupError(event_type)


# -- which servers ----------------------------------------------------------------------


@pytest.mark.parametrize("operation", ENDED)
def test_what_ended_says_which_server(operation: str) -> None:
    assert list(servers_of(of(f"instance.{operation}.end")["payload"])) == [SERVER]


@pytest.mark.parametrize("operation", ["create", "delete", "shutdown"])
def test_a_standby_is_looked_at_with_the_server_that_it_stands_by_for(operation: str) -> None:
    payload = of(f"instance.{operation}.end", standby=True)["payload"]
    assert list(servers_of(payload)) == [STANDBY, SERVER]


def test_a_property_that_is_set_on_a_running_server_is_heard_of() -> None:
    sent = RECORDED["property_set"]
    assert (sent["event_type"], list(servers_of(sent["payload"]))) == ("instance.update", [SERVER])
    assert sent["payload"]["nova_object.data"]["state"] == "active"


@pytest.mark.parametrize(
    "event_type",
    ["instance.update", "instance.evacuate", "instance.lock", "instance.create.error",
     "instance.live_migration_post_dest.end", "instance.interface_attach.end",
     *(f"instance.{operation}.end" for operation in ENDED)],
)  # fmt: skip
def test_what_has_changed_a_server_is_listened_to(event_type: str) -> None:
    assert EVENTS.match(event_type)


@pytest.mark.parametrize(
    "event_type",
    ["instance.exists", "flavor.update", "service.create", "scheduler.select_destinations.end",
     "compute.instance.create.end", *(f"instance.{operation}.start" for operation in ENDED)],
)  # fmt: skip
def test_what_begins_or_is_of_no_server_is_not(event_type: str) -> None:
    assert not EVENTS.match(event_type)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40) | st.just(SERVER),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["nova_object.data", "uuid", "metadata", "pmt:protects"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_whatever_comes_names_servers_or_nothing(payload: Any) -> None:
    for uuid in servers_of(payload):
        assert uuid == SERVER


# -- the endpoint -----------------------------------------------------------------------


@pytest.mark.parametrize("level", ["info", "warn", "error"])
def test_a_message_never_comes_back(level: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(uuid: str) -> None:
        raise RuntimeError("cannot look now")

    hear = getattr(Endpoint(fail), level)
    with caplog.at_level(logging.ERROR):
        answer = hear({}, "nova-compute:a", "instance.update", of("instance.update")["payload"], {})
    assert answer == oslo_messaging.NotificationResult.HANDLED
    assert "cannot look now" in caplog.text
    assert hear({}, "x", "instance.update", None, {}) == oslo_messaging.NotificationResult.HANDLED


# -- over a message bus -----------------------------------------------------------------


@pytest.fixture
def conf() -> Any:
    made = cfg.ConfigOpts()
    opts.register(made)
    made([], default_config_files=[], default_config_dirs=[])
    return made


class Nova:
    """Sends as Nova does: to two topics of its own exchange."""

    def __init__(self, url: str) -> None:
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[], default_config_dirs=[])
        oslo_messaging.get_notification_transport(conf, url=url)  # registers control_exchange
        conf.set_override("control_exchange", "nova")
        transport = oslo_messaging.get_notification_transport(conf, url=url)
        self._notifier = oslo_messaging.Notifier(
            transport,
            driver="messagingv2",
            topics=["versioned_notifications", "pmt_notifications"],
        )

    def send(self, sent: dict[str, Any], level: str = "info", **changes: Any) -> None:
        message = {**sent, **changes}
        notifier = self._notifier.prepare(publisher_id=message["publisher_id"])
        getattr(notifier, level)({}, message["event_type"], message["payload"])


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A bus of the test's own."""
    return f"fake://{abs(hash(request.node.nodeid))}/"


@pytest.fixture
def heard() -> queue.Queue[str]:
    return queue.Queue()


@pytest.fixture
def nova(conf: Any, url: str, heard: queue.Queue[str]) -> Iterator[Nova]:
    """With a manager that listens."""
    conf.set_override("notification_transport_url", url, "nova")
    listener = Listener(conf, heard.put)
    listener.start()
    assert listener.wait(_WAIT_S)
    yield Nova(url)
    listener.close()
    listener.close()


def test_a_server_is_looked_at_when_nova_sent_that_it_changed(
    nova: Nova, heard: queue.Queue[str]
) -> None:
    nova.send(of("instance.power_on.end"))
    assert heard.get(timeout=_WAIT_S) == SERVER
    nova.send(of("instance.create.end", standby=True))
    assert [heard.get(timeout=_WAIT_S) for _ in range(2)] == [STANDBY, SERVER]


def test_failures_are_sent_at_another_level_and_heard_too(
    nova: Nova, heard: queue.Queue[str]
) -> None:
    nova.send(of("instance.create.end"), "error", event_type="instance.create.error")
    assert heard.get(timeout=_WAIT_S) == SERVER


def test_what_is_no_concern_of_ours_is_taken_off_the_queue(
    nova: Nova, heard: queue.Queue[str]
) -> None:
    nova.send(of("instance.exists"))
    nova.send(of("instance.pause.start"))
    nova.send(of("instance.pause.end"), payload={"nova_object.data": {"uuid": "../etc"}})
    nova.send(of("instance.delete.end", standby=True))
    assert [heard.get(timeout=_WAIT_S) for _ in range(2)] == [STANDBY, SERVER]
    assert heard.empty()


def test_a_look_that_fails_does_not_end_listening(conf: Any, url: str) -> None:
    seen: queue.Queue[str] = queue.Queue()
    failed = threading.Event()

    def touch(uuid: str) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("the first time")
        seen.put(uuid)

    conf.set_override("notification_transport_url", url, "nova")
    listener = Listener(conf, touch)
    listener.start()
    assert listener.wait(_WAIT_S)
    nova = Nova(url)
    nova.send(of("instance.pause.end"))
    nova.send(of("instance.unpause.end"))
    assert seen.get(timeout=_WAIT_S) == SERVER
    listener.close()
    assert failed.is_set()


def test_a_manager_without_address_of_its_own_takes_the_one_of_all(
    conf: Any, url: str, heard: queue.Queue[str]
) -> None:
    oslo_messaging.get_notification_transport(conf, url=url)  # registers transport_url
    conf.set_override("transport_url", url)
    listener = Listener(conf, heard.put)
    listener.start()
    assert listener.wait(_WAIT_S)
    Nova(url).send(of("instance.resume.end"))
    assert heard.get(timeout=_WAIT_S) == SERVER
    listener.close()


def test_a_wrong_address_is_said_without_its_password(conf: Any) -> None:
    conf.set_override("notification_transport_url", "rabid://nova:hunter2@bus/", "nova")
    with pytest.raises(exception.ConfigError) as caught:
        Listener(conf, print)
    text = str(caught.value)
    assert "notification_transport_url" in text and "hunter2" not in text


def test_closing_before_the_bus_was_there_ends_it_as_well(conf: Any, url: str) -> None:
    conf.set_override("notification_transport_url", url, "nova")
    listener = Listener(conf, print)
    listener.close()
    listener.start()
    assert not listener.wait(0.5)
