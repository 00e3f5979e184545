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

"""Named steps at which a test can make a process die, stop or fail.

``reach`` does nothing unless the environment variable ``NOVA_PMT_FAULT`` was set when
the process started, to ``STEP:ACTION[:NTH]``; for instance ``round.copied:kill:20`` kills
the process (SIGKILL) when it comes to that step for the 20th time. Actions: ``kill``, ``stop``
(SIGSTOP) and ``fail`` (raises :class:`nova_pmt.exception.PmtError`).
"""

from __future__ import annotations

import os
import signal

from nova_pmt import exception

#: Every step there is, in the order in which a pair comes to them.
STEPS = (
    "sync.prelude",
    "sync.attached",
    "sync.disk",
    "sync.streaming",
    "sync.armed",
    "round.pass",
    "round.paused",
    "round.scanned",
    "round.copied",
    "round.saved",
    "round.resumed",
    "round.sending",
    "round.sent",
    "round.releasing",
    "round.committed",
    "standby.staging",
    "standby.rebuilt",
    "standby.verified",
    "standby.acknowledged",
    "standby.applied",
    "standby.disks",
    "failover.detected",
    "failover.disks",
    "failover.loaded",
    "failover.claimed",
    "failover.resumed",
    "switchover.paused",
    "switchover.committed",
    "switchover.ordered",
    "nova.create",
    "nova.protect",
    "nova.rebind",
    "nova.force_down",
    "nova.free",
    "nova.evacuate",
    "nova.await",
    "nova.delete",
    "nova.settle",
)
#: Those of them at which workers, and not managers, can be made to die.
WORKER_STEPS = tuple(step for step in STEPS if not step.startswith("nova."))


def _parse(text: str) -> tuple[str, str, int]:
    parts = text.split(":")
    if (
        len(parts) not in (2, 3)
        or parts[0] not in STEPS
        or parts[1] not in ("kill", "stop", "fail")
    ):
        raise exception.ConfigError(
            f"NOVA_PMT_FAULT={text!r} is not STEP:ACTION[:NTH]",
            cure=f"Steps are {', '.join(STEPS)}; actions are kill, stop, fail.",
        )
    return parts[0], parts[1], int(parts[2]) if len(parts) > 2 else 1


class _Fault:
    def __init__(self, text: str) -> None:
        self.step, self.action, self.left = _parse(text)

    def reach(self, step: str) -> None:
        if step != self.step:
            return
        self.left -= 1
        if self.left:
            return
        if self.action == "fail":
            raise exception.PmtError(f"fault injected at {step}", code="FAULT_INJECTED")
        os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)


def _nothing(step: str) -> None:
    """No fault was asked for."""


_text = os.environ.get("NOVA_PMT_FAULT")
reach = _Fault(_text).reach if _text else _nothing
