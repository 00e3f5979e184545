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

"""Our configuration inside processes of Nova's, which have another one of their own."""

from __future__ import annotations

import os
from typing import Any

from oslo_config import cfg

from nova_pmt.conf import opts

#: Names the file; for tests, and for those who keep it elsewhere.
VARIABLE = "NOVA_PMT_CONFIG"
PATH = "/etc/nova_pmt/nova-pmt.conf"


def load(path: str | None = None) -> Any:
    """Read ``nova-pmt.conf``; without one all options have their defaults.

    :raises oslo_config.cfg.Error: it cannot be read, or has a value that an option cannot have.
    """
    found = path or os.environ.get(VARIABLE) or PATH
    conf = cfg.ConfigOpts()
    opts.register(conf)
    files = [found] if os.path.exists(found) else []
    conf([], project="nova_pmt", default_config_files=files, default_config_dirs=[])
    return conf
