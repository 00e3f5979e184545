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

"""What comes in over RPC and from the command line is checked here, before anything is done.

Each function returns the value in its normal form or raises
:class:`nova_pmt.exception.InvalidInput`.
"""

from __future__ import annotations

import re
from typing import Any

from nova_pmt.exception import InvalidInput
from nova_pmt.guest.disk.spec import DiskSpec

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_TOKEN = re.compile(r"[0-9A-Za-z_-]{1,128}")
#: libvirt refuses '/' in names; the rest keeps names fit for terminals and logs.
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,255}")

MAX_XML_BYTES = 1 << 20
MAX_BLOCKS = 4096
MAX_DISKS = 128
MAX_MEMORY_BYTES = 1 << 48
MAX_GENERATION = 1 << 53

#: Option: (type, least, greatest). The bounds of [checkpoint] hold here too.
OPTION_BOUNDS: dict[str, tuple[type, float, float]] = {
    "interval_ms": (int, 5, 10_000),
    "epoch_limit_ms": (int, 50, 60_000),
    "max_pause_ms": (float, 0, 10_000),
    "cache_limit_mib": (int, 8, 1 << 20),
    "passes": (int, 0, 8),
}


def _matches(pattern: re.Pattern[str], value: Any, what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        # Never the whole value: it may be long, and it goes to terminals and logs.
        raise InvalidInput(f"not {what}: {str(value)[:64]!r}")
    return value


def _integer(value: Any, what: str, least: int, greatest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= greatest:
        raise InvalidInput(
            f"{what} must be a whole number from {least} to {greatest}: {value!r:.64}"
        )
    return value


def uuid(value: Any) -> str:
    """A UUID with hyphens, in lower case."""
    return _matches(_UUID, value.lower() if isinstance(value, str) else value, "a UUID")


def domain(value: Any) -> str:
    """A domain's UUID or name."""
    text = _matches(_NAME, value, "a domain's UUID or name")
    return text.lower() if _UUID.fullmatch(text.lower()) else text


def host(value: Any) -> str:
    """A host's name."""
    return _matches(_HOST, value, "a host name")


def token(value: Any) -> str:
    """A token of the arbiter."""
    return _matches(_TOKEN, value, "an arbiter's token")


def generation(value: Any) -> int:
    return _integer(value, "generation", 1, MAX_GENERATION)


def memory_bytes(value: Any) -> int:
    return _integer(value, "memory_bytes", 1, MAX_MEMORY_BYTES)


def flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(f"{what} must be true or false")
    return value


def word(value: Any, what: str) -> str:
    """A name of ours: small letters, digits, hyphens."""
    return _matches(_WORD, value, what)


def strategy(value: Any, known: frozenset[str]) -> str:
    """The name of a strategy that is installed."""
    name = word(value, "a strategy's name")
    if name not in known:
        raise InvalidInput(
            f"there is no strategy {name!r}",
            cure=f"Choose one of: {', '.join(sorted(known)) or 'none is installed'}.",
        )
    return name


def options(value: Any) -> dict[str, float]:
    """Overrides of ``[checkpoint]`` for one pair; None means none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidInput("options must be a dictionary")
    known = ", ".join(OPTION_BOUNDS)
    checked: dict[str, float] = {}
    for key, number in value.items():
        if key not in OPTION_BOUNDS:
            raise InvalidInput(f"unknown option {str(key)[:64]!r}", cure=f"Known: {known}.")
        kind, least, greatest = OPTION_BOUNDS[key]
        good = isinstance(number, (int, float)) and not isinstance(number, bool)
        # The comparison also refuses NaN and infinities.
        if not good or not least <= number <= greatest or (kind is int and number != int(number)):
            whole = "whole " if kind is int else ""
            raise InvalidInput(
                f"{key} must be a {whole}number from {least:g} to {greatest:g}: {number!r:.64}"
            )
        checked[key] = kind(number)
    return checked


def domain_xml(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_XML_BYTES:
        raise InvalidInput(f"domain_xml must be text of 1 to {MAX_XML_BYTES} characters")
    return value


def layout(value: Any) -> list[dict[str, Any]]:
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= MAX_BLOCKS
        or not all(isinstance(block, dict) for block in value)
    ):
        raise InvalidInput(f"layout must be a list of 1 to {MAX_BLOCKS} blocks")
    return value


def disks(value: Any) -> list[dict[str, Any]]:
    """Disks of a guest; None means none."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_DISKS:
        raise InvalidInput(f"disks must be a list of at most {MAX_DISKS}")
    try:
        specs = [DiskSpec.from_dict(disk) for disk in value]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"disks: {error}") from error
    if len({disk.name for disk in specs}) + len({disk.path for disk in specs}) < 2 * len(specs):
        raise InvalidInput("disks: a name or path appears twice")
    return [disk.to_dict() for disk in specs]
