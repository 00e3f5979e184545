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

"""The arguments of ``nova-pmt``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from nova_pmt import exception
from nova_pmt.agent import inputs
from nova_pmt.manager import states

_EPILOG = """\
examples:
  nova-pmt check web1 --standby compute2      can web1 be protected, and by compute2?
  nova-pmt protect web1 --standby compute2    keep a standby of web1 on compute2
  nova-pmt top                                watch pauses, pages, cache and lag
  nova-pmt failover web1                      planned move of web1 to its standby
  nova-pmt failover web1 --force              give up the primary's host
  nova-pmt pairs --state primary_alone        what has no standby just now
  nova-pmt hosts                              which hosts live, and what they hold
  nova-pmt events web1 --watch                what happened to web1, and what happens
  nova-pmt maintenance compute1 on            no new standbys on compute1
  nova-pmt evacuate-host compute1             move all protected guests away from compute1

'pairs', 'hosts', 'events', 'maintenance' and 'evacuate-host' ask nova-pmt-manager: they need
[manager] enabled = true. The others ask the hosts.

exit status: 0 ok, 1 failed, 2 usage, 3 refused (nothing was changed), 4 host unreachable
"""

_PAIRS = """\
examples:
  nova-pmt pairs                        all, also those whose protection has ended
  nova-pmt pairs --host compute1        those that compute1 has a part in
  nova-pmt pairs --state primary_alone  without a standby just now
"""
_HOSTS = """\
examples:
  nova-pmt hosts         alive or dead, in maintenance, guests of pairs and standbys there
  nova-pmt hosts --json  with all that their agents tell
"""
_EVENTS = """\
examples:
  nova-pmt events --limit 100           the last 100 lines of the audit trail
  nova-pmt events web1                  of one server
  nova-pmt events --watch               also those that follow, until Ctrl-C
  nova-pmt events --watch --json        one JSON object in each line
"""
_MAINTENANCE = """\
examples:
  nova-pmt maintenance compute1 on      new standbys go elsewhere; what is there stays
  nova-pmt maintenance compute1 off
"""
_EVACUATE = """\
Turns maintenance on, then moves guest after guest, as 'nova-pmt failover' does. A pair that is not
protected is waited for. Can be run again. Servers that are not protected are not touched, and
standbys stay: the managers make others when the host goes.

examples:
  nova-pmt evacuate-host compute1
  nova-pmt evacuate-host compute1 --at-once 4 --timeout 1800

exit status: 0 no guest of a pair is left there, 1 some are; else as of 'nova-pmt'
"""


def _checked(check: Callable[[Any], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return check(text)
        except exception.InvalidInput as error:
            raise argparse.ArgumentTypeError(error.message) from error

    return convert


def _option(name: str, kind: type) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            return inputs.options({name: kind(text)})[name]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not a number: {text!r}") from error
        except exception.InvalidInput as error:
            raise argparse.ArgumentTypeError(error.message) from error

    return convert


def _positive(text: str) -> int:
    value = int(text)
    if not 0 < value <= 10_000_000:
        raise argparse.ArgumentTypeError("must be from 1 to 10000000")
    return value


def make() -> argparse.ArgumentParser:
    """The parser; each command's name is in ``command``."""
    parser = argparse.ArgumentParser(
        prog="nova-pmt",
        description="Fault tolerance for servers: a standby on another host follows each one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add(commands, "check", "can this domain be protected? changes nothing", _check)
    _add(commands, "protect", "keep a standby of a running domain", _protect)
    _add(commands, "unprotect", "end protection; the guest runs on", _domain)
    _add(commands, "list", "pairs of all hosts in short", _host)
    _add(commands, "status", "pairs in full", _status)
    _add(commands, "top", "live view of every protected guest", _top)
    _add(commands, "failover", "go on on the standby's host", _failover)
    _add(commands, "pairs", "pairs as the managers remember them", _pairs, _PAIRS)
    _add(commands, "hosts", "hosts as the managers see them", _nothing, _HOSTS)
    _add(commands, "events", "what happened to pairs and hosts", _events, _EVENTS)
    _add(commands, "maintenance", "no new standbys on a host, or again", _maintenance, _MAINTENANCE)
    _add(
        commands, "evacuate-host", "move all protected guests of a host to their standbys",
        _evacuate, _EVACUATE,
    )  # fmt: skip
    return parser


def _add(
    commands: Any,
    name: str,
    summary: str,
    fill: Callable[[argparse.ArgumentParser], None],
    epilog: str | None = None,
) -> None:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fill(parser)
    parser.add_argument(
        "-f", "--format", choices=("table", "json"), default="table", help="how to print results"
    )
    parser.add_argument(
        "--json", dest="format", action="store_const", const="json", help="the same as -f json"
    )
    parser.add_argument(
        "--config-file", metavar="PATH", help="default: /etc/nova_pmt/nova-pmt.conf"
    )
    parser.add_argument("--debug", action="store_true", help="show what the message bus does")


def _host(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        type=_checked(inputs.host),
        help="compute host to ask; default: all of [client] hosts",
    )


def _domain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "domain", metavar="DOMAIN", type=_checked(inputs.domain), help="UUID or name"
    )
    _host(parser)


