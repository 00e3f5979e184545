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

"""An Engine as a manager makes it, from a configuration of its own."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

from nova_pmt.conf import opts
from nova_pmt.manager.db.engine import Engine


def connect(url: str, **options: Any) -> Engine:
    """Connections of one manager's; close it.

    :param options: of group ``[database]``.
    """
    conf = cfg.ConfigOpts()
    opts.register(conf)
    conf([], default_config_files=[], default_config_dirs=[])
    values = {"connection": url, "max_retries": 1, "retry_interval": 0, **options}
    for name, value in values.items():
        conf.set_override(name, value, "database")
    return Engine(conf)
