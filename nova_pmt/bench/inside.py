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

"""The end inside a host of what :mod:`nova_pmt.bench.child` starts, and the guest it measures."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from nova_pmt import exception
from nova_pmt.guest import domain as guest_domain

RUNTIME = "/run/nova_pmt"
URI = "qemu:///system"
_MONITOR = re.compile(r"""unix:([^,"']+\.sock),""")

Tell = Callable[..., None]
Talk = Callable[[dict[str, Any], Iterator[dict[str, Any]], Tell], None]


def converse(source: TextIO, sink: TextIO, talk: Talk) -> int:
    """Read requests, one a line, and tell answers; the exit status.

    :param talk: takes the first request, the others, and what tells; an error of the product's ends
        it, and is told.
    """

    def tell(**message: Any) -> None:
        sink.write(json.dumps(message) + "\n")
        sink.flush()

    first = json.loads(source.readline())
    try:
        talk(first, map(json.loads, source), tell)
    except exception.PmtError as error:
        tell(done="error", error=error.to_dict())
        return 1
    return 0


@dataclass(frozen=True)
class Guest:
    """What is known of a guest from outside.

    :param monitor: the path of its second monitor.
    :param directory: its own, which its QEMU can enter.
    """

    uuid: str
    xml: str
    monitor: str
    directory: str

    @classmethod
    def find(cls, name: str) -> Guest:
        """:raises nova_pmt.exception.PmtError: there is none, or it has no second monitor."""
        with contextlib.closing(guest_domain.connect(URI)) as connection:
            domain = guest_domain.Domain.find(connection, name)
            xml = domain.xml()
            match = _MONITOR.search(xml)
            if match is None:
                raise exception.GuestError(f"domain {domain.name} has no second QMP monitor")
            directory = guest_domain.guest_directory(RUNTIME, domain.uuid, domain.pid())
            return cls(domain.uuid, xml, match[1], directory)