def _check(parser: argparse.ArgumentParser) -> None:
    _domain(parser)
    parser.add_argument(
        "--standby", type=_checked(inputs.host), metavar="HOST", help="check this host, too"
    )


def _protect(parser: argparse.ArgumentParser) -> None:
    _domain(parser)
    parser.add_argument(
        "--standby", type=_checked(inputs.host), metavar="HOST", required=True,
        help="host that is to hold the standby",
    )  # fmt: skip
    parser.add_argument(
        "--strategy",
        help="pmt, kemari or auto: when a round starts, and whether the guest waits for the "
        "standby; default: [checkpoint] strategy",
    )
    for flag, kind, text in (
        ("--interval-ms", int, "time between two pauses"),
        ("--epoch-limit-ms", int, "kemari, auto: longest time between two pauses"),
        ("--max-pause-ms", float, "wanted length of the pause; adapts the interval"),
        ("--cache-limit-mib", int, "hard limit of the cache"),
        ("--passes", int, "pre-copy passes before each pause"),
    ):
        name = flag[2:].replace("-", "_")
        parser.add_argument(flag, type=_option(name, kind), metavar="N", help=text)
    parser.add_argument(
        "--no-wait", action="store_true", help="do not wait for the first synchronisation"
    )
    parser.add_argument(
        "--timeout", type=_positive, default=3600, metavar="S",
        help="wait that many seconds at most (default 3600); it goes on nevertheless",
    )  # fmt: skip


def _status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "domain", metavar="DOMAIN", nargs="?", type=_checked(inputs.domain), help="UUID or name"
    )
    _host(parser)


def _top(parser: argparse.ArgumentParser) -> None:
    _host(parser)
    parser.add_argument(
        "-n", "--iterations", type=_positive, metavar="N", help="stop after N views"
    )
    parser.add_argument("--once", action="store_true", help="the same as -n 1")


def _failover(parser: argparse.ArgumentParser) -> None:
    _domain(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="order the standby to take over although its primary may be healthy",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")


def _nothing(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(host=None)


def _pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", type=_checked(inputs.host), help="only pairs that this host has a part in"
    )
    parser.add_argument(
        "--state", choices=states.STATES, metavar="STATE",
        help=f"only pairs in this state: {', '.join(states.STATES)}",
    )  # fmt: skip


def _events(parser: argparse.ArgumentParser) -> None:
    _nothing(parser)
    parser.add_argument(
        "domain", metavar="DOMAIN", nargs="?", type=_checked(inputs.domain), help="UUID or name"
    )
    parser.add_argument(
        "--watch", action="store_true", help="go on with those that follow, until Ctrl-C"
    )
    parser.add_argument(
        "--limit", type=_limit, default=50, metavar="N", help="the last N lines (50)"
    )
    parser.add_argument(
        "-n", "--iterations", type=_positive, metavar="N", help="with --watch: stop after N looks"
    )


def _limit(text: str) -> int:
    value = int(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError("must be from 1 to 1000")
    return value


def _target(parser: argparse.ArgumentParser) -> None:
    _nothing(parser)
    parser.add_argument("target", metavar="HOST", type=_checked(inputs.host), help="compute host")


def _maintenance(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    parser.add_argument("on", metavar="on|off", type=_switch, help="new standbys go elsewhere")


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError("must be on or off")
    return text == "on"


def _evacuate(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    parser.add_argument(
        "--at-once", type=_at_once, default=1, metavar="N", help="so many at the same time (1)"
    )
    parser.add_argument(
        "--timeout", type=_positive, default=600, metavar="S",
        help="after that many seconds no further move is begun (600)",
    )  # fmt: skip


def _at_once(text: str) -> int:
    value = int(text)
    if not 0 < value <= 64:
        raise argparse.ArgumentTypeError("must be from 1 to 64")
    return value
