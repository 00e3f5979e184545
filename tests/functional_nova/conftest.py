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

import unittest
from collections.abc import Iterator

# The first import of anything of Nova's chooses between threads and eventlet.
import nova.tests.functional
import pytest
from nova import conf as nova_conf
from nova import config as nova_config
from nova import objects


@pytest.fixture(autouse=True)
def nova(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nova's objects and options, as any service of its has them; its own test cases bring them."""
    if request.cls is not None and issubclass(request.cls, unittest.TestCase):
        yield
        return
    nova_config.parse_args(["nova-test"], default_config_files=[], configure_db=False)
    objects.register_all()
    yield
    nova_conf.CONF.reset()
