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
"""Nova's databases in one process: ``nova_schema.py CONFIG CELL0_URL_FILE schema|cells``.

What ``nova-manage api_db sync``, ``cell_v2 map_cell0``, ``db sync`` and ``cell_v2 create_cell`` do;
each start of that program costs seconds of imports. ``cells``: the tables are there already.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    configuration, cell0_file, what = sys.argv[1:]
    cell0 = Path(cell0_file).read_text().strip()
    sys.argv = ["nova-manage"]
    # It comes with an event loop of its own, which must patch first.
    from nova.cmd import manage  # isort: skip
    from nova import config, objects

    config.parse_args(["nova-manage", "--config-file", configuration])
    objects.register_all()
    cells = manage.CellV2Commands()
    steps = [lambda: cells.map_cell0(cell0), lambda: cells.create_cell(name="cell1", verbose=True)]
    if what == "schema":
        steps.insert(0, manage.ApiDbCommands().sync)
        steps.insert(2, manage.DbCommands().sync)
    for step in steps:
        status = step() or 0
        if status:
            return int(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
