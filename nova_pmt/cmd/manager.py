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

"""``nova-pmt-manager``: the control plane's service. Any number of them share one database."""

from __future__ import annotations

import os
import sys

from oslo_config import cfg
from oslo_log import log

from nova_pmt import exception
from nova_pmt.cmd import service
from nova_pmt.manager import startup

LOG = log.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Entry point; ends with SIGTERM or SIGINT.

    Exit status: 0 stopped, 1 refused to start (the reason and its cure are on stderr).
    """
    try:
        conf = service.configure(cfg.CONF, sys.argv[1:] if argv is None else argv)
        startup.check(conf)
        stop = service.stop_descriptor()
        manager = startup.Manager(conf)
    except exception.PmtError as error:
        return service.refused(error)
    try:
        os.read(stop, 1)
        LOG.info("nova-pmt-manager stops")
    finally:
        manager.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
