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

"""The guest's transactional server from outside: a client, and what the guest's disks must hold.

The server (``guest/transactions.c``, TCP port 7001) numbers requests from 1, writes a record of
each durably to every writable disk, and answers with the number. Lines of its protocol:

``T CLIENT REQUEST``  commit; the answer is the sequence number
``D``                 the table in memory: ``count=N``, then N times ``SEQ CLIENT REQUEST``
``V``                 compare the disks with memory: ``ok N``

Any answer may be ``error ...`` instead. Record ``s`` lies at byte ``AREA_START + (s - 1) * 512``;
it consists of 64 little-endian words: magic (two), sequence number, client, request, boot id,
checksum, and a fill that follows from the three numbers.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from nova_pmt.exception import LabError

PORT = 7001
MAGIC = b"PMT-LAB-RECORD\0\0"
RECORD = 512
AREA_START = 1 << 20
AREA_END = 48 << 20  # or the end of the disk; behind it there is load
CAPACITY = (AREA_END - AREA_START) // RECORD  # records on a disk that is large enough

_WORDS = RECORD // 8
_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Record:
    """A place of the record area that is not empty.

    :param slot: where it was found, from 1; a good record's ``seq`` is the same.
    :param good: it is what the server writes for these numbers, to the last bit.
    """

    slot: int
    seq: int
    client: int
    request: int
    boot_id: int
    good: bool = True


@dataclass
class Exchange:
    """A request that was sent, and its answer. Times are CLOCK_MONOTONIC in seconds."""

    client: int
    request: int
    sent_at: float
    seq: int | None = None
    answered_at: float | None = None


def mix(values: _Words) -> _Words:
    """splitmix64, as the guest has it; numbers wrap around."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = x ^ (x >> np.uint64(31))
    return mixed


def _records(seq: _Words, client: _Words, request: _Words, boot_id: _Words) -> _Words:
    """Records as rows of words, one for each index of the arguments."""
    rows: _Words = np.zeros((len(seq), _WORDS), dtype=np.uint64)
    rows[:, :2] = np.frombuffer(MAGIC, dtype=np.uint64)
    rows[:, 2], rows[:, 3], rows[:, 4], rows[:, 5] = seq, client, request, boot_id
    key = mix(seq ^ mix(client ^ mix(request)))
    rows[:, 7:] = mix(np.add.outer(key, np.arange(7, _WORDS, dtype=np.uint64)))
    checksum: _Words = np.zeros(len(seq), dtype=np.uint64)
    for word in range(_WORDS):
        column: _Words = rows[:, word]
        checksum = mix(checksum ^ column)
    rows[:, 6] = checksum
    return rows


def record(seq: int, client: int, request: int, boot_id: int) -> bytes:
    """The 512 bytes that the server writes."""
    one = (np.array([value], dtype=np.uint64) for value in (seq, client, request, boot_id))
    return _records(*one).tobytes()


def parse(image: bytes) -> list[Record]:
    """What is in the record area of a disk, without its empty places.

    :param image: the disk from its first byte on, at least up to the end of the area or its own.
    """
    return _parse_area(memoryview(image)[AREA_START:AREA_END])


def _parse_area(area: bytes | memoryview) -> list[Record]:
    size = len(area) // RECORD * RECORD
    rows = np.frombuffer(area[:size], dtype=np.uint64).reshape(-1, _WORDS)
    slots = np.flatnonzero(rows.any(axis=1))
    rows = rows[slots]
    good = (rows == _records(rows[:, 2], rows[:, 3], rows[:, 4], rows[:, 5])).all(axis=1)
    good &= rows[:, 2] == slots + np.uint64(1)
    return [
        Record(slot + 1, seq, client, request, boot_id, whole)
        for slot, (seq, client, request, boot_id), whole in zip(
            slots.tolist(), rows[:, 2:6].tolist(), good.tolist(), strict=True
        )
    ]


