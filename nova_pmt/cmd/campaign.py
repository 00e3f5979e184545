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
import contextlib
import json
import logging
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nova_pmt import unsafe
from nova_pmt.cmd.arguments import at_least, some_of
from nova_pmt.evaluation import faults, page
from nova_pmt.evaluation.plan import KINDS
from nova_pmt.exception import PmtError

#: As in :data:`nova_pmt.evaluation.faultcampaign.NEGATIVES`, which takes its time to import.
NEGATIVES = (unsafe.AT_ONCE, unsafe.UNDECIDED)
_INTERRUPTED = 130
_WIDE = 200
_DESCRIPTION = """\
Kills, stops and cuts off QEMUs, workers, hosts and what they depend on at random moments while
clients are answered, and compares memory and disks of the survivor with what they were answered. In
a lab of its own, as root; all is gone at the end.
"""
_RUN = """\
Trials one after the other, on one guest that goes back and forth between two hosts. Writes
summary.json and, a line for each trial, trials.jsonl. Ctrl-C ends it with what there is.

exit status:
  0   nothing was lost, repeated, broken or different; with --negative: answers WERE lost
  1   otherwise, or it could not be done
  130 interrupted
"""
_FAULTS = """\
Trials one after the other, on one guest that goes from host to host: three hosts with agents, two
managers. Each has a fault of one kind, two at once, or a worker that dies at a named step; then
all is put right, and the pair must be protected again by itself. Writes summary.json and, a line
for each trial, trials.jsonl. Kinds that this machine cannot do are left out, and named there.
Ctrl-C ends it with what there is.

exit status:
  0   nothing was lost, repeated, broken or different, nobody let out what another host had to,
      nothing is left over, and the pair was protected again each time; with --negative: it WAS
      found out
  1   otherwise, or it could not be done
  130 interrupted
"""
_EXAMPLES = """\
examples:
  nova-pmt-campaign faults --trials 30 --seed 1
  nova-pmt-campaign faults --trials 20 --kinds qemu-kill,host-stop,database-lock,step,two
  nova-pmt-campaign faults --cluster --trials 32 --kinds failover,database-kill,database-stop
  nova-pmt-campaign faults --negative no-arbiter --trials 4 --kinds repl-cut
  nova-pmt-campaign faults --negative release-at-once --trials 4 --kinds qemu-kill
  nova-pmt-campaign run --trials 20 --seed 1
  nova-pmt-campaign run --trials 100 --kinds qemu,host --directory build/campaign-host
  nova-pmt-campaign run --negative --trials 40 --kinds qemu --directory build/campaign-negative
"""


