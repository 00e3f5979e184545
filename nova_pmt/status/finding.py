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

"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from oslo_upgradecheck.upgradecheck import Code, Result

from nova_pmt import exception


@dataclass(frozen=True)
class Finding:
    """One of the things that a check found, worth a sentence."""

    code: Code
    text: str


def good(text: str) -> Finding:
    """As it should be, or no concern of this host's."""
    return Finding(Code.SUCCESS, text)


def doubt(text: str) -> Finding:
    """Works, but not always, or not for long; or it could not be seen."""
    return Finding(Code.WARNING, text)


def bad(text: str) -> Finding:
    """Does not work."""
    return Finding(Code.FAILURE, text)


def failed(error: exception.PmtError) -> Finding:
    """Does not work, for a reason that has a cure."""
    return bad(f"{error.message} [{error.code}] {error.cure}")


def result(findings: Iterable[Finding]) -> Result:
    """All that one check found: the worst counts and comes first, what is good is left out then."""
    found = sorted(findings, key=lambda finding: -finding.code)
    if not found:
        return Result(Code.SUCCESS)
    worst = found[0].code
    told = [finding.text for finding in found if finding.code or worst == Code.SUCCESS]
    return Result(worst, " / ".join(told))
