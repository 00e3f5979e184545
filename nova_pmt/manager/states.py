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

"""The life of a pair, as the manager remembers it: its states and every step between two of them.

One machine for all pairs. An agent's report that names no step from where the pair is changes
nothing: it is late, or it comes from a host that has lost the pair.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, get_args

State = Literal[
    "unprotected",
    "checking",
    "syncing",
    "protected",
    "failing_over",
    "primary_alone",
    "standby_active",
    "reprotecting",
    "error",
]
STATES: tuple[State, ...] = get_args(State)

#: From each state the ones that may follow.
STEPS: MappingProxyType[State, frozenset[State]] = MappingProxyType(
    {
        "unprotected": frozenset({"checking"}),
        "checking": frozenset(
            {"syncing", "protected", "failing_over", "primary_alone", "unprotected", "error"}
        ),
        "syncing": frozenset(
            {"protected", "failing_over", "primary_alone", "reprotecting", "unprotected", "error"}
        ),
        "protected": frozenset(
            {"failing_over", "primary_alone", "reprotecting", "unprotected", "error"}
        ),
        "failing_over": frozenset({"standby_active", "reprotecting", "error"}),
        "primary_alone": frozenset({"reprotecting", "unprotected", "error"}),
        "standby_active": frozenset({"reprotecting", "unprotected", "error"}),
        "reprotecting": frozenset(
            {"syncing", "protected", "failing_over", "primary_alone", "unprotected", "error"}
        ),
        # (An agent that failed says nothing of the guest: its sides may still have to ask.)
        "error": frozenset({"reprotecting", "unprotected", "primary_alone", "failing_over"}),
    }
)
#: A generation is under way: its two sides may still have to ask who goes on.
OPEN: frozenset[State] = frozenset({"checking", "syncing", "protected", "reprotecting"})
#: A new generation may begin from each; with the state that it begins in.
BEGINS: MappingProxyType[State, State] = MappingProxyType(
    {
        "unprotected": "checking",
        "primary_alone": "reprotecting",
        "standby_active": "reprotecting",
        "error": "reprotecting",
        # The host that runs the guest gives up a generation of its own and begins another.
        "checking": "checking",
        "syncing": "reprotecting",
        "protected": "reprotecting",
        "failing_over": "reprotecting",
        "reprotecting": "reprotecting",
    }
)
#: What the winner of a claim does next.
CLAIMED: MappingProxyType[str, State] = MappingProxyType(
    {"primary": "primary_alone", "standby": "failing_over"}
)
#: A repair is due.
BROKEN: frozenset[State] = frozenset({"primary_alone", "standby_active"})

#: What agents call their states, by the part that the host has in the pair. What is not here is
#: between two of the manager's states, or is none of its business.
REPORTED: MappingProxyType[tuple[str, str], State] = MappingProxyType(
    {
        ("primary", "syncing"): "syncing",
        ("primary", "protected"): "protected",
        ("primary", "primary_alone"): "primary_alone",
        ("primary", "unprotected"): "unprotected",
        ("primary", "ended"): "unprotected",
        ("primary", "error"): "error",
        ("standby", "failing_over"): "failing_over",
        ("standby", "standby_active"): "standby_active",
        ("standby", "error"): "error",
    }
)


def may_follow(old: State, new: State) -> bool:
    """Whether there is a step from one to the other."""
    return new in STEPS[old]


def before(new: State) -> frozenset[State]:
    """The states from which there is a step to this one."""
    return frozenset(old for old in STATES if new in STEPS[old])
