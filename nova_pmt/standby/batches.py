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

"""Entries of a write log as changes of an image that may be under way together.

A server takes the requests that it has at a time in any order, so what overlaps must be in
different batches. What is written again to the very same place within a batch replaces what was
there: a guest that writes one block over and over costs no batch each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nova_pmt.guest import nbd
from nova_pmt.guest.disk.writelog import Entry, Kind

#: So much is planned before it is sent.
MAX_BATCH = 4096
#: Overlaps are looked for among what touches the same granule of the disk.
_GRANULE_BITS = 16
#: Larger changes are alone in their batch: they would touch too many granules.
_WIDE_BYTES = 4 << 20


def batches(entries: Iterable[Entry]) -> Iterator[list[nbd.Operation]]:
    """The changes, in batches within which nothing overlaps; flushes are left out.

    To be done one batch after the other, each in any order.
    """
    batch: list[nbd.Operation] = []
    granules: dict[int, list[int]] = {}  # number: indexes in the batch
    for entry in entries:
        if entry.kind is Kind.FLUSH:
            continue
        operation = _operation(entry)
        if entry.length > _WIDE_BYTES:
            if batch:
                yield batch
            yield [operation]
            batch, granules = [], {}
            continue
        offset, end = entry.offset, entry.offset + entry.length
        touched = range(offset >> _GRANULE_BITS, ((end - 1) >> _GRANULE_BITS) + 1)
        overlap = -1
        for granule in touched:
            for index in granules.get(granule, ()):
                other = batch[index]
                if other.offset < end and offset < other.offset + other.length:
                    overlap = index
                    break
            if overlap >= 0:
                break
        if (
            overlap >= 0
            and (other.offset, other.length) == (offset, entry.length)
            and entry.kind is Kind.WRITE  # a discard may leave what was written before it
        ):
            batch[overlap] = operation
            continue
        if overlap >= 0 or len(batch) == MAX_BATCH:
            yield batch
            batch, granules = [], {}
        for granule in touched:
            granules.setdefault(granule, []).append(len(batch))
        batch.append(operation)
    if batch:
        yield batch


def _operation(entry: Entry) -> nbd.Operation:
    if entry.kind is Kind.DISCARD:
        return nbd.trim(entry.offset, entry.length)
    if entry.zero or entry.data is None:
        return nbd.zero(entry.offset, entry.length)
    return nbd.write(entry.offset, entry.data)
