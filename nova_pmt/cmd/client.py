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

"""``nova-pmt``: the operators' command."""

from __future__ import annotations

import logging
import os
import sys

from oslo_config import cfg
from rich.console import Console

from nova_pmt import exception
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.client import commands, parser
from nova_pmt.client import session as sessions
from nova_pmt.conf import opts
from nova_pmt.manager.rpcapi import ManagerAPI
from nova_pmt.messaging import oslo_messaging

_INTERRUPTED = 130
#: A pipe or a file has no width: lines there must not be folded.
_WIDE = 240


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Exit status: 0 ok, 1 failed, 2 usage, 3 refused, 4 host unreachable, 130 interrupted.
    """
    args = parser.make().parse_args(argv)
    _quieten(args.debug)
    out, err = _console(sys.stdout), _console(sys.stderr)

    def failed(error: exception.PmtError) -> int:
        sessions.complain(err, error, args.format == "json")
        return sessions.exit_status(error)

    try:
        conf = _configure(args.config_file)
        transport, timeout_s = oslo_messaging.get_rpc_transport(conf), conf.client.timeout_s
        session = sessions.Session(
            args,
            AgentAPI(transport, timeout_s),
            list(conf.client.hosts),
            out,
            err,
            managers=ManagerAPI(transport, timeout_s) if conf.manager.enabled else None,
        )
        return commands.COMMANDS[args.command](session)
    except exception.PmtError as error:
        return failed(error)
    except oslo_messaging.MessagingException as error:
        return failed(exception.ConfigError(f"[DEFAULT] transport_url: {error}"))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _configure(path: str | None) -> cfg.ConfigOpts:
    conf = cfg.CONF  # see nova_pmt.messaging
    opts.register(conf)
    try:
        conf(["--config-file", path] if path else [], project="nova_pmt", prog="nova-pmt")
    except cfg.Error as error:
        raise exception.ConfigError(
            f"the configuration cannot be used: {error}",
            cure="Correct the file that --config-file names, or /etc/nova_pmt/nova-pmt.conf.",
        ) from error
    return conf


def _console(file: object) -> Console:
    console = Console(file=file, highlight=False)  # type: ignore[arg-type]
    if not console.is_terminal:
        console.width = _WIDE
    return console


def _quieten(debug: bool) -> None:
    """Libraries' log lines only on demand: errors are told in our own words."""
    if debug:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    else:
        logging.getLogger().addHandler(logging.NullHandler())


if __name__ == "__main__":
    sys.exit(main())
