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

"""What several commands take on their lines: converters for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """A number that is not less."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not value >= least:  # nor is it NaN
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return value

    convert.__name__ = "number"  # argparse names it in "invalid number value"
    return convert


def some_of(known: Sequence[str], what: str) -> Callable[[str], tuple[str, ...]]:
    """Names with commas between; in the order of ``known``.

    :param what: they are called so where one is none.
    """

    def names(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        if set(asked) - set(known):
            raise argparse.ArgumentTypeError(f"{what} are {', '.join(known)}")
        return tuple(name for name in known if name in asked)

    return names
