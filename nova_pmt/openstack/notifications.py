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

"""Hears of Nova's servers from its versioned notifications.

A notification says nothing but that it is time to look at a server: what is believed of it is asked
of Nova's API. So one that is late, twice there, out of order or forged costs a look; one that got
lost costs the time until all servers are looked at (``[nova] reconcile_interval_s``).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import inputs
from nova_pmt.messaging import oslo_messaging
from nova_pmt.openstack import policy

LOG = log.getLogger(__name__)

#: What begins is of no interest, what ended or failed is; nor is what is sent of all servers for
#: billing. An evacuation's end is ``instance.rebuild.end``.
EVENTS = re.compile(r"instance\.(?!exists$)(?!.*\.start$)")
#: How long the bus may take to let go of a listener, in seconds.
_CLOSE_S = 5.0


def servers_of(payload: Any) -> Iterator[str]:
    """UUIDs of the servers that a notification is about: its own, and the one that it stands by
    for. Whatever is none is left out; never raises.

    :param payload: Nova's versioned one (``nova_object.data``).
    """
    data = payload.get("nova_object.data") if isinstance(payload, Mapping) else None
    if not isinstance(data, Mapping):
        return
    metadata = data.get("metadata")
    protects = metadata.get(policy.STANDBY) if isinstance(metadata, Mapping) else None
    for value in (data.get("uuid"), protects):
        try:
            yield inputs.uuid(value)
        except exception.InvalidInput:
            continue


class Endpoint:
    """What oslo.messaging calls. It acknowledges everything: a message that cannot be read would
    come back for ever.

    Each method brings a queue, since the level is part of its name; the ones that Nova uses.

    :param touch: look at this server; must not wait.
    """

    filter_rule = oslo_messaging.NotificationFilter(event_type=EVENTS.pattern)

    def __init__(self, touch: Callable[[str], None]) -> None:
        self._touch = touch

    def info(
        self, ctxt: Any, publisher_id: str, event_type: str, payload: Any, metadata: Any
    ) -> Any:
        """Most of them."""
        try:
            for uuid in servers_of(payload):
                LOG.debug("%s: %s of %s", uuid, event_type, publisher_id)
                self._touch(uuid)
        except Exception:  # it is looked at again with all others
            LOG.exception("%s of %s: not taken note of", event_type, publisher_id)
        return oslo_messaging.NotificationResult.HANDLED

    warn = info
    #: ``instance.create.error`` and the like.
    error = info


class Listener:
    """Listens in threads of its own; close it.

    Any number of managers share one queue: each notification is heard by one of them.

    :param conf: groups ``[nova]`` and ``[oslo_messaging_notifications]``.
    :raises nova_pmt.exception.ConfigError: the address of the message bus is wrong.
    """

    def __init__(self, conf: Any, touch: Callable[[str], None]) -> None:
        # An empty one is that of [oslo_messaging_notifications], or else of [DEFAULT].
        url = conf.nova.notification_transport_url or None
        target = oslo_messaging.Target(
            topic=conf.nova.notification_topic, exchange=conf.nova.notification_exchange
        )
        try:
            self._transport = oslo_messaging.get_notification_transport(conf, url=url)
            self._listener = oslo_messaging.get_notification_listener(
                self._transport, [target], [Endpoint(touch)], executor="threading"
            )
        except oslo_messaging.MessagingException as error:
            # (Never the address itself: it has a password.)
            raise exception.ConfigError(
                f"Nova's notifications cannot be listened to: {type(error).__name__}",
                cure="Correct [nova] notification_transport_url, or [DEFAULT] transport_url.",
            ) from error
        self._topic = conf.nova.notification_topic
        self._listening = threading.Event()
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin; does not wait for the message bus."""
        threading.Thread(target=self._start, name="notifications", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it listens."""
        return self._listening.wait(timeout_s)

    def _start(self) -> None:
        self._listener.start()  # waits for the message bus for as long as there is none
        if self._closed.is_set():
            self._listener.stop()
            return
        self._listening.set()
        LOG.info("Nova's notifications are heard from topic %s", self._topic)

    def close(self) -> None:
        """Hear no more; what is under way is taken note of. Can be done twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._listening.is_set():
            self._listener.stop()
            # In a thread: a message bus that is away may hold it up for ever.
            waiting = threading.Thread(target=self._listener.wait, daemon=True)
            waiting.start()
            waiting.join(_CLOSE_S)
