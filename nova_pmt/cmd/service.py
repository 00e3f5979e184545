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

"""What the commands that start a service have in common."""

from __future__ import annotations

import os
import signal
import sys

from oslo_config import cfg
from oslo_log import log

from nova_pmt import exception
from nova_pmt.conf import opts


def configure(conf: cfg.ConfigOpts, argv: list[str]) -> cfg.ConfigOpts:
    """Read the configuration, and set up logging.

    :param conf: ``cfg.CONF`` for what uses messages; see :mod:`nova_pmt.messaging`.
    :raises nova_pmt.exception.ConfigError: it cannot be used.
    """
    log.register_options(conf)
    opts.register(conf)
    try:
        conf(argv, project="nova_pmt", prog="nova-pmt")
        log.setup(conf, "nova_pmt")
    except (cfg.Error, OSError, log.LogConfigError) as error:
        raise exception.ConfigError(f"the configuration cannot be used: {error}") from error
    return conf


def stop_descriptor() -> int:
    """A descriptor that becomes readable with SIGTERM or SIGINT.

    Not an Event: setting one in a signal handler can wait for the very thread that it interrupts.
    Not a blocked signal either: workers would inherit the mask.
    """
    readable, writable = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(writable, b"."))
    return readable


def refused(error: exception.PmtError) -> int:
    """Say why nothing was done; the exit status."""
    print(f"error {error.code}: {error.message}\ncure: {error.cure}", file=sys.stderr)
    return 1
