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

"""Certificates are made once; hosts are called ``one`` (primary) and ``two`` (standby)."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from nova_pmt.lab.certificates import Authority
from tests.unit.fakes.sockets import tls_conf


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Configurations by name: one, two, other (a third host), expired, foreign (other CA)."""
    authority, foreign = Authority(), Authority("somebody else")
    base: Path = tmp_path_factory.mktemp("tls")
    for name in ("one", "two", "other"):
        authority.install(base / name, authority.issue(name, ["127.0.0.1"]))
    for name in ("one", "two"):
        past = datetime.timedelta(minutes=-1)
        authority.install(base / f"expired-{name}", authority.issue(name, valid=past))
        # signed by a foreign authority, but trusting ours
        authority.install(base / f"foreign-{name}", foreign.issue(name))
    return {path.name: tls_conf(path) for path in base.iterdir()}