def _add_trials(
    command: argparse.ArgumentParser, kinds: Sequence[str], what: str, also: Sequence[str] = ()
) -> None:
    """What campaigns of both kinds have."""
    command.add_argument("--trials", type=at_least(1), default=500, metavar="N", help="(500)")
    command.add_argument(
        "--seed", type=at_least(0), metavar="N", help="of all that is random (default: random)"
    )
    command.add_argument(
        "--kinds",
        type=some_of((*kinds, *also), "kinds"),
        default=tuple(kinds),
        metavar="KIND,...",
        help=f"{what}: of {', '.join(kinds)} (all)"
        + (f"; with --cluster also {', '.join(also)}" if also else ""),
    )
    command.add_argument("--clients", type=at_least(1), default=4, metavar="N", help="(4)")
    command.add_argument(
        "--interval-ms", type=at_least(5), default=20, metavar="MS", help="of checkpoints (20)"
    )
    command.add_argument("--strategy", default="pmt", help="pmt, kemari or auto (pmt)")
    command.add_argument(
        "--directory",
        type=Path,
        default=Path("build/campaign"),
        help="for the results (build/campaign)",
    )


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nova-pmt-campaign", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="the campaign of output commit",
        description=_RUN,
        epilog=_EXAMPLES,
        formatter_class=form,
    )
    _add_trials(run, KINDS, "what is killed")
    run.add_argument(
        "--negative",
        action="store_true",
        help="do not hold the guest's packets: answered requests must get lost",
    )
    many = commands.add_parser(
        "faults",
        help="the campaign of all kinds of faults",
        description=_FAULTS,
        epilog=_EXAMPLES,
        formatter_class=form,
    )
    _add_trials(many, faults.KINDS, "what fails", also=tuple(faults.CLUSTER))
    many.add_argument(
        "--cluster",
        action="store_true",
        help="three managers over MariaDB, in place of two over SQLite",
    )
    many.add_argument(
        "--negative",
        choices=NEGATIVES,
        default="",
        help="do not wait for commits, or not for the arbiter: it must be found out",
    )
    again = commands.add_parser(
        "summarise",
        help="a campaign's summary anew, from its trials",
        description="Makes summary.json of a campaign of faults anew from its trials.jsonl.",
    )
    again.add_argument("directory", type=Path, help="with the results")
    made = commands.add_parser(
        "page",
        help="the results page, from summaries",
        description="Makes a page of the documentation from files that 'run' or 'faults' wrote.",
    )
    made.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help=f"summaries ({page.DATA}/{page.PATTERN})",
    )
    made.add_argument(
        "--faults",
        action="store_true",
        help=f"of campaigns of faults: from {page.DATA}/{page.FAULTS_PATTERN}",
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the page ({page.PAGE}; with --faults: {page.FAULTS_PAGE})",
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
    if options.command == "summarise":
        return _summarise(options)
    return _run(options, ["nova-pmt-campaign", *arguments])


def _page(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    pattern = page.FAULTS_PATTERN if options.faults else page.PATTERN
    files = options.files or sorted(page.DATA.glob(pattern))
    if not files:
        parser.error(f"there is no {page.DATA}/{pattern}: name the files")
    output = options.output or (page.FAULTS_PAGE if options.faults else page.PAGE)
    try:
        text = page.faults_page(files) if options.faults else page.page(files)
        output.write_text(text, encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: these are no results of a campaign: {error!r}", file=sys.stderr)
        return 1
    return 0


def _summarise(args: argparse.Namespace) -> int:
    from nova_pmt.evaluation.faultcampaign import summarise_again

    try:
        summary = summarise_again(args.directory)
        text = json.dumps(summary, indent=2) + "\n"
        (args.directory / "summary.json").write_text(text, encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: these are no results of a campaign of faults: {error!r}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, command: list[str]) -> int:
    # pulls in all of the product
    from nova_pmt.bench import environment
    from nova_pmt.evaluation import report
    from nova_pmt.evaluation.campaign import Campaign, Options, campaign_lab
    from nova_pmt.evaluation.faultcampaign import FaultCampaign, fault_lab

    many = args.command == "faults"
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
        negative=args.negative is True,
        strategy=args.strategy,
    )
    status, campaign = 1, None
    name, title = ("faults", "Faults") if many else ("output-commit", "Output commit")
    machine = environment.header(name, command, environment.qemu_version())
    try:
        with report.Report(
            err, args.trials, negative=bool(args.negative), short=not many
        ) as progress:
            hosts = "two hosts with agents"
            if many:
                managers = "three managers, MariaDB" if args.cluster else "two managers"
                hosts = f"three hosts with agents, {managers}"
            progress.note(f"seed {seed}; {hosts}, RabbitMQ, a guest with two disks")
            with contextlib.ExitStack() as stack:
                if many:
                    lab, plane = stack.enter_context(fault_lab(args.cluster, args.strategy))
                    campaign = FaultCampaign(
                        lab,
                        options,
                        args.directory,
                        progress.trial,
                        plane=plane,
                        without=args.negative,
                    )
                else:
                    lab = stack.enter_context(campaign_lab(args.strategy))
                    campaign = Campaign(lab, options, args.directory, progress.trial)
                for kind, reason in getattr(campaign, "skipped", {}).items():
                    progress.note(f"skipped: {kind}: {reason}")
                campaign.run()
        status = 0
    except PmtError as error:
        err.print(f"error: {error.message} [{error.code}]\ncure: {error.cure}", markup=False)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    finally:
        if campaign is not None:
            summary = campaign.write(machine)
            out.print(report.table(summary, title))
            err.print(f"see {args.directory}/summary.json and trials.jsonl", markup=False)
            if status == 0 and not campaign.succeeded:
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
