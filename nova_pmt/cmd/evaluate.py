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

"""``nova-pmt-eval``: the strategies compared, on the same guests, loads and links."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nova_pmt.cmd.arguments import at_least, some_of
from nova_pmt.evaluation.study.scenarios import SCENARIOS
from nova_pmt.exception import PmtError

_INTERRUPTED = 130
_WIDE = 200
_DATA = Path("doc/source/results/data/evaluation.json")
_PAGE = Path("doc/source/results/evaluation.md")
_DESCRIPTION = """\
Runs guests under PMT-Checkpointing, Kemari and auto, and unprotected, one right after the other,
and tells what each costs: pauses, output delay, bytes on the wire, throughput and latency. In a
lab of its own, as root; all is gone at the end.
"""
_RUN = """\
Measures all combinations. Writes, as they come, rows.csv (a line for each measurement) and
cache.csv (the cache over time), and at the end summary.json (scenario, strategy, link, figure,
mean, low, high) and pictures. Ctrl-C ends it with what there is.

exit status:
  0   measured
  1   the lab or the product failed, or a combination could not be measured
  130 interrupted
"""
_EXAMPLES = """\
examples:
  nova-pmt-eval run --quick
  nova-pmt-eval run --scenarios idle,web --strategies pmt,auto --links 1000 --repeats 5
  nova-pmt-eval run --directory build/eval
  nova-pmt-eval page build/eval/summary.json

scenarios:
""" + "".join(f"  {one.name:10}{one.text}\n" for one in SCENARIOS)


def _links(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (-1,)
    if any(link < 0 for link in found):
        raise argparse.ArgumentTypeError("links are numbers of Mbit/s, with commas; 0: no limit")
    return found


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nova-pmt-eval", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run", help="measure", description=_RUN, epilog=_EXAMPLES, formatter_class=form
    )
    run.add_argument(
        "--quick", action="store_true", help="three scenarios, one link, once: under five minutes"
    )
    run.add_argument(
        "--scenarios",
        type=some_of([one.name for one in SCENARIOS], "scenarios"),
        metavar="NAME,...",
        help="(all)",
    )
    run.add_argument(
        "--strategies",
        type=some_of(("pmt", "kemari", "auto"), "strategies"),
        metavar="NAME,...",
        help="(all); unprotected is always measured, to compare with",
    )
    run.add_argument(
        "--links", dest="links_mbit", type=_links, metavar="MBIT,...", help="(100,1000,0)"
    )
    for flag, kind, least, text in (
        ("--seconds", float, 1, "of each measurement (8)"),
        ("--repeats", int, 1, "of each combination (3)"),
        ("--interval-ms", float, 5, "of pmt, and the longest wait of auto (20)"),
        ("--epoch-limit-ms", float, 50, "longest epoch of kemari and auto (1000)"),
        ("--seed", int, 0, "of the order of strategies (1)"),
        ("--memory-mib", int, 128, "of the guest (256)"),
    ):
        run.add_argument(flag, type=at_least(least, kind), metavar="N", help=text)
    run.add_argument(
        "--no-peers",
        dest="peers",
        action="store_false",
        default=None,
        help="do not measure what live migration, snapshots and the like stop the guest for",
    )
    run.add_argument(
        "--no-plain",
        dest="plain",
        action="store_false",
        default=None,
        help="do not measure PMT without codecs as well (at 1 Gbit/s)",
    )
    run.add_argument(
        "--no-failovers",
        dest="failovers",
        action="store_false",
        default=None,
        help="do not let QEMU die as well, under each strategy (on the first link)",
    )
    run.add_argument(
        "--directory", type=Path, default=Path("build/eval"), help="for the results (build/eval)"
    )
    made = commands.add_parser(
        "page",
        help="the results page, from a summary",
        description="Makes a page of the documentation, with its pictures, from a summary.json.",
    )
    made.add_argument(
        "summary", nargs="?", type=Path, default=_DATA, metavar="FILE", help=f"({_DATA})"
    )
    made.add_argument("--output", type=Path, default=_PAGE, metavar="FILE", help=f"({_PAGE})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: see ``nova-pmt-eval run --help``; 2 is usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(arguments)
    logging.getLogger().addHandler(logging.NullHandler())
    if args.command == "page":
        return _page(args)
    return _run(args, ["nova-pmt-eval", *arguments])


def _page(args: argparse.Namespace) -> int:
    from nova_pmt.evaluation.study import page, plots
    from nova_pmt.evaluation.study.figures import Table

    try:
        summary = json.loads(args.summary.read_text(encoding="utf-8"))
        page.write(summary, args.output)
        plots.draw(Table(summary["figures"]), args.output.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {args.summary} is no result of an evaluation: {error!r}", file=sys.stderr)
        return 1
    except PmtError as error:
        print(f"error: {error.message}\ncure: {error.cure}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, command: list[str]) -> int:
    # pulls in all of the product
    from nova_pmt.bench import environment
    from nova_pmt.bench.report import Report
    from nova_pmt.evaluation.study import page, plots
    from nova_pmt.evaluation.study.figures import Table
    from nova_pmt.evaluation.study.matrix import QUICK, Options, Study

    given = {
        field.name: value
        for field in dataclasses.fields(Options)
        if (value := getattr(args, field.name)) is not None
    }
    options = dataclasses.replace(QUICK if args.quick else Options(), **given)
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    if not out.is_terminal:
        out.width = _WIDE
    machine = environment.header("evaluation", command, environment.qemu_version())
    status = 1
    with Report(err) as report:
        study = Study(options, args.directory, report)
        count = len(options.places())
        report.note(f"{count} measurements of {options.seconds:g} s, a guest with two disks")
        try:
            study.run()
            status = 1 if study.failures else 0
        except PmtError as error:
            err.print(f"error: {error.message} [{error.code}]\ncure: {error.cure}", markup=False)
        except KeyboardInterrupt:
            status = _INTERRUPTED
    if not study.rows:
        return status
    summary = study.write(machine)
    for line in page.summary_lines(summary):
        out.print(line, markup=False)
    # Without matplotlib all but the pictures is there, and 'page' can make them elsewhere.
    try:
        plots.draw(Table(summary["figures"]), args.directory)
    except PmtError as error:
        err.print(f"no pictures: {error.message}", markup=False)
    err.print(f"see {args.directory}/summary.json and rows.csv", markup=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
