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

"""``nova-pmt-agent``: the service of a compute host."""

from __future__ import annotations

import os
import signal
import sys

from oslo_config import cfg
from oslo_log import log

from nova_pmt import exception
from nova_pmt.agent import startup
from nova_pmt.arbiter import load as arbiter_load
from nova_pmt.conf import opts

LOG = log.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Entry point; ends with SIGTERM or SIGINT.

    Exit status: 0 stopped, 1 refused to start (the reason and its cure are on stderr).
    """
    try:
        conf = _configure(sys.argv[1:] if argv is None else argv)
        startup.check(conf, os.geteuid())
        stop = _stop_descriptor()
        from nova_pmt.agent.libvirt_host import LibvirtHost  # after the checks: it needs libvirt

        agent = startup.Agent(conf, LibvirtHost(conf), arbiter_load.load(conf))
    except exception.PmtError as error:
        print(f"error {error.code}: {error.message}\ncure: {error.cure}", file=sys.stderr)
        return 1
    try:
        os.read(stop, 1)
        LOG.info("nova-pmt-agent stops: protection ends, guests run on")
    finally:
        agent.close()
    return 0


def _stop_descriptor() -> int:
    """A descriptor that becomes readable with SIGTERM or SIGINT.

    Not an Event: setting one in a signal handler can wait for the very thread that it interrupts.
    Not a blocked signal either: workers would inherit the mask.
    """
    readable, writable = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(writable, b"."))
    return readable


def _configure(argv: list[str]) -> cfg.ConfigOpts:
    conf = cfg.CONF  # see nova_pmt.messaging
    log.register_options(conf)
    opts.register(conf)
    try:
        conf(argv, project="nova_pmt", prog="nova-pmt")
        log.setup(conf, "nova_pmt")
    except (cfg.Error, OSError, log.LogConfigError) as error:
        raise exception.ConfigError(f"the configuration cannot be used: {error}") from error
    return conf


if __name__ == "__main__":
    sys.exit(main())
