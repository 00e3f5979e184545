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

"""One lab for all functional tests of a run; each test brings guests of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from nova_pmt.exception import LabError
from nova_pmt.lab import GuestSpec, Lab, LabGuest, LabHost, Workload, deployment

#: About 1,000 to 1,500 different pages in 50 ms.
BUSY = Workload(dirty_pages=600, dirty_ms=20)

#: Of all pairs: a busy machine may hold a process up for seconds, and nobody has died then.
PEER_TIMEOUT_MS = 5000

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with Lab(computes=2) as running:
        deployment.configure(running, peer_timeout_ms=PEER_TIMEOUT_MS)
        yield running


@pytest.fixture
def one(lab: Lab) -> LabHost:
    return lab.computes[0]


@pytest.fixture
def two(lab: Lab) -> LabHost:
    return lab.computes[1]


Boot = Callable[..., LabGuest]


@pytest.fixture
def boot(lab: Lab) -> Iterator[Boot]:
    """Boots guests with names and addresses of their own; ends them wherever they are."""
    guests: list[LabGuest] = []

    def start(host: LabHost, **changes: object) -> LabGuest:
        number = next(_numbers)
        spec = GuestSpec(f"t{number}", ip=f"10.77.2.{100 + number % 150}", workload=BUSY)
        guest = host.boot(replace(spec, **changes))  # type: ignore[arg-type]
        guests.append(guest)
        return guest.wait_ready()

    yield start
    for guest in guests:
        for host in lab.computes:
            with contextlib.suppress(LabError):
                if host.powered:
                    guest.on(host).destroy()
