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

"""Inside the agents and workers of a fault campaign: writes down what decides over output.

``NOVA_PMT_TRACE`` (:mod:`nova_pmt.worker.trace`) has the releases of a primary worker; what is
added here says of which generation they are, and when a standby had a checkpoint whole, when one
side won, and when it let its guest go on. All hosts of a lab share CLOCK_MONOTONIC, so that the
lines of all of them make one timeline (:mod:`nova_pmt.evaluation.timeline`).

Each line is written *before* what it tells of can have an effect: an acknowledgement before it is
sent, a guest's run before it runs. A process that is killed in between has said too much, never too
little.

Also gives the next worker of one side the named step at which it dies, without a restart of its
agent (:func:`arm`).

What does not live here: anything that changes what the product does.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nova_pmt.worker.trace import VARIABLE, Trace

#: Directory for PYTHONPATH.
PRELOAD = Path(__file__).with_name("preload")
#: Name of a file that says which worker dies where.
ARMED = "NOVA_PMT_ARMED"
_FAULT = "NOVA_PMT_FAULT"


def environment(trace: str, armed: str) -> dict[str, str]:
    """What agents need in their environment; both paths as they see them."""
    return {"PYTHONPATH": str(PRELOAD), VARIABLE: trace, ARMED: armed}


def arm(path: Path, side: Literal["primary", "standby"], fault: str) -> None:
    """Have the next worker of that side, on whichever host, take this ``NOVA_PMT_FAULT``."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"side": side, "fault": fault}), encoding="ascii")
    part.replace(path)


def disarm(path: Path) -> bool:
    """Nobody takes it any more; whether nobody had."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


class Notes:
    """Lines of one process, in the file of the product's own trace.

    :param members: of each line.
    """

    def __init__(self, path: str, members: Mapping[str, Any]) -> None:
        self._trace = Trace(path)
        self._members = {"pid": os.getpid(), **members}

    def line(self, event: str, at: float | None = None, **members: Any) -> None:
        """Write one.

        :param at: when; now, if it is not said.
        """
        moment = {} if at is None else {"at": at}
        self._trace.line(event=event, **self._members, **members, **moment)

    def mark(self) -> None:
        """Have the lines of the product's own trace tell whose they are."""
        original = Trace.line
        members = self._members

        def line(trace: Trace, **own: Any) -> None:
            original(trace, **{**members, **own})

        setattr(Trace, "line", line)  # noqa: B010 - to mypy a method is no variable


def _before(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Have ``note`` called before each call of a method, with its arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        note(self, *arguments, **named)
        return original(self, *arguments, **named)

    setattr(owner, name, method)


def _after(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Have ``note`` called with the result of each call, the time before it, and its arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        begun = time.monotonic()
        result = original(self, *arguments, **named)
        note(result, begun, *arguments, **named)
        return result

    setattr(owner, name, method)


def watch_worker() -> None:
    """To be called before a worker begins: it is watched from the moment it knows its pair."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from nova_pmt.agent import control

    original = control.parse_spec

    def parse_spec(message: dict[str, Any]) -> Any:
        spec = original(message)
        _watch(spec, path)
        return spec

    control.parse_spec = parse_spec


def _watch(spec: Any, path: str) -> None:
    pair = spec.pair
    host = pair.primary_host if spec.role == "primary" else pair.standby_host
    notes = Notes(path, {"host": host, "uuid": pair.uuid, "generation": pair.generation})
    _take_fault(spec.role, notes)
    from nova_pmt.arbiter.manager import ManagerArbiter

    _after(
        ManagerArbiter,
        "claim",
        lambda won, _begun, *_, **__: notes.line("claim", side=spec.role, won=bool(won)),
    )
    if spec.role == "primary":
        from nova_pmt.worker.outputs import Outputs

        notes.mark()
        _before(Outputs, "arm", lambda *_, **__: notes.line("armed"))
        _before(Outputs, "open", lambda *_, **__: notes.line("alone"))
    else:
        from nova_pmt.worker.standby import Standby

        _before(
            Standby, "_acknowledge", lambda _, epoch, *__, **___: notes.line("commit", epoch=epoch)
        )
        _before(
            Standby,
            "_resume",
            lambda standby, *_, **__: notes.line("run", epoch=standby._receiver.committed),
        )


def _take_fault(role: str, notes: Notes) -> None:
    """Be the worker that dies, if one of this side is to."""
    path = os.environ.get(ARMED, "")
    mine = f"{path}.{os.getpid()}"
    try:
        with open(path, encoding="ascii") as file:
            armed = json.load(file)
        if armed["side"] != role:
            return
        os.rename(path, mine)  # one takes it
        os.unlink(mine)
    except (OSError, ValueError):
        return
    os.environ[_FAULT] = armed["fault"]
    from nova_pmt import faultpoint

    importlib.reload(faultpoint)
    wanted = armed["fault"].partition(":")[0]
    left = int(armed["fault"].split(":")[2])
    inner = faultpoint.reach

    def reach(step: str) -> None:
        nonlocal left
        if step == wanted:
            left -= 1
            if not left:
                notes.line("fault", step=step)
        inner(step)

    faultpoint.reach = reach
    notes.line("taken", step=wanted)


def watch_agent() -> None:
    """To be called before an agent begins: what it does in place of a worker that died."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from nova_pmt.agent.libvirt_host import LibvirtHost

    notes = Notes(path, {"host": os.uname().nodename})
    _before(LibvirtHost, "recover", lambda _, uuid, **__: notes.line("alone", uuid=uuid))

    def took_over(done: bool, begun: float, uuid: str, **_: Any) -> None:
        if done:
            notes.line("run", at=begun, uuid=uuid)

    _after(LibvirtHost, "finish_takeover", took_over)
