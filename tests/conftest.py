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

"""What all tests share: where runs write, hypothesis profiles, and who may run what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONAL = ROOT / "tests" / "functional"

# Before hypothesis is imported: it decides on its directory once.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / "build" / "hypothesis"))

import hypothesis  # noqa: E402

# No deadlines: two cores that also run guests make time a bad judge of a single example.
# "thorough" is for nights: HYPOTHESIS_PROFILE=thorough make unit
hypothesis.settings.register_profile("ci", deadline=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the lab unless we may make namespaces, bridges and domains."""
    if os.geteuid() == 0:
        return
    reason = "functional tests make namespaces and libvirt hosts: run them as root"
    for item in items:
        if FUNCTIONAL in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
