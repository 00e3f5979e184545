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

"""``nova-pmt-bench``: measures what protection costs, on guests of the lab."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nova_pmt import exception
from nova_pmt.bench import environment, page, report
from nova_pmt.bench.gaps import CAUSES
from nova_pmt.bench.report import Report
from nova_pmt.bench.violations import capture_passed
from nova_pmt.cmd.arguments import at_least

_INTERRUPTED = 130
_WIDE = 200
_DESCRIPTION = """\
Measures what protection costs a guest on this machine. Boots small guests of its own in the lab
(as root; all is gone at the end) and compares within one run, interleaved: other load on the
machine then falls on all alike. Look at the ratios; absolute times are this machine's.
"""
_PAUSE = """\
For each memory size boots one guest and has it touch all its memory; for each number of dirty
pages sets its dirtier so that a checkpoint has about so many, and measures in random order

  floor    stop + save devices + cont; nothing is scanned or copied
  pause    the pause of a round as the product does it, after its pre-copy passes
  plain    the same without passes: everything dirty is copied in the pause
  memcpy   the pages of the last pause, copied into warm memory while the guest runs

Combinations that do not fit into the guest's memory are left out, and said so.
"""
_PAUSE_EPILOG = """\
example:
  nova-pmt-bench pause --memory 128,4096 --dirty 1000,5000,20000 --json build/pause.json

