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

"""The model of what transactions leave on a disk tells every kind of damage from a good image."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from nova_pmt.exception import LabError
from nova_pmt.lab import transactions
from nova_pmt.lab.transactions import AREA_START, RECORD, Client, Exchange, check, parse, record

BOOT = 0xF3CBB26F92236F05


def image(*entries: tuple[int, int, int], size: int = 4 << 20) -> bytearray:
    """A disk with these records (sequence number, client, request), each in its place."""
    disk = bytearray(size)
    for seq, client, request in entries:
        at = AREA_START + (seq - 1) * RECORD
        disk[at : at + RECORD] = record(seq, client, request, BOOT)
    return disk


def sent(client: int, request: int, seq: int | None = None) -> Exchange:
    return Exchange(client, request, 1.0, seq, None if seq is None else 2.0)


def problems(disk: bytes, answered: list[Exchange], unanswered: list[Exchange] = ()) -> list[str]:
    return check(parse(disk), answered, unanswered, boot_id=BOOT)


def test_record_is_as_documented():
    data = record(5, 7, 9, BOOT)
    assert len(data) == RECORD
    assert data.startswith(transactions.MAGIC)
    assert struct.unpack_from("<4Q", data, 16) == (5, 7, 9, BOOT)
    assert record(5, 7, 9, BOOT) == data
    # As guest/transactions.c makes it; the functional tests compare whole disks.
    assert struct.unpack_from("<2Q", data, 48) == (0x3517C61F4EE9EED1, 0xB20CDB5E32BF4EF4)


def test_fill_and_checksum_differ_between_records():
    one, two = record(1, 1, 1, BOOT), record(2, 1, 1, BOOT)
    assert one[48:56] != two[48:56]
    assert one[56:] != two[56:]
    assert len(set(one[56:])) > 150  # does not compress


def test_numbers_may_have_all_64_bits():
    top = (1 << 64) - 1
    (found,) = parse(image((1, top, top)))
    assert (found.client, found.request, found.good) == (top, top, True)


def test_parse_finds_all_records_and_no_empty_place():
    disk = image((1, 1, 1), (2, 2, 1), (4, 1, 2))
    found = parse(disk)
    assert [(r.slot, r.seq, r.client, r.request) for r in found] == [
        (1, 1, 1, 1),
        (2, 2, 2, 1),
        (4, 4, 1, 2),
    ]
    assert all(r.good and r.boot_id == BOOT for r in found)
    assert parse(bytes(4 << 20)) == parse(b"") == []


def test_what_lies_outside_the_area_is_none_of_its_business():
    disk = image((1, 1, 1), size=transactions.AREA_END + 4096)
    disk[: RECORD * 2] = b"x" * RECORD * 2
    disk[transactions.AREA_END :] = b"y" * 4096
    assert len(parse(disk)) == 1


@pytest.mark.parametrize("at", [0, 16, 24, 32, 40, 48, 56, 511])
def test_one_changed_bit_spoils_a_record(at):
    disk = image((1, 1, 1))
    disk[AREA_START + at] ^= 1
    assert not parse(disk)[0].good
    assert "slot 1" in problems(disk, [sent(1, 1, 1)])[0]


def test_a_record_in_the_wrong_place_is_not_good():
    disk = image((1, 1, 1))
    disk[AREA_START + RECORD : AREA_START + 2 * RECORD] = record(1, 1, 1, BOOT)
    assert [r.good for r in parse(disk)] == [True, False]


def test_answered_requests_in_their_places_are_fine():
    assert problems(image((1, 1, 1), (2, 2, 1)), [sent(2, 1, 2), sent(1, 1, 1)]) == []
    assert problems(image(), []) == []


def test_unanswered_request_may_be_there_or_not():
    assert problems(image((1, 1, 1)), [], [sent(1, 1)]) == []
    assert problems(image(), [], [sent(1, 1)]) == []


def test_lost_answer_is_found():
    (text,) = problems(image((1, 1, 1)), [sent(1, 1, 1), sent(1, 2, 2)])
    assert text == "slot 2: empty, but (1, 2) was answered"


def test_a_hole_is_found():
    assert "behind it" in problems(image((2, 1, 1)), [sent(1, 1, 2)])[0]


def test_repeated_request_is_found():
    answered = [sent(1, 1, 1)]
    (again, unknown) = problems(image((1, 1, 1), (2, 1, 1)), answered)
    assert "again" in again
    assert "nobody sent" in unknown
    assert "again" in problems(image((1, 2, 2), (2, 2, 2)), [], [sent(2, 2)])[0]


def test_somebody_elses_record_is_found():
    assert "got this answer" in problems(image((1, 2, 1)), [sent(1, 1, 1)])[0]
    assert "nobody sent" in problems(image((1, 2, 1)), [])[0]


def test_one_answer_for_two_is_found():
    wrong = problems(image((1, 1, 1)), [sent(2, 1, 1), sent(1, 1, 1)])
    assert wrong == ["answer 1 was given to (2, 1), (1, 1)"]


def test_record_of_another_boot_is_found():
    wrong = check(parse(image((1, 1, 1))), [sent(1, 1, 1)], boot_id=BOOT + 1)
    assert "of boot f3cb" in wrong[0]
    disk = image((1, 1, 1))
    disk[AREA_START + RECORD : AREA_START + 2 * RECORD] = record(2, 1, 2, BOOT + 1)
    assert len(check(parse(disk), [sent(1, 1, 1)])) == 1


def test_raw_image_is_read_from_its_file(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(image((1, 1, 1)))
    assert transactions.compare(path, "raw", [sent(1, 1, 1)]) == []
    assert len(transactions.compare(path, "raw", [sent(1, 2, 1)])) == 1


# -- client ----------------------------------------------------------------------------------


@pytest.fixture
def answers():
    """A client, and what its server shall answer, line by line; b"" hangs up."""
    ours, theirs = socket.socketpair()
    lines: list[bytes] = []
    asked: list[bytes] = []

    def serve() -> None:
        with theirs, theirs.makefile("rb") as requests:
            for line in requests:
                asked.append(line)
                answer = lines.pop(0)
                if not answer:
                    return
                theirs.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    ours.settimeout(5)
    with Client(ours, 7) as client:
        yield client, lines, asked
    thread.join()


def test_client_remembers_what_it_sent_and_what_was_answered(answers):
    client, lines, asked = answers
    lines += [b"1\n", b"4\n"]
    assert [client.request(), client.request()] == [1, 4]
    assert asked == [b"T 7 1\n", b"T 7 2\n"]
    assert [(e.client, e.request, e.seq) for e in client.answered] == [(7, 1, 1), (7, 2, 4)]
    assert all(e.sent_at <= e.answered_at for e in client.exchanges)
    assert client.unanswered == []


def test_an_error_is_no_answer_but_the_connection_goes_on(answers):
    client, lines, _ = answers
    lines += [b"error disk vda slot 1: Input/output error\n", b"1\n"]
    with pytest.raises(LabError, match="Input/output"):
        client.request()
    assert client.request() == 1
    assert [e.request for e in client.unanswered] == [1]


@pytest.mark.parametrize("last", [b"", b"12"], ids=["no answer", "half an answer"])
def test_broken_connection_is_told_and_stays_so(answers, last):
    client, lines, _ = answers
    lines.append(last)
    if last:
        client.connection.settimeout(0.1)
    with pytest.raises((ConnectionError, TimeoutError)):
        client.request()
    with pytest.raises(ConnectionError):
        client.request()
    assert len(client.unanswered) == 1
    assert client.answered == []


def test_dump_and_verify(answers):
    client, lines, _ = answers
    lines += [b"count=2\n1 7 1\n2 8 1\n", b"ok 2\n", b"error disk vda slot 1\n"]
    table = client.dump()
    assert check(table, [sent(7, 1, 1), sent(8, 1, 2)]) == []
    assert client.verify() == 2
    with pytest.raises(LabError, match="slot 1"):
        client.verify()