def read_area(path: str | os.PathLike[str], format: Literal["raw", "qcow2"]) -> bytes:
    """The record area of an image. No QEMU may be writing to it, or the result is of no moment.

    :raises LabError: qemu-img cannot read it.
    """
    size = AREA_END - AREA_START
    if format == "raw":
        with open(path, "rb") as image:
            image.seek(AREA_START)
            return image.read(size)
    with tempfile.TemporaryDirectory(prefix="nova-pmt-area-") as directory:
        area = os.path.join(directory, "area")
        argv = ["qemu-img", "dd", "-U", "-f", format, "-O", "raw", "bs=1M"]
        argv += [f"skip={AREA_START >> 20}", f"count={size >> 20}"]
        argv += [f"if={os.fspath(path)}", f"of={area}"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")
        with open(area, "rb") as file:
            return file.read()


def compare(
    path: str | os.PathLike[str],
    format: Literal["raw", "qcow2"],
    answered: Iterable[Exchange],
    unanswered: Iterable[Exchange] = (),
    *,
    boot_id: int | None = None,
) -> list[str]:
    """What is wrong in an image, given what clients know; empty: nothing.

    :param answered: of all clients; each must be there, in its place, once.
    :param unanswered: sent, but not answered: each may be there, once.
    :param boot_id: of the guest; without it all records must be of one boot.
    :raises LabError: the image cannot be read.
    """
    return check(_parse_area(read_area(path, format)), answered, unanswered, boot_id=boot_id)


def check(
    records: Sequence[Record],
    answered: Iterable[Exchange],
    unanswered: Iterable[Exchange] = (),
    *,
    boot_id: int | None = None,
) -> list[str]:
    """As :func:`compare`, for records of a disk (:func:`parse`) or of memory (Client.dump)."""
    wrong = []
    expected: dict[int, tuple[int, int]] = {}
    for exchange in answered:
        assert exchange.seq is not None
        numbers = (exchange.client, exchange.request)
        if exchange.seq in expected:
            wrong.append(f"answer {exchange.seq} was given to {expected[exchange.seq]}, {numbers}")
        expected[exchange.seq] = numbers
    possible = {(exchange.client, exchange.request) for exchange in unanswered}
    seen: dict[tuple[int, int], int] = {}
    present = {entry.slot for entry in records}
    for entry in records:
        slot, numbers = entry.slot, (entry.client, entry.request)
        if boot_id is None:
            boot_id = entry.boot_id
        if not entry.good:
            wrong.append(f"slot {slot}: no record, but not empty")
            continue
        if entry.boot_id != boot_id:
            wrong.append(f"slot {slot}: of boot {entry.boot_id:016x}, not {boot_id:016x}")
            continue
        if numbers in seen:
            wrong.append(f"slot {slot}: {numbers} again, as in slot {seen[numbers]}")
        seen.setdefault(numbers, slot)
        if slot in expected:
            if expected[slot] != numbers:
                wrong.append(f"slot {slot}: {numbers}, but {expected[slot]} got this answer")
        elif numbers not in possible:
            wrong.append(f"slot {slot}: {numbers}, which nobody sent or which was answered else")
    for seq in sorted(expected.keys() - present):
        wrong.append(f"slot {seq}: empty, but {expected[seq]} was answered")
    last = max(present, default=0)
    for slot in sorted(set(range(1, last + 1)) - present - expected.keys()):
        wrong.append(f"slot {slot}: empty, but there are records behind it")
    return wrong


class Client:
    """A client with one connection. It never reconnects: a broken connection is a finding.

    :param connection: TCP, to the server; its timeout holds for each answer. Is owned.
    :param client: number that tells it from others.

    Not for several threads at once.
    """

    def __init__(self, connection: socket.socket, client: int) -> None:
        self.client = client
        self.connection = connection
        self.exchanges: list[Exchange] = []
        self._numbers = itertools.count(1)
        self._lines = connection.makefile("rb")
        self._broken = False

    def request(self) -> int:
        """Send the next request and return the sequence number that is the answer.

        :raises OSError: the connection is broken (ConnectionError) or the answer is late
            (TimeoutError); the client is of no use then.
        :raises LabError: the answer is an error.
        """
        self._check()
        exchange = Exchange(self.client, next(self._numbers), time.monotonic())
        self.exchanges.append(exchange)
        answer = self._ask(f"T {exchange.client} {exchange.request}")
        exchange.answered_at = time.monotonic()
        exchange.seq = int(answer)
        return exchange.seq

    @property
    def answered(self) -> list[Exchange]:
        """What was answered with a sequence number."""
        return [exchange for exchange in self.exchanges if exchange.seq is not None]

    @property
    def unanswered(self) -> list[Exchange]:
        """What was sent, but has no answer."""
        return [exchange for exchange in self.exchanges if exchange.seq is None]

    def dump(self) -> list[Record]:
        """The server's table in memory; boot ids are 0."""
        count = int(self._ask("D").removeprefix("count="))
        entries = (map(int, self._line().split()) for _ in range(count))
        return [
            Record(slot, seq, client, request, 0, good=seq == slot)
            for slot, (seq, client, request) in enumerate(entries, 1)
        ]

    def verify(self) -> int:
        """Let the server compare its disks with its memory; returns the number of records.

        :raises LabError: they differ.
        """
        return int(self._ask("V").removeprefix("ok "))

    def _check(self) -> None:
        if self._broken:
            raise ConnectionError("the connection was found broken before")

    def _ask(self, line: str) -> str:
        self._check()
        self._broken = True  # until there is a whole answer
        self.connection.sendall(line.encode() + b"\n")
        answer = self._line()
        self._broken = False
        if answer.startswith("error"):
            raise LabError(f"transactions: {line}: {answer}")
        return answer

    def _line(self) -> str:
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the server closed the connection")
        return line.decode().rstrip("\n")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self.connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