rows of the JSON: memory_mib, dirty_pages (p50 of a checkpoint's), pause_ms, floor_ms, plain_ms and
memcpy_ms {p50, p99, max}, ratio (pause / floor at p50), ratio_p99, plain_ratio, pages_in_pause,
steps_ms (stop, scan, copy, save, cont; p50), machine, vcpus, rounds
"""
_MANAGERS = """\
Fills a database with pairs that are protected, lets hosts die, and has all sides that lost their
peer ask the managers' own code who goes on; then has all pairs protected again. Hosts and agents
are simulated: no lab, no root. Goal: 10,000 pairs on 500 hosts of which 20 die, all decided within
5 s.
"""
_FILTER = """\
Filters for one request after the other as Nova's scheduler does, with PMTStandbyFilter and without:
on 1,000 hosts, of servers that ask for nothing, of those that are to be protected, and of standbys.
Runs where Nova is installed; no lab, no root. Goal: at most 2 ms more at p50.
"""
_FILTER_EPILOG = """\
example:
  nova-pmt-bench filter --json build/filter.json

rows of the JSON: request, hosts, pairs, rounds, passing (hosts), without_ms, added_ms and
added_cpu_ms {p50, p99, max}, goal_ms, met
"""
_FAILOVER = """\
Whole pairs with agents and managers on two hosts; clients outside send a request when they have the
last answer. Measures the longest time without an answer to any of them, and what the old primary
did afterwards. What can happen to it:

  qemu     its QEMU is killed. Goal: p50 at most 300 ms, p99 at most 1 s
  silent   all networks of its host are cut. Goal: p50 at most the peer's timeout and 300 ms
  stopped  all processes of its host stand still, and go on later. Goal: at most 1.5 s

Exit status 1 if a side let out what it must not.
"""
_FAILOVER_EPILOG = """\
example:
  nova-pmt-bench failover --runs 50 --cause qemu,silent,stopped --json build/failover.json

rows of the JSON: cause, gap_ms (no answer to any client), goal_ms, met, failover_ms and
detection_ms (from the fault), activation_ms, destroyed_ms (the old domain, from when its host is
well again) {p50, p99, max}; late_releases (must be 0), late_frames (of the old primary's host after
the standby went on: what its kernel had when its processes were stopped), peer_timeout_ms, runs
"""
_OUTPUT = """\
Boots one guest with two disks, and measures each load three times, one right after the other:
unprotected, protected, unprotected again. Latencies are those of one client that sends a request
when it has the last answer; throughputs are what a client outside sees.

Goals: throughput protected at least 60 % of unprotected; latency p50 protected at most one
interval, a pause and 5 ms.
"""
_OUTPUT_EPILOG = """\
examples:
  nova-pmt-bench output --json build/output.json
  nova-pmt-bench output --disk-mb-s 50 --network-mbit 500 --json build/output-limited.json

rows of the JSON: load, kind (latency, throughput), off_ms (two), on_ms {p50, p99, max}, bound_ms,
or off_mb_s (two), on_mb_s and goal; ratio (protected / mean unprotected), drift (unprotected after
/ before), met; of the protected rounds pause_ms, commit_ms, output_delay_ms, throttled_rounds,
rounds, pages_per_round, log_bytes, sent_bytes; cores (processor time by process)
"""
_CAPTURE = """\
Protects a guest under mixed load (datagrams in frames of 60 to 9,000 bytes, echoes, a TCP stream,
disk writes), captures what leaves its tap, and compares each packet's time with that of its
epoch's release in the worker's trace. A packet that was seen before is a violation. The control
does the same with all releases one epoch later; it must find violations. Exit status 1 if a packet
was early, one was not captured, or the control found nothing.
"""
_IDLE = """\
Protects an idle guest and captures what passes between the hosts. Goals at an interval of 100 ms:
below 1 Mbit/s, and at most one burst of packets with a checkpoint per interval.
"""
_QMP = """\
Compares two QMP clients at stop + save devices + cont on one guest, in alternating blocks: the
qemu.qmp library, and nova_pmt's own. Each one command after the other, and as the pause uses it:
the save is under way while the thread does other things (ours sends it with the stop in one write).
"""


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not numbers with commas between: {text!r}") from error
    if not all(0 < number <= 1 << 24 for number in numbers):
        raise argparse.ArgumentTypeError("numbers must be from 1 to 16777216")
    return numbers


def _causes(text: str) -> tuple[str, ...]:
    causes = tuple(text.split(","))
    if not set(causes) <= set(CAUSES):
        raise argparse.ArgumentTypeError(f"causes are {', '.join(CAUSES)}")
    return causes


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="nova-pmt-bench",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="BENCHMARK", required=True)
    pause = commands.add_parser(
        "pause",
        help="the pause against its floor",
        description=_PAUSE,
        epilog=_PAUSE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pause.add_argument(
        "--memory", type=_numbers, default=(128,), metavar="MIB,...", help="guest sizes (128)"
    )
    pause.add_argument(
        "--dirty",
        type=_numbers,
        default=(1000,),
        metavar="PAGES,...",
        help="dirty pages per checkpoint, 4 KiB each (1000)",
    )
    pause.add_argument(
        "--passes", type=at_least(0), default=2, help="pre-copy passes before a pause (2)"
    )
    pause.add_argument(
        "--threads", type=at_least(0), default=0, help="threads that scan; 0: as the product (0)"
    )
    pause.add_argument(
        "--interval-ms", type=at_least(5), default=50, help="guest runs so long between (50)"
    )
    pause.add_argument(
        "--burst-ms", type=at_least(1), default=25, help="period of the guest's dirtier (25)"
    )
    _common(pause, rounds=150)
    qmp = commands.add_parser(
        "qmp",
        help="the qemu.qmp library against our monitor",
        description=_QMP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    qmp.add_argument("--memory", type=at_least(64), default=128, help="guest size in MiB (128)")
    qmp.add_argument("--block", type=at_least(1), default=25, help="rounds per block (25)")
    _common(qmp, rounds=200)
    link = commands.add_parser(
        "link",
        help="the pause on a limited link against the full link",
        description="Whole pairs with agents; phases on the full and the limited link alternate.",
    )
    link.add_argument("--mbit", type=at_least(10), default=100, help="limit in Mbit/s (100)")
    link.add_argument("--rounds", type=at_least(3), default=40, help="rounds per phase (40)")
    link.add_argument("--repeats", type=at_least(1), default=2, help="phases of each (2)")
    link.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")
    failover = commands.add_parser(
        "failover",
        help="how long clients get no answer when the primary fails",
        description=_FAILOVER,
        epilog=_FAILOVER_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    failover.add_argument("--runs", type=at_least(1), default=10, help="of each (10)")
    failover.add_argument(
        "--cause",
        type=_causes,
        default=("qemu",),
        metavar="CAUSE,...",
        help=f"of {', '.join(CAUSES)} (qemu)",
    )
    failover.add_argument(
        "--peer-timeout-ms", type=at_least(100), default=500, help="of both sides (500)"
    )
    failover.add_argument(
        "--away-s", type=at_least(1), default=10, help="a host is silent, or stands still (10)"
    )
    failover.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")
    output = commands.add_parser(
        "output",
        help="latency and throughput, protected against not",
        description=_OUTPUT,
        epilog=_OUTPUT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    output.add_argument("--interval-ms", type=at_least(5), default=20, help="(20)")
    output.add_argument(
        "--seconds", type=at_least(1), default=8, help="of each measurement, about (8)"
    )
    output.add_argument("--memory", type=at_least(64), default=512, help="guest size in MiB (512)")
    output.add_argument(
        "--disk-mb-s", type=at_least(0), default=0, help="limit of each disk's writes; 0: none (0)"
    )
    output.add_argument(
        "--network-mbit", type=at_least(0), default=0, help="limit of the network; 0: none (0)"
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")
    capture = commands.add_parser(
        "capture",
        help="whether a packet leaves before its commit",
        description=_CAPTURE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    capture.add_argument("--seconds", type=at_least(2), default=300, help="of load (300)")
    capture.add_argument("--interval-ms", type=at_least(5), default=20, help="(20)")
    capture.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")
    idle = commands.add_parser(
        "idle",
        help="what passes between the hosts for an idle guest",
        description=_IDLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    idle.add_argument("--seconds", type=at_least(2), default=20, help="(20)")
    idle.add_argument("--interval-ms", type=at_least(5), default=100, help="(100)")
    idle.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")
    managers = commands.add_parser(
        "managers",
        help="many hosts that die at once, and what managers make of it (simulated)",
        description=_MANAGERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    managers.add_argument("--pairs", type=at_least(1), default=10_000, help="(10000)")
    managers.add_argument("--hosts", type=at_least(2), default=500, help="(500)")
    managers.add_argument("--dead", type=at_least(1), default=20, help="of them (20)")
    managers.add_argument("--managers", type=at_least(1), default=2, help="processes (2)")
    managers.add_argument("--seed", type=at_least(0), default=1, help="(1)")
    managers.add_argument(
        "--mariadb", action="store_true", help="on a MariaDB server that is started for it"
    )
    managers.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.svg, .png)")
    managers.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")
    filters = commands.add_parser(
        "filter",
        help="what the filter adds to the scheduling of a request (needs Nova)",
        description=_FILTER,
        epilog=_FILTER_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    filters.add_argument("--hosts", type=at_least(2), default=1000, help="(1000)")
    filters.add_argument("--pairs", type=at_least(1), default=100, help="(100)")
    filters.add_argument("--rounds", type=at_least(3), default=300, help="of each kind (300)")
    filters.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")
    page = commands.add_parser(
        "page",
        help="the results page, from what the others wrote with --json",
        description="Prints a page of the documentation; those in doc/source/results are made so.",
    )
    page.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON of a benchmark")
    page.add_argument(
        "--pictures", type=Path, metavar="DIRECTORY", help="where the page will be: with pictures"
    )
    return parser


def _common(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--machine", choices=("q35", "pc"), default="q35", help="(q35)")
    parser.add_argument("--vcpus", type=at_least(1), default=1, help="(1)")
    parser.add_argument(
        "--rounds", type=at_least(3), default=rounds, help=f"measurements of each ({rounds})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and rows there")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status: 0 ok, 1 failed, 2 usage, 130 interrupted."""
    args = make_parser().parse_args(argv)
    logging.getLogger().addHandler(logging.NullHandler())
    out, err = Console(), Console(stderr=True, highlight=False)
    if not out.is_terminal:
        out.width = _WIDE
    command = ["nova-pmt-bench", *(sys.argv[1:] if argv is None else argv)]
    try:
        if args.command == "page":
            print(page.page(args.files, args.pictures))
            return 0
        with Report(err) as progress:
            table, rows, qemu = _RUN[args.command](args, progress)
        out.print(table)
        if args.json is not None:
            environment.write(args.json, environment.header(args.command, command, qemu), rows)
        if args.command == "capture" and not capture_passed(rows[0]):
            return 1
        if args.command == "failover" and any(row["late_releases"] for row in rows):
            return 1
    except (OSError, ValueError, KeyError) as error:
        err.print(f"error: this is no result of a benchmark: {error}", markup=False)
        return 1
    except exception.PmtError as error:
        err.print(f"error: {error.message} [{error.code}]", markup=False)
        err.print(f"cure: {error.cure}", markup=False)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _run_pause(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench.pause import PauseBenchmark, PauseOptions

    options = PauseOptions(
        memory_mib=args.memory,
        dirty_pages=args.dirty,
        rounds=args.rounds,
        machine=args.machine,
        vcpus=args.vcpus,
        passes=args.passes,
        threads=args.threads,
        interval_ms=args.interval_ms,
        burst_ms=args.burst_ms,
    )
    benchmark = PauseBenchmark(options, progress)
    benchmark.run()
    return report.pause_table(benchmark.rows), benchmark.rows, benchmark.qemu


def _run_link(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import link

    rows = link.run(mbit=args.mbit, rounds=args.rounds, repeats=args.repeats, report=progress)
    return report.link_table(rows), rows, environment.qemu_version()


def _run_failover(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import failover

    options = failover.Options(args.cause, args.runs, args.peer_timeout_ms, args.away_s)
    rows = failover.run(options, progress)
    return report.failover_table(rows), rows, environment.qemu_version()


def _run_output(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import output

    rows = output.run(
        seconds=args.seconds,
        interval_ms=args.interval_ms,
        memory_mib=args.memory,
        report=progress,
        limits=output.Limits(args.disk_mb_s, args.network_mbit),
    )
    return report.output_table(rows), rows, environment.qemu_version()


def _run_capture(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import capture

    rows = capture.run(seconds=args.seconds, interval_ms=args.interval_ms, report=progress)
    return report.capture_table(rows[0]), rows, environment.qemu_version()


def _run_idle(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import idle

    rows = idle.run(seconds=args.seconds, interval_ms=args.interval_ms, report=progress)
    return report.idle_table(rows[0]), rows, environment.qemu_version()


def _run_managers(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import managers

    options = managers.Options(args.pairs, args.hosts, args.dead, args.seed, managers=args.managers)
    with contextlib.ExitStack() as stack:
        if args.mariadb:
            options = replace(options, connection=stack.enter_context(managers.mariadb()))
        rows = managers.run(options, progress)
    if args.plot is not None:
        managers.plot(rows[0], args.plot)
    return report.managers_table(rows[0]), rows, "none"


def _run_filter(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import filter as filtering

    rows = filtering.run(filtering.Options(args.hosts, args.pairs, args.rounds), progress)
    return report.filter_table(rows), rows, "none"


def _run_qmp(args: argparse.Namespace, progress: Report):  # type: ignore[no-untyped-def]
    from nova_pmt.bench import qmp

    row, qemu = qmp.run(
        memory_mib=args.memory,
        machine=args.machine,
        vcpus=args.vcpus,
        rounds=args.rounds,
        block=args.block,
        progress=progress,
    )
    return report.qmp_table(row), [row], qemu


_RUN = {
    "pause": _run_pause,
    "qmp": _run_qmp,
    "link": _run_link,
    "failover": _run_failover,
    "output": _run_output,
    "capture": _run_capture,
    "idle": _run_idle,
    "managers": _run_managers,
    "filter": _run_filter,
}

if __name__ == "__main__":
    sys.exit(main())
