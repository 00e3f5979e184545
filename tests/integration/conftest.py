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
"""One cloud for all tests against a real Nova; one protected server, as long as it lives."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.protected import Protected

if TYPE_CHECKING:
    from nova_pmt.lab.openstack import Cloud

HERE = Path(__file__).parent
#: For one test; two cores are the whole data centre, and others may use them, too.
LIMIT_S = 1800
#: A host on which nothing is put, unless a test asks for it.
SPARE = "compute3"
LOGS = Path("build/test/openstack-logs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = ""
    if os.geteuid() != 0:
        reason = "the lab makes namespaces: run it as root"
    elif importlib.util.find_spec("neutron") is None:
        reason = "OpenStack's services are in .venv-openstack: make openstack-test"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(LIMIT_S))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cloud() -> Iterator[Cloud]:
    from nova_pmt.lab import Lab
    from nova_pmt.lab.openstack import Cloud

    with Lab(computes=3) as lab:
        try:
            with Cloud(lab, say=print) as running:
                compute = running.admin.compute
                (service,) = compute.services(binary="nova-compute", host=SPARE)
                compute.disable_service(service)
                yield running
        finally:
            # They go with the lab, and a failure has to be understood.
            shutil.rmtree(LOGS, ignore_errors=True)
            shutil.copytree(lab.directory / "logs", LOGS)


@pytest.fixture(scope="session")
def _shared() -> list[Protected]:
    return []


@pytest.fixture
def web(cloud: Cloud, _shared: list[Protected]) -> Protected:
    """A protected server: the one of the test before, if that left it so."""
    if _shared and not _shared[0].sound():
        _shared.pop().remove()
    if not _shared:
        _shared.append(Protected.create(cloud, "web"))
    return _shared[0]
