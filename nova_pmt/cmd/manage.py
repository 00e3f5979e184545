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

"""``nova-pmt-manage``: looks after the managers' database."""

from __future__ import annotations

import argparse
import sys
import time

from oslo_config import cfg

from nova_pmt import exception
from nova_pmt.cmd import service
from nova_pmt.conf import opts
from nova_pmt.manager import startup
from nova_pmt.manager.db import migration
from nova_pmt.manager.db.api import Database
from nova_pmt.manager.db.engine import Engine

_EPILOG = """\
examples:
  nova-pmt-manage db sync              # after installing or upgrading, once, before the managers
  nova-pmt-manage db version           # what it is at, and what this release needs
  nova-pmt-manage db purge --days 30   # delete older lines of the audit trail

exit status: 0 done, 1 failed, 2 usage
"""
_DAY_S = 86400.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nova-pmt-manage",
        description="Looks after the database of nova-pmt-manager ([database] connection).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", action="append", default=[], help="configuration file; may be repeated"
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    database = kinds.add_parser("db", help="the database").add_subparsers(
        dest="action", required=True
    )
    database.add_parser("sync", help="make or change the tables as this release needs them")
    database.add_parser("version", help="the tables' revision, and the one that is needed")
    purge = database.add_parser("purge", help="delete old lines of the audit trail")
    purge.add_argument("--days", type=_days, default=90, help="older than this (90)")
    return parser


def _days(text: str) -> int:
    days = int(text)
    if days < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return days


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    files = [f"--config-file={path}" for path in args.config_file]
    conf = cfg.ConfigOpts()
    opts.register(conf)
    try:
        try:
            conf(files, project="nova_pmt", prog="nova-pmt")
        except (cfg.Error, OSError) as error:
            raise exception.ConfigError(f"the configuration cannot be used: {error}") from error
        startup.check(conf)
        engine = Engine(conf)
        try:
            return _do(args, engine)
        finally:
            engine.close()
    except exception.PmtError as error:
        return service.refused(error)


def _do(args: argparse.Namespace, engine: Engine) -> int:
    if args.action == "sync":
        before = engine.ask(migration.current)
        engine.ask(migration.upgrade)
        after = engine.ask(migration.current)
        print(f"revision {after}" + (": nothing to do" if before == after else f" (was {before})"))
    elif args.action == "version":
        print(f"revision {engine.ask(migration.current)}, needed {migration.head()}")
    else:
        print(f"{Database(engine).forget(time.time() - args.days * _DAY_S)} lines deleted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
