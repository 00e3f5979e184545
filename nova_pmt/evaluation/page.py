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

"""The results page: made from what campaigns wrote, never typed by hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nova_pmt import faultpoint, unsafe
from nova_pmt.evaluation.report import two

PAGE = Path("doc/source/results/output-commit.md")
DATA = Path("doc/source/results/data")
PATTERN = "output-commit*.json"
FAULTS_PAGE = Path("doc/source/results/faults.md")
FAULTS_PATTERN = "faults*.json"

_INTRODUCTION = """\
# Output commit: the campaign

<!-- Made by `nova-pmt-campaign page` from the files that campaigns wrote. Do not edit. -->

Two hosts with agents, and a guest with a small transactional server: each request gets the next
number, is written to two disks (qcow2 on virtio-blk, raw on virtio-scsi) with fdatasync, and is
answered with its number. Clients outside hold their connections open and send requests, while one
of these is killed at a random moment, again and again:

- `qemu`: the QEMU of the primary (SIGKILL)
- `worker`: the primary's worker; its agent lives, and either side may go on
- `both`: worker and agent of the primary at once
- `host`: the primary's host, in half of the trials with its network cut first

After each kill: one side goes on and the other has ended; every answered request is in the guest's
memory in its place, none twice; the guest finds its disks as its memory; the images of the
survivor, while it is paused, are what the answered requests make them, byte for byte, over the
whole record area; `qemu-img check` is clean; and each client goes on with the same TCP connection.
Then the guest is protected towards the other host, over the stale images there, and the next trial
begins.
"""
_NEGATIVE = """\
The same campaign with `NOVA_PMT_UNSAFE=no-egress-buffer`: packets are not held until their
checkpoint is committed. It must lose answered requests; otherwise the campaign could not fail.
Connections break as well, since clients have then seen more of them than the survivor knows.
"""


_FAULTS_INTRODUCTION = """\
# One survivor: the fault campaign

<!-- Made by `nova-pmt-campaign page --faults` from the files that campaigns wrote. Do not edit. -->

Three hosts with agents, two managers over one database, RabbitMQ, and one guest with a small
transactional server; clients outside hold their connections open and send requests. Each trial does
something of this at a random moment, and puts it right after a random time, half of the time not
before it was decided who goes on:

- SIGKILL, or SIGSTOP and later SIGCONT: of QEMU, worker or agent of either side, of one manager or
  both, of RabbitMQ
- the managers' database locked by somebody else
- a whole host: its power cut (with its network first, or not), or all its processes stopped
- cables of either side: replication, control plane, both or the guest's cut; one direction only;
  packets lost at random; little bandwidth
- a worker that dies when it comes to a named step of a synchronisation, a round, a failover or a
  planned switchover
- two of these at once

Then the guest must be protected again, by itself, wherever it is. What is checked each time: what
clients were answered, as in the [campaign of output commit](output-commit.md); one timeline of all
that hosts let out, in which nobody lets out anything after another side went on, and no epoch
before its checkpoint was whole on the standby; and that nothing is left over on any host of older
arrangements: processes, sockets, filters, files below `/run/nova_pmt`, memory, interfaces.
"""


#: How what is said of void trials ends: of faults, or not.
_END = {False: "the kill", True: "the fault, or lost guest and standby at once"}


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _sums(summary: Mapping[str, Any]) -> str:
    rows = [
        ("trials", summary["trials"]),
        ("failovers (the standby went on)", summary["failovers"]),
        ("requests answered", summary["answered"]),
        ("**answered requests lost**", f"**{summary['lost']}**"),
        ("requests or answers twice", summary["repeated"]),
        ("records that nobody sent", summary["unexplained"]),
        ("connections broken", summary["broken_connections"]),
        ("images unlike the answered requests", summary["image_mismatches"]),
        ("errors found by `qemu-img check`", summary["image_check_errors"]),
        ("clusters leaked", summary["image_leaks"]),
        ("disks unlike memory, as the guest sees it", summary["disks_unlike_memory"]),
        ("both hosts ran it to the end", summary["two_survivors"]),
    ]
    if summary["options"]["negative"]:
        rows.insert(4, ("trials that lost any", summary["trials_with_loss"]))
    return _table(("what", "how many"), rows)


def _kinds(summary: Mapping[str, Any]) -> str:
    head = ("killed", "trials", "failovers", "lost", "kill to running, ms p50 / p99")
    rows = [
        (
            f"`{kind}`",
            row["trials"],
            row["failovers"],
            row["lost"],
            two(row["failover_ms"]),
            two(row["silence_ms"]),
        )
        for kind, row in summary["kinds"].items()
    ]
    return _table((*head, "no answer to any client, ms p50 / p99"), rows)


def _fault_sums(summary: Mapping[str, Any]) -> str:
    rows = [
        ("trials", summary["trials"]),
        ("a standby went on", summary["failovers"]),
        ("requests answered", summary["answered"]),
        ("**answered requests lost**", f"**{summary['lost']}**"),
        ("requests or answers twice", summary["repeated"]),
        ("connections broken", summary["broken_connections"]),
        ("images unlike the answered requests", summary["image_mismatches"]),
        ("**outputs of two hosts**", f"**{summary['split_brain']}**"),
        ("epochs released before their commit", summary["early_releases"]),
        ("things left over", summary["leftovers"]),
        ("guests not protected again", summary["unrecovered"]),
    ]
    gap = summary["gap_ms"]
    if gap is not None:
        text = " / ".join(f"{gap[key]:.0f}" for key in ("p50", "p99", "max"))
        rows.append(("longest silence that clients saw, ms p50 / p99 / max", text))
    return _table(("what", "how many"), rows)


def _fault_kinds(summary: Mapping[str, Any]) -> str:
    kinds, steps = summary["faults"]["kinds"], summary["faults"]["steps"]
    rows = [(f"`{kind}`", count) for kind, count in kinds.items() if kind != "step"]
    rows += [(f"died at `{step}`", count) for step, count in steps.items()]
    text = _table(("fault", "times"), rows)
    for kind, reason in summary["skipped"].items():
        text += f"\nNot done: `{kind}`: {reason}"
    return text


def faults_page(files: Sequence[Path]) -> str:
    """As :func:`page`, of campaigns of faults."""
    parts = [_FAULTS_INTRODUCTION]
    read = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    safe = [summary for _, summary in read if not summary.get("without")]
    if len(safe) > 1:
        parts += ["## All together\n", _together(safe)]
    for path, summary in sorted(read, key=lambda one: bool(one[1].get("without"))):
        if summary.get("without"):
            parts.append(f"## Without: seed {summary['seed']}\n")
            parts.append(_WITHOUT[summary["without"]])
        else:
            parts.append(f"## {summary['trials']} trials: seed {summary['seed']}\n")
        plane = f"{summary['managers']} managers over {summary['database']}."
        parts += [plane + "\n", _fault_sums(summary), _fault_kinds(summary)]
        parts += [_gaps(summary), _facts(path, summary)]
    return "\n".join(parts)


_WITHOUT = {
    unsafe.AT_ONCE: """\
