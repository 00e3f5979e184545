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

"""The ledger finds every answer that memory does not have, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nova_pmt.evaluation.ledger import Ledger
from nova_pmt.lab.transactions import Exchange, Record, check


def table(*entries: tuple[int, int]) -> list[Record]:
    """Memory with these (client, request), in places 1, 2, ..."""
    return [Record(seq, seq, *numbers, 0) for seq, numbers in enumerate(entries, 1)]


def answered(client: int, request: int, seq: int) -> Exchange:
    return Exchange(client, request, 1.0, seq, 2.0)


def unanswered(client: int, request: int) -> Exchange:
    return Exchange(client, request, 1.0)


def ledger(*exchanges: Exchange) -> Ledger:
    found = Ledger()
    found.take(exchanges)
    return found


def test_all_that_was_answered_is_there() -> None:
    audit = ledger(answered(1, 1, 1), answered(2, 1, 2)).audit(table((1, 1), (2, 1)))
    assert audit.clean


def test_an_answer_that_is_not_there_is_lost() -> None:
    audit = ledger(answered(1, 1, 1), answered(2, 1, 2)).audit(table((1, 1)))
    assert audit.lost == ["(2, 1) was answered 2; there is nothing"]
    assert not audit.repeated
    assert not audit.strangers


def test_an_answer_whose_place_another_has_is_lost() -> None:
    books = ledger(answered(1, 1, 1), answered(2, 1, 1))
    audit = books.audit(table((2, 1)))
    assert audit.lost == ["(1, 1) was answered 1; there is (2, 1)"]
    assert len(audit.repeated) == 1


def test_a_request_that_is_there_twice_is_repeated() -> None:
    audit = ledger(answered(1, 1, 2)).audit(table((1, 1), (1, 1)))
    assert len(audit.repeated) == 1
    assert len(audit.strangers) == 1


def test_what_nobody_sent_is_a_stranger() -> None:
    assert len(ledger(answered(1, 1, 1)).audit(table((1, 1), (9, 9))).strangers) == 1


def test_what_was_sent_but_not_answered_may_be_there_or_not() -> None:
    books = ledger(answered(1, 1, 1), unanswered(2, 1))
    assert books.audit(table((1, 1))).clean
    assert books.audit(table((1, 1), (2, 1))).clean


def test_what_was_seen_once_must_stay() -> None:
    books = ledger(answered(1, 1, 1), unanswered(2, 1))
    books.settle(table((1, 1), (2, 1)))
    assert len(books.audit(table((1, 1))).lost) == 1
    assert not books.possible()


def test_what_is_lost_is_counted_once() -> None:
    books = ledger(answered(1, 1, 1), answered(1, 2, 2))
    assert len(books.audit(table((1, 1))).lost) == 1
    books.settle(table((1, 1)))
    books.take([answered(1, 3, 2)])
    assert books.audit(table((1, 1), (1, 3))).clean


def test_a_damaged_entry_is_told() -> None:
    assert Ledger().audit([Record(1, 7, 1, 1, 0, good=False)]).strangers


def test_only_answers_are_counted() -> None:
    assert Ledger().take([answered(1, 1, 1), unanswered(1, 2)]) == 1


def test_the_disks_must_hold_what_memory_was_seen_to_have() -> None:
    books = ledger(answered(1, 1, 1), answered(2, 1, 2), unanswered(3, 1))
    memory = table((1, 1), (2, 1))
    books.settle(memory)
    assert check(memory, books.expected(), books.possible(), boot_id=0) == []
    assert check(memory[:1], books.expected(), books.possible(), boot_id=0)


@given(st.integers(0, 30), st.integers(0, 30), st.sets(st.integers(1, 30)))
def test_after_a_failover_exactly_the_answers_behind_the_checkpoint_are_lost(
    total: int, committed: int, silent: set[int]
) -> None:
    numbers = [(1 + seq % 3, seq) for seq in range(1, total + 1)]
    books = Ledger()
    books.take(
        unanswered(*one) if seq in silent else answered(*one, seq)
        for seq, one in enumerate(numbers, 1)
    )
    audit = books.audit(table(*numbers[:committed]))
    assert len(audit.lost) == len(set(range(committed + 1, total + 1)) - silent)
    assert not audit.repeated
    assert not audit.strangers
