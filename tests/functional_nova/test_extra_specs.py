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

import pytest
from nova import exception
from nova.api.validation.extra_specs import validators


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ft:mode", mode) for mode in ("pmt", "kemari", "auto", "allowed", "off")),
        ("ft:interval_ms", "20"),
        ("ft:max_pause_ms", "9"),
        ("ft:cache_mib", "256"),
    ],
)
def test_nova_takes_what_is_right(name: str, value: str) -> None:
    validators.validate(name, value)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ft:mode", "on", "is not one of: pmt, kemari, auto, allowed, off"),
        ("ft:interval_ms", "1", "less than the min value of '5'"),
        ("ft:interval_ms", "fast", "is not a valid integer"),
        ("ft:cache_mib", "4", "less than the min value of '8'"),
        ("ft:modus", "pmt", "does not appear to be a valid extra spec"),
    ],
)
def test_nova_refuses_what_is_wrong_and_says_why(name: str, value: str, told: str) -> None:
    with pytest.raises(exception.ValidationError) as refused:
        validators.validate(name, value)
    assert told in str(refused.value)
