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

"""Makes the arbiter that the configuration names."""

from __future__ import annotations

from typing import Any

from nova_pmt import unsafe
from nova_pmt.arbiter.base import Arbiter
from nova_pmt.plugins import load_class


def load(conf: Any) -> Arbiter:
    """The arbiter of ``[arbiter] driver``.

    :raises nova_pmt.exception.ConfigError: there is no such plug-in.
    """
    arbiter = load_class("nova_pmt.arbiters", conf.arbiter.driver, Arbiter)(conf)
    if unsafe.asked(unsafe.UNDECIDED):
        return unsafe.everybody_wins(arbiter)  # type: ignore[no-any-return]
    return arbiter
