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

"""The rules of a pair, over all interleavings: ``tests/model/pair.pml``, checked by spin."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "model" / "pair.pml"


@dataclass(frozen=True)
class Verdict:
    """What spin's verifier found.

    :param unreached: statements of the model, other than ends, at which it never came.
    """

    errors: int
    states: int
    violated: str
    unreached: list[str]


def verify(directory: Path, *macros: str) -> Verdict:
    """Generate, compile and run the verifier of the model; no search is cut short."""

    def run(*argv: str) -> str:
        done = subprocess.run(
            argv, cwd=directory, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spin", *(f"-D{macro}" for macro in macros), "-a", str(MODEL))
    run("gcc", "-O1", "-DSAFETY", "-DNOREDUCE", "-o", "pan", "pan.c")
    text = run("./pan", "-m100000")
    assert "max search depth too small" not in text
    violated = re.search(r"assertion violated (.*) \(at", text)
    return Verdict(
        errors=_number(r"errors: (\d+)", text),
        states=_number(r"(\d+) states, stored", text),
        violated=violated[1].strip() if violated else "",
        unreached=re.findall(r"^\t\S+:\d+, state \d+, \"(?!-end-)(.*)\"", text, re.M),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])


def test_nothing_is_lost_and_one_survives_whatever_the_order(tmp_path: Path) -> None:
    verdict = verify(tmp_path)
    assert verdict.errors == 0, verdict.violated
    assert verdict.states > 5000
    assert not verdict.unreached


@pytest.mark.parametrize(
    ("macro", "rule"),
    [
        ("UNSAFE_EARLY", "released<=committed"),
        ("UNSAFE_STOOD", "standby!="),
        ("UNSAFE_ISOLATED", "standby!="),
        ("UNSAFE_NOT_ASKED", "aloneReleased"),
    ],
)
def test_the_model_finds_what_is_unsafe(tmp_path: Path, macro: str, rule: str) -> None:
    verdict = verify(tmp_path, macro)
    assert verdict.errors
    assert rule in verdict.violated
