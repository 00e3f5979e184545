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

"""A pair that waits to be protected again is let go of when its operator says so."""

from __future__ import annotations

import pytest

from nova_pmt import exception
from nova_pmt.arbiter.base import Arrangement
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.service import ManagerService

UUID = "5a2f3c1e-0000-4000-8000-0000000000aa"


@pytest.fixture
def service(database: Database) -> ManagerService:
    database.begin(Arrangement(UUID, "web1", 1, "a", "b"))
    database.transition(UUID, 1, "protected", host="a")
    return ManagerService(database)


def test_a_guest_that_went_on_is_let_go_of(service: ManagerService, database: Database) -> None:
    service.claim(UUID, 1, "standby", "host a is gone")
    service.beat("b", {}, [{"uuid": UUID, "generation": 1, "role": "standby",
                            "state": "standby_active"}])  # fmt: skip
    released = service.release("web1")
    assert (released["state"], released["wanted"]) == ("unprotected", False)
    database.begin(Arrangement(UUID, "web1", 2, "b", "a"))
    assert service.pair(UUID)["wanted"] is True, "protected anew, it is repaired again"


def test_what_is_protected_is_not(service: ManagerService) -> None:
    with pytest.raises(exception.NotProtected, match="is protected: nothing waits"):
        service.release("web1")
    assert service.pair(UUID)["state"] == "protected"


def test_a_claim_says_why_in_the_audit_trail(service: ManagerService) -> None:
    service.claim(UUID, 1, "standby", "host a is gone")
    (line,) = [event for event in service.events("web1") if event["kind"] == "claim"]
    assert line["reason"] == "host a is gone"
