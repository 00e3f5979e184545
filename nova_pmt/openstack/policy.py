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

"""Is this server to be protected, and how: the one answer for filter, driver and managers.

The flavor is the operator's word, the property the user's. The flavor decides whether the property
counts at all:

==================  ===============  =======================================================
``ft:mode``         property ``ft``  the server
==================  ===============  =======================================================
``off``             any              is not protected; the property is ignored
``pmt``, ``auto``,  any              is protected so; the property changes nothing
``kemari``
``allowed``         a mode           is protected so
``allowed``         ``off``, none    is not protected, and may be later
none                any              is not protected; with ``honour_property = always`` as if
                                     ``allowed``
==================  ===============  =======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

Mode = Literal["off", "pmt", "kemari", "auto"]
Honour = Literal["allowed", "always", "never"]

#: Server metadata: the user's wish, and the mark of a standby server (the UUID of its server).
PROPERTY = "ft"
STANDBY = "pmt:protects"
#: Scheduler hint of a standby server: the UUID of the server that it stands by for.
HINT = "pmt_standby_of"

#: Flavor extra specs.
MODE = "ft:mode"
INTERVAL_MS, MAX_PAUSE_MS, CACHE_MIB = "ft:interval_ms", "ft:max_pause_ms", "ft:cache_mib"

ACTIVE_MODES: tuple[Mode, ...] = ("pmt", "kemari", "auto")
FLAVOR_MODES: tuple[str, ...] = (*ACTIVE_MODES, "allowed", "off")
#: Lowest and highest value of each extra spec that is a number, in its unit.
BOUNDS: Mapping[str, tuple[int, int]] = {
    INTERVAL_MS: (5, 10_000),
    MAX_PAUSE_MS: (1, 10_000),
    CACHE_MIB: (8, 1_048_576),
}
_MOST_CHARACTERS = 64


@dataclass(frozen=True)
class Wish:
    """What a server is to have.

    :param mode: the strategy of its pair; ``off``: it has none.
    :param possible: it may be protected later, when its property changes: its domain is made so
        that it can be.
    :param interval_ms: of checkpoints; None: as the agents are configured.
    :param max_pause_ms: how long a pause may be; None: as the agents are configured.
    :param cache_mib: limit of the cache; None: as the agents are configured.
    :param ignored: what is not honoured, and why, for people; empty: nothing.
    """

    mode: Mode = "off"
    possible: bool = False
    interval_ms: int | None = None
    max_pause_ms: int | None = None
    cache_mib: int | None = None
    ignored: str = ""

    @property
    def wanted(self) -> bool:
        """It is to be protected."""
        return self.mode != "off"

    @property
    def prepared(self) -> bool:
        """Its domain is to be made so that it can be protected."""
        return self.wanted or self.possible

    def options(self) -> dict[str, float]:
        """As agents take them."""
        named = {
            "interval_ms": self.interval_ms,
            "max_pause_ms": self.max_pause_ms,
            "cache_limit_mib": self.cache_mib,
        }
        return {name: float(value) for name, value in named.items() if value is not None}


def wish(
    extra_specs: Mapping[str, str], metadata: Mapping[str, str], honour: str = "allowed"
) -> Wish:
    """What the server is to have; see the module's text. Never raises.

    :param extra_specs: of its flavor.
    :param metadata: of the server. Whoever asks about a standby server has made sure that it is
        one of ours: anybody can write this.
    :param honour: ``[nova] honour_property``.
    """
    if STANDBY in metadata:
        return Wish()
    ignored: list[str] = []
    flavor = _word(extra_specs.get(MODE, ""))
    if flavor and flavor not in FLAVOR_MODES:
        ignored.append(f"{MODE}={flavor} is none of {', '.join(FLAVOR_MODES)}")
        flavor = "off"
    asked = _word(metadata.get(PROPERTY, ""))
    if not flavor:
        flavor = "allowed" if honour == "always" else "off"
        why = f"the flavor has no {MODE}"
    else:
        why = f"the flavor says {MODE}={flavor}"
    mode: Mode = "off"
    possible = flavor == "allowed" and honour != "never"
    if flavor in ACTIVE_MODES:
        mode = cast(Mode, flavor)
        if asked not in ("", flavor):
            ignored.append(f"property {PROPERTY}={asked}: {why}")
    elif asked in ("", "off"):
        pass
    elif asked not in ACTIVE_MODES:
        ignored.append(f"property {PROPERTY}={asked} is none of {', '.join(ACTIVE_MODES)}, off")
    elif possible:
        mode = cast(Mode, asked)
    else:
        if flavor == "allowed":
            why = "[nova] honour_property is never"
        ignored.append(f"property {PROPERTY}={asked}: {why}")
    if mode == "off" and not possible:
        return Wish(ignored="; ".join(ignored))
    number = _reader(extra_specs, ignored)
    return Wish(
        mode,
        possible,
        number(INTERVAL_MS),
        number(MAX_PAUSE_MS),
        number(CACHE_MIB),
        "; ".join(ignored),
    )


def _word(value: object) -> str:
    return str(value).strip().lower()[:_MOST_CHARACTERS]


def _reader(extra_specs: Mapping[str, str], ignored: list[str]) -> Callable[[str], int | None]:
    """Reads extra specs that are numbers; tells of those that are none."""

    def number(name: str) -> int | None:
        text = _word(extra_specs.get(name, ""))
        low, high = BOUNDS[name]
        if not text:
            return None
        # (isdecimal alone takes digits of other scripts, which int() takes, too: harmless.)
        if not text.isdecimal() or not low <= int(text) <= high:
            ignored.append(f"{name}={text} is no whole number from {low} to {high}")
            return None
        return int(text)

    return number
