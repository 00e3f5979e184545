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

"""A domain that libvirt could not be asked for is not one that is not there."""

from __future__ import annotations

from typing import Any

import pytest

from nova_pmt import exception

libvirt = pytest.importorskip("libvirt")
guest_domain = pytest.importorskip("nova_pmt.guest.domain")

UUID = "5d6c0c3e-5a1b-4c7d-9a53-0123456789ab"


def failure(code: int) -> Any:
    error = libvirt.libvirtError("it failed")
    error.err = (code, 0, "it failed", 0, "", "", "", 0, 0)
    return error


class Connection:
    """Of one domain, ``web1``; looking up fails with these codes, by UUID and by name."""

    def __init__(self, by_uuid: int | None = None, by_name: int | None = None) -> None:
        self._codes = {"uuid": by_uuid, "name": by_name}
        self.asked: list[str] = []

    def _look(self, kind: str) -> Any:
        self.asked.append(kind)
        code = self._codes[kind]
        if code is not None:
            raise failure(code)
        return self

    def lookupByUUIDString(self, uuid: str) -> Any:  # noqa: N802
        return self._look("uuid")

    def lookupByName(self, name: str) -> Any:  # noqa: N802
        return self._look("name")

    def UUIDString(self) -> str:  # noqa: N802
        return UUID

    def name(self) -> str:
        return "web1"


@pytest.mark.parametrize(("name", "asked"), [(UUID, ["uuid"]), ("web1", ["name"])])
def test_a_domain_is_found_by_uuid_or_name(name: str, asked: list[str]) -> None:
    connection = Connection()
    assert guest_domain.Domain.find(connection, name).uuid == UUID
    assert connection.asked == asked


def test_a_name_may_look_like_a_uuid() -> None:
    connection = Connection(by_uuid=libvirt.VIR_ERR_NO_DOMAIN)
    assert guest_domain.Domain.find(connection, UUID).name == "web1"


@pytest.mark.parametrize("name", [UUID, "web1"])
def test_one_that_is_not_there_is_told(name: str) -> None:
    missing = libvirt.VIR_ERR_NO_DOMAIN
    with pytest.raises(exception.UnknownDomain):
        guest_domain.Domain.find(Connection(missing, missing), name)


@pytest.mark.parametrize("name", [UUID, "web1"])
@pytest.mark.parametrize("code", ["INTERNAL_ERROR", "RPC", "SYSTEM_ERROR", "INVALID_ARG"])
def test_a_connection_that_broke_says_nothing_of_the_domain(name: str, code: str) -> None:
    """libvirt tells "client socket is closed" as an internal error."""
    broken = getattr(libvirt, f"VIR_ERR_{code}")
    with pytest.raises(exception.GuestError) as caught:
        guest_domain.Domain.find(Connection(broken, broken), name)
    assert not isinstance(caught.value, exception.UnknownDomain)
    assert caught.value.code == "LIBVIRT_UNREACHABLE"