The same campaign with `NOVA_PMT_UNSAFE=release-at-once`: packets are let out when their epoch ends
and not when it is committed. It must find epochs that are released early, or it could not fail.
""",
    unsafe.UNDECIDED: """\
The same campaign with `NOVA_PMT_UNSAFE=no-arbiter`: whoever claims goes on. It must find that two
hosts let out what one may, or it could not fail.
""",
}


def _together(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Sums over several campaigns, and the named steps that none of them came to."""
    sums = (
        ("trials", "trials"),
        ("a standby went on", "failovers"),
        ("requests answered", "answered"),
        ("**answered requests lost**", "lost"),
        ("requests or answers twice", "repeated"),
        ("connections broken", "broken_connections"),
        ("images unlike the answered requests", "image_mismatches"),
        ("**outputs of two hosts**", "split_brain"),
        ("epochs released before their commit", "early_releases"),
        ("things left over", "leftovers"),
        ("guests not protected again", "unrecovered"),
    )
    rows = [(what, sum(summary[key] for summary in summaries)) for what, key in sums]
    died = {step for summary in summaries for step in summary["faults"]["steps"]}
    missed = [f"`{step}`" for step in faultpoint.WORKER_STEPS if step not in died]
    text = f"{len(died)} of {len(faultpoint.WORKER_STEPS)} named steps were died at"
    return _table(("what", "how many"), rows) + f"\n{text}{_but(missed)}.\n"


def _but(missed: Sequence[str]) -> str:
    return f", none at {', '.join(missed)}" if missed else ""


def _gaps(summary: Mapping[str, Any]) -> str:
    rows = [
        (f"`{name}`", row["trials"], *(f"{row[key]:.0f}" for key in ("p50", "p99", "max")))
        for name, row in summary["gaps"].items()
    ]
    head = ("one fault, side", "trials", "p50", "p99", "max")
    return "No answer to any client, in ms:\n\n" + _table(head, rows)


def _checkpoints(options: Mapping[str, Any]) -> str:
    strategy = options.get("strategy", "pmt")  # earlier results have none
    if strategy == "kemari":
        return "strategy kemari: a checkpoint with each first output"
    each = f"a checkpoint each {options['interval_ms']} ms"
    return each if strategy == "pmt" else f"strategy {strategy}, {each} or when it pays"


def _facts(path: Path, summary: Mapping[str, Any]) -> str:
    options, machine, faults = summary["options"], summary["machine"], "split_brain" in summary
    load = ", ".join(str(value) for value in machine["load_average"])
    words = [
        f"Seed {summary['seed']}, {options['clients']} clients, "
        f"{_checkpoints(options)}, {summary['seconds'] / 60:.0f} minutes "
        f"(p50 of a trial {summary['duration_s']['p50']:.1f} s), "
        f"{summary['guests']} guest{'s' if summary['guests'] > 1 else ''}."
        if summary["duration_s"]
        else f"Seed {summary['seed']}: no trial was finished.",
        f"Command: `{shlex.join(machine['command'])}`, {machine['date'][:10]}; "
        f"{machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']}, "
        f"QEMU {machine['qemu']} under TCG, Python {machine['python']}, "
        f"nova_pmt {machine['nova_pmt']}, load average {load}.",
        f"Data: `{path.name}`.",
    ]
    if summary["void"]:
        words.append(
            f"{len(summary['void'])} trials do not count, because the pair had come apart before "
            f"{_END[faults]}; the campaign went on with a new guest."
        )
    if summary["stopped"]:
        words.append(f"It ended early: {summary['stopped']}.")
    return "\n".join(words) + "\n"


def page(files: Sequence[Path]) -> str:
    """The page for the summaries in these files: those with the buffer on first.

    :raises OSError: a file cannot be read.
    :raises ValueError: it is no campaign's summary.
    :raises KeyError: the same.
    """
    read = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    parts = [_INTRODUCTION]
    for path, summary in sorted(read, key=lambda one: one[1]["options"]["negative"]):
        if summary["options"]["negative"]:
            parts.append(f"## Without holding packets: seed {summary['seed']}\n")
            parts.append(_NEGATIVE)
        else:
            parts.append(f"## {summary['trials']} trials: seed {summary['seed']}\n")
        parts += [_sums(summary), _kinds(summary), _facts(path, summary)]
    return "\n".join(parts)
