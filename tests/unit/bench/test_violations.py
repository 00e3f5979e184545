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

"""Each captured packet gets its epoch, and those that were early are found."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest

from nova_pmt.bench import violations
from nova_pmt.bench.violations import Release

#: Frames of four epochs; the third sent nothing.
EPOCHS = ((60, 9000), (1514,), (), (60, 61, 62))
OVERHEAD = violations.LENGTH_BYTES + 12
#: Epoch n + 1 is released at n + 1 seconds.
BASE = 5000


def stream(overhead: int = OVERHEAD) -> list[Release]:
    found, end = [], BASE
    for number, frames in enumerate(EPOCHS, 1):
        end += sum(size + overhead for size in frames)
        found.append(Release(number, end, float(number)))
    return found


def packets(late_s: float = 0.001) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """All frames, each so long after its release."""
    at = [number + late_s for number, frames in enumerate(EPOCHS, 1) for _ in frames]
    lengths = [size for frames in EPOCHS for size in frames]
    return np.array(at), np.array(lengths)


def test_packets_after_their_release_are_no_violation() -> None:
    verdict = violations.judge(*packets(), stream(), BASE)
    assert (verdict.violations, verdict.unmatched_ends, verdict.header_bytes) == (0, 0, 12)
    assert (verdict.packets, verdict.epochs) == (6, 3)
    assert (verdict.smallest, verdict.largest, verdict.bytes) == (60, 9000, 10757)
    assert verdict.closest_ms == pytest.approx(1.0)


def test_one_early_packet_is_found() -> None:
    at, lengths = packets()
    at[2] -= 0.0015
    assert violations.judge(at, lengths, stream(), BASE).violations == 1


def test_a_packet_that_no_epoch_let_out_is_a_violation() -> None:
    at, lengths = packets()
    verdict = violations.judge(np.append(at, 9.0), np.append(lengths, 77), stream(), BASE)
    assert verdict.violations == 1


def test_releases_one_epoch_later_would_be_violations() -> None:
    verdict = violations.judge(*packets(), violations.shifted(stream()), BASE)
    assert verdict.violations == 6


@pytest.mark.parametrize("header", violations.HEADERS)
def test_the_header_is_the_one_with_which_ends_match(header: int) -> None:
    verdict = violations.judge(*packets(), stream(violations.LENGTH_BYTES + header), BASE)
    assert (verdict.header_bytes, verdict.unmatched_ends) == (header, 0)


def test_a_packet_that_was_not_captured_shows() -> None:
    at, lengths = packets()
    verdict = violations.judge(np.delete(at, 1), np.delete(lengths, 1), stream(), BASE)
    assert verdict.unmatched_ends > 0


def test_nothing_captured_says_nothing() -> None:
    none = np.empty(0)
    with pytest.raises(ValueError, match="no packets"):
        violations.judge(none, none.astype(np.int64), stream(), BASE)


def test_a_trace_is_read_for_one_nic() -> None:
    lines = [
        json.dumps({"at": 1.5, "event": "release", "epoch": 7, "nic": nic, "end": 900})
        for nic in ("net0", "net1")
    ]
    assert violations.releases(lines, "net1") == [Release(7, 900, 1.5)]


GOOD = {"violations": 0, "lost_captures": 0, "unmatched_ends": 0, "control_violations": 9}


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"violations": 1}, False),
        ({"lost_captures": 1}, False),
        ({"unmatched_ends": 1}, False),
        ({"control_violations": 0}, False),
    ],
)
def test_only_a_whole_capture_with_a_control_that_fails_is_good(
    change: dict[str, int], passed: bool
) -> None:
    assert violations.capture_passed({**GOOD, **change}) is passed
