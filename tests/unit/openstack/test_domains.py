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


from __future__ import annotations

from typing import Any

import pytest

from nova_pmt.openstack.nova.domains import Domains
from nova_pmt.standby import domainxml

PLAIN = "<domain><name>x</name><uuid>y</uuid></domain>"
MARKED = domainxml.with_mark(PLAIN, domainxml.Mark(1, "a", True))


class Gone(Exception):
    pass


class Domain:
    def __init__(self, state: int = 1, reason: int = 1, xml: str = PLAIN) -> None:
        self._state, self._reason, self.xml = state, reason, xml

    def info(self) -> list[int]:
        return [self._state]

    def state(self) -> list[int]:
        return [self._state, self._reason]

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        return self.xml


class Host:
    def __init__(self, domain: Domain | Exception) -> None:
        self.domain = domain
        self.now = 0.0

    def lookupByUUIDString(self, uuid: str) -> Any:  # noqa: N802
        if isinstance(self.domain, Exception):
            raise self.domain
        return self.domain

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def domains(self) -> Domains:
        return Domains(
            lambda: self, lambda error: isinstance(error, Gone), lambda: self.now, self.sleep
        )


@pytest.mark.parametrize(
    ("domain", "found"),
    [
        (Gone(), "absent"),
        (Domain(5), "stopped"),
        (Domain(6), "stopped"),
        (Domain(1), "running"),
        (Domain(3), "running"),  # it stands still for a checkpoint
        (Domain(3, xml=MARKED), "waiting"),
        (Domain(1, xml=MARKED), "waiting"),  # the agent is not done with it
    ],
)
def test_what_a_domain_is(domain: Any, found: str) -> None:
    assert Host(domain).domains().look("y") == found


def test_a_libvirt_that_does_not_tell_is_not_a_domain_that_is_gone() -> None:
    host = Host(ValueError("no connection"))
    for ask in (host.domains().look, host.domains().paused_by_user):
        with pytest.raises(ValueError, match="no connection"):
            ask("y")


def test_it_is_waited_for_the_agent_to_decide_and_not_for_ever() -> None:
    host = Host(Domain(3, xml=MARKED))
    assert host.domains().settled("y", 2.0) == "waiting"
    assert 2.0 <= host.now < 2.5
    waiting = host.domain
    assert isinstance(waiting, Domain)
    domains = host.domains()

    def decide(_: float) -> None:
        waiting.xml = PLAIN

    domains._sleep = decide
    assert domains.settled("y", 2.0) == "running"


@pytest.mark.parametrize(
    ("domain", "by_user"),
    [(Domain(3, 1), True), (Domain(3, 0), False), (Domain(1, 1), False), (Gone(), False)],
)
def test_who_paused_it(domain: Any, by_user: bool) -> None:
    assert Host(domain).domains().paused_by_user("y") is by_user
