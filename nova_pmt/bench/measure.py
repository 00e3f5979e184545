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

"""The process that measures: ``python -m nova_pmt.bench.measure`` inside a host.

It takes one JSON object per line on its standard input and answers with one or more lines on its
standard output; the last of each answer has the member ``done``. See :func:`serve`.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from nova_pmt.bench.guest import BenchGuest
from nova_pmt.bench.inside import Tell, converse
from nova_pmt.bench.variants import Sample, Variants
from nova_pmt.worker import pausing

#: Not counted: the first rounds warm caches and let the cache of slabs find its size.
WARM_UP = 5
STEPS = ("stop", "scan", "copy", "save", "cont")


def orders(names: list[str], rounds: int, seed: int = 1) -> Iterator[list[str]]:
    """The order of the variants in each round: random, and the same in each run."""
    source = random.Random(seed)
    for _ in range(rounds):
        order = list(names)
        source.shuffle(order)
        yield order


def calibrate(guest: BenchGuest, request: dict[str, Any], tell: Tell) -> None:
    """How many pages one checkpoint has at the present load."""
    variants = Variants(guest, passes=request["passes"], interval_s=request["interval_ms"] / 1e3)
    found = [variants.pause().record for _ in range(request["rounds"])]
    pages = [record.pages for record in found if record is not None]
    tell(done="calibrate", pages=float(np.median(pages)))


def measure(guest: BenchGuest, request: dict[str, Any], tell: Tell) -> None:
    """The variants, interleaved, in an order that differs in each round."""
    variants = Variants(guest, passes=request["passes"], interval_s=request["interval_ms"] / 1e3)
    samples: dict[str, list[Sample]] = {name: [] for name in variants.table}
    rounds = request["rounds"]
    for number, order in enumerate(orders(list(variants.table), rounds + WARM_UP)):
        for name in order:
            sample = variants.table[name]()
            if number >= WARM_UP:
                samples[name].append(sample)
        gc.collect(0)
        tell(progress=max(0, number + 1 - WARM_UP), total=rounds)
    tell(
        done="measure",
        samples={name: [sample.ms for sample in some] for name, some in samples.items()},
        records={
            name: {
                "pages": [s.record.pages for s in samples[name] if s.record],
                "pause_pages": [s.record.pause_pages for s in samples[name] if s.record],
                **{
                    f"{step}_ms": [
                        getattr(s.record, f"{step}_us") / 1e3 for s in samples[name] if s.record
                    ]
                    for step in STEPS
                },
            }
            for name in ("pause", "plain")
        },
    )


def serve(source: TextIO, sink: TextIO) -> int:
    """First line: ``domain``, ``threads``; then requests with ``do`` and their numbers."""

    def talk(first: dict[str, Any], requests: Iterator[dict[str, Any]], tell: Tell) -> None:
        with BenchGuest(first["domain"], threads=first["threads"]) as guest:
            pausing.prepare()
            tell(
                done="start",
                qemu=guest.qemu_version,
                pages=guest.layout.page_count,
                threads=guest.tracker.thread_count,
            )
            for request in requests:
                {"calibrate": calibrate, "measure": measure}[request["do"]](guest, request, tell)

    return converse(source, sink, talk)


if __name__ == "__main__":
    sys.exit(serve(sys.stdin, sys.stdout))
