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

"""``nova-pmt-worker``: started by nova-pmt-agent, one for each guest; not for people."""

from __future__ import annotations

import argparse
import socket
import sys

from oslo_config import cfg
from oslo_log import log

from nova_pmt.agent import control
from nova_pmt.conf import opts


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="nova-pmt-worker",
        description="Serves one guest. nova-pmt-agent starts it; do not start it by hand.",
    )
    parser.add_argument("--control-fd", type=int, required=True, help="socket to the agent")
    known, rest = parser.parse_known_args(argv)
    conf = cfg.CONF  # see nova_pmt.messaging
    log.register_options(conf)
    opts.register(conf)
    conf(rest, project="nova_pmt", prog="nova-pmt")
    log.setup(conf, "nova_pmt")
    agent = socket.socket(fileno=known.control_fd)
    agent.set_inheritable(False)
    lines = control.Lines()
    first = control.receive_one(agent, lines)
    if first is None:
        return 1
    spec = control.parse_spec(first)
    if isinstance(spec, control.PrimarySpec):
        from nova_pmt.worker.primary import Primary

        return Primary(conf, spec, agent, lines).run()
    from nova_pmt.worker.standby import Standby

    return Standby(conf, spec, agent, lines).run()


if __name__ == "__main__":
    sys.exit(main())
