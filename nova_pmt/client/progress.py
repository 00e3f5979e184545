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

"""Waits for the first synchronisation, and shows how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from nova_pmt import exception
from nova_pmt.client import render

_POLL_S = 0.3
_QUIET = frozenset({"starting", "syncing", "reprotecting", "interrupted", "failing_over"})


def wait(
    look: Callable[[], Mapping[str, Any]],
    console: Console,
    timeout_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Poll until the pair is protected.

    :param look: the answer of ``status`` for the domain.
    :returns: the pair's view.
    :raises nova_pmt.exception.PmtError: protection did not come about, or not in time.
    """
    deadline = time.monotonic() + timeout_s
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        shown = ""
        while True:
            pair = _pair(look())
            text = f"{pair['state']} {render.progress_text(pair.get('progress'))}".strip()
            steps = pair.get("progress") or {}
            bar.update(
                task,
                description=render.clean(text).split(" (")[0],
                total=steps.get("total_bytes") or steps.get("total_pages"),
                completed=steps.get("done_bytes") or steps.get("done_pages", 0),
            )
            if not console.is_terminal and text != shown:
                shown = text
                console.print(render.clean(text), markup=False, highlight=False)
            if pair["state"] == "protected":
                return pair
            if time.monotonic() >= deadline:
                raise exception.PmtError(
                    f"not protected within {timeout_s:g} s; it goes on",
                    code="TIMEOUT",
                    cure="Watch it with 'nova-pmt top'.",
                )
            sleep(_POLL_S)


def _pair(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The pair while it is on its way; raises what ended it."""
    pairs = answer["pairs"]
    found = pairs[0] if pairs else (answer["recent"] or [{}])[0]
    if pairs and (found["state"] in _QUIET or found["state"] == "protected"):
        return dict(found)
    if found.get("last_error"):
        raise exception.from_dict(found["last_error"])
    raise exception.PmtError(
        f"protection ended as {found.get('state')}: {found.get('reason')}",
        code="PROTECTION_ENDED",
        cure="See 'nova-pmt status'; unless it was unprotected it is tried again by itself.",
    )
