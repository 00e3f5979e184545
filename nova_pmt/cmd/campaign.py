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

"""``nova-pmt-campaign``: random failures of a whole pair, and what clients saw of them."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from nova_pmt.evaluation import page
from nova_pmt.evaluation.plan import KINDS, Kind
from nova_pmt.exception import PmtError

_INTERRUPTED = 130
_WIDE = 200
_DESCRIPTION = """\
Kills QEMUs, workers and hosts at random moments while clients are answered, and compares memory and
disks of the survivor with what they were answered. In a lab of its own, as root; all is gone at the
end.
"""
_RUN = """\
Trials one after the other, on one guest that goes back and forth between two hosts. Writes
summary.json and, a line for each trial, trials.jsonl. Ctrl-C ends it with what there is.

exit status:
  0   nothing was lost, repeated, broken or different; with --negative: answers WERE lost
  1   otherwise, or it could not be done
  130 interrupted
"""
_EXAMPLES = """\
examples:
  nova-pmt-campaign run --trials 20 --seed 1
  nova-pmt-campaign run --trials 100 --kinds qemu,host --directory build/campaign-host
  nova-pmt-campaign run --negative --trials 40 --kinds qemu --directory build/campaign-negative
"""


def _at_least(lowest: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be {lowest} or more")
        return value

    convert.__name__ = "number"  # argparse names it in "invalid number value"
    return convert


def _kinds(text: str) -> tuple[Kind, ...]:
    asked = text.split(",")
    known = tuple(kind for kind in KINDS if kind in asked)
    if set(asked) - set(known):
        raise argparse.ArgumentTypeError(f"kinds are {', '.join(KINDS)}")
    return known


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nova-pmt-campaign", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run", help="the campaign", description=_RUN, epilog=_EXAMPLES, formatter_class=form
    )
    run.add_argument("--trials", type=_at_least(1), default=500, metavar="N", help="(500)")
    run.add_argument(
        "--seed", type=_at_least(0), metavar="N", help="of all that is random (default: random)"
    )
    run.add_argument(
        "--kinds",
        type=_kinds,
        default=KINDS,
        metavar="KIND,...",
        help=f"what is killed: of {', '.join(KINDS)} (all)",
    )
    run.add_argument("--clients", type=_at_least(1), default=4, metavar="N", help="(4)")
    run.add_argument(
        "--interval-ms", type=_at_least(5), default=20, metavar="MS", help="of checkpoints (20)"
    )
    run.add_argument(
        "--directory",
        type=Path,
        default=Path("build/campaign"),
        help="for the results (build/campaign)",
    )
    run.add_argument(
        "--negative",
        action="store_true",
        help="do not hold the guest's packets: answered requests must get lost",
    )
    made = commands.add_parser(
        "page",
        help="the results page, from summaries",
        description="Makes a page of the documentation from files that 'run' wrote.",
    )
    made.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help=f"summaries ({page.DATA}/{page.PATTERN})",
    )
    made.add_argument(
        "--output", type=Path, default=page.PAGE, metavar="FILE", help=f"the page ({page.PAGE})"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: see ``nova-pmt-campaign run --help``; 2 is usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    options = parser.parse_args(arguments)
    logging.getLogger().addHandler(logging.NullHandler())
    if options.command == "page":
        return _page(parser, options)
    return _run(options, ["nova-pmt-campaign", *arguments])


def _page(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    files = options.files or sorted(page.DATA.glob(page.PATTERN))
    if not files:
        parser.error(f"there is no {page.DATA}/{page.PATTERN}: name the files")
    try:
        text = page.page(files)
        options.output.write_text(text, encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: these are no results of a campaign: {error!r}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, command: list[str]) -> int:
    # pulls in all of the product
    from nova_pmt.bench import environment
    from nova_pmt.evaluation import report
    from nova_pmt.evaluation.campaign import Campaign, Options, campaign_lab

    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    if not out.is_terminal:
        out.width = _WIDE
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    options = Options(
        trials=args.trials,
        seed=seed,
        kinds=args.kinds,
        clients=args.clients,
        interval_ms=args.interval_ms,
        negative=args.negative,
    )
    status, campaign = 1, None
    machine = environment.header("output-commit", command, environment.qemu_version())
    try:
        with report.Report(err, args.trials, negative=args.negative) as progress:
            progress.note(f"seed {seed}; two hosts with agents, RabbitMQ, a guest with two disks")
            with campaign_lab() as lab:
                campaign = Campaign(lab, options, args.directory, progress.trial)
                campaign.run()
        status = 0
    except PmtError as error:
        err.print(f"error: {error.message} [{error.code}]\ncure: {error.cure}", markup=False)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    finally:
        if campaign is not None:
            summary = campaign.write(machine)
            out.print(report.table(summary))
            err.print(f"see {args.directory}/summary.json and trials.jsonl", markup=False)
            if status == 0 and not campaign.succeeded:
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
