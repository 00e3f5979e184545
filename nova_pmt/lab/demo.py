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

"""The demo: two hosts on this machine, a guest under load, a failover, and the way back.

Everything is real: QEMU guests, libvirtd in each host, RabbitMQ, nova-pmt-agent, TLS between the
hosts. Writes ``build/demo/summary.json``.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nova_pmt.exception import LabError
from nova_pmt.lab import GuestSpec, Lab, LabGuest, LabHost, Workload, deployment, process
from nova_pmt.lab.witness import Witness

#: Pages that the guest rewrites, and how often: 1,000 to 2,000 different ones in an epoch of 50 ms.
DIRTY_PAGES, DIRTY_MS = 600, 20
FLOOR_ROUNDS = 100
INTERVAL_MS = 50
AFTER_S = 2.0


class Demo:
    """One run of the demo.

    :param watch_s: how long to show rounds before the primary is killed, in seconds.
    :param directory: where ``summary.json`` goes.
    """

    def __init__(self, watch_s: float, directory: Path) -> None:
        self.watch_s = watch_s
        self.directory = directory
        self.console = Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """A step of the story."""
        elapsed = time.monotonic() - self._began
        self.console.print(f"[bold cyan]{elapsed:6.1f} s[/]  {text}")

    def run(self) -> dict[str, Any]:
        """The whole demo; returns the summary."""
        self.say(
            "Two compute hosts in namespaces of their own, each with its libvirtd, and RabbitMQ"
        )
        with Lab(computes=2) as lab:
            one, two = lab.computes
            deployment.configure(lab)
            for host in lab.computes:
                deployment.start_agent(host)
            guest = one.boot(
                GuestSpec("demo", workload=Workload(dirty_pages=DIRTY_PAGES, dirty_ms=DIRTY_MS))
            )
            deployment.wait_agents(lab)
            guest.wait_ready()
            self.say(f"Guest 'demo' runs on {one.name}: 128 MiB, it counts, and it dirties memory")
            floor = self._floor(one, guest)
            self.say(
                f"Floor of a pause (stop, save devices, go on; nothing copied): "
                f"p50 {np.percentile(floor, 50):.1f} ms"
            )
            summary: dict[str, Any] = {"pause_floor_ms": _percentiles(floor)}
            self._protect(lab, "demo", two)
            summary |= self._watch_and_kill(lab, guest, one, two)
            summary |= self._way_back(lab, guest.on(two), one, two)
        self.say("All hosts are down; nothing is left behind")
        summary["machine"] = {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        }
        summary["seconds"] = round(time.monotonic() - self._began, 1)
        return summary

    def _floor(self, host: LabHost, guest: LabGuest) -> list[float]:
        """Measured on the same guest under the same load, just before it is protected."""
        command = [sys.executable, "-m", "nova_pmt.lab.floor", guest.uuid]
        result = host.run([*command, str(FLOOR_ROUNDS), str(INTERVAL_MS)], timeout=120)
        return list(json.loads(result.stdout)["floor_ms"])

    def _operate(self, lab: Lab, *arguments: str) -> None:
        """Run a command of the operator's, on the terminal."""
        self.console.print(f"          [green]$ nova-pmt {' '.join(arguments)}[/]")
        command = process.enter(lab.ctl.init_pid, ["nova-pmt", *arguments])
        done = subprocess.run(command, env=process.environment(), check=False)
        if done.returncode:
            raise LabError(f"nova-pmt {arguments[0]} ended with status {done.returncode}")

    def _protect(self, lab: Lab, name: str, standby: LabHost) -> None:
        self.say(f"Protect it: first synchronisation to {standby.name}, then rounds")
        self._operate(
            lab, "protect", name, "--standby", standby.name, "--interval-ms", str(INTERVAL_MS)
        )

    def _status(self, lab: Lab) -> dict[str, Any]:
        text = deployment.operate(lab, "status", "-f", "json").stdout
        found = json.loads(text)
        if not isinstance(found, dict):
            raise LabError("nova-pmt status -f json printed no object")
        return found

    def _watch_and_kill(
        self, lab: Lab, guest: LabGuest, one: LabHost, two: LabHost
    ) -> dict[str, Any]:
        with Witness(two, guest.uuid) as witness:
            self.say(f"Rounds, live, for {self.watch_s:.0f} s")
            self._operate(lab, "top", "-n", str(max(1, round(self.watch_s / 0.5))))
            stats = next(
                pair["stats"] for pair in self._status(lab)["pairs"] if pair["role"] == "primary"
            )
            self.say(f"SIGKILL to QEMU on {one.name}")
            killed = time.monotonic()
            os.kill(guest.pid, signal.SIGKILL)
            event = deployment.takeover(lab, two, since=killed)
            survivor = guest.on(two)
            boot, verified = survivor.boot_id(), survivor.verify()
            time.sleep(AFTER_S)
            running, detected = event["running_at"], event["detected_at"]
            lost = witness.lost_ticks()
            last, first = witness.last_before(running), witness.first_after(running)
        table = Table(title=f"Failover to {two.name}", show_header=False)
        failover_ms = (running - killed) * 1e3
        table.add_row("from the kill to running", f"{failover_ms:.1f} ms")
        table.add_row("of it until detected", f"{(detected - killed) * 1e3:.1f} ms")
        table.add_row("checkpoint it went on from", str(event["epoch"]))
        table.add_row("counter in that checkpoint", str(last.counter if last else "?"))
        table.add_row("first count after it", str(first.counter if first else "?"))
        table.add_row("ticks of committed checkpoints lost", str(lost))
        table.add_row("guest's own check of its memory", verified)
        table.add_row("boot id (it did not reboot)", boot)
        self.console.print(table)
        return {
            "pause_ms": {key: stats["pause_ms"][key] for key in ("p50", "p99", "max")},
            "pause_steps_ms": stats["pause_steps_ms"],
            "dirty_pages": {"p50": stats["pages"]["p50"]},
            "pages_copied_in_pause": {"p50": stats["pages"]["in_pause_p50"]},
            "checkpoints": event["epoch"],
            "failover_ms": round(failover_ms, 1),
            "detection_ms": round((detected - killed) * 1e3, 1),
            "lost_ticks": lost,
            "counter": {
                "committed": last.counter if last else None,
                "first_after": first.counter if first else None,
            },
            "memory_check": verified,
            "cache_mib": {
                "peak": stats["cache"]["peak_mib"],
                "end": stats["cache"]["backed_mib"],
            },
        }

    def _way_back(self, lab: Lab, guest: LabGuest, one: LabHost, two: LabHost) -> dict[str, Any]:
        self._protect(lab, "demo", one)
        with Witness(one, guest.uuid) as witness:
            time.sleep(1.0)
            self.say(f"Planned switchover back to {one.name}: a final round, nothing lost")
            ordered = time.monotonic()
            self._operate(lab, "failover", "demo", "--yes")
            event = deployment.takeover(lab, one, since=ordered)
            final = deployment.takeover(lab, two, since=ordered).get("final_round_ms")
            home = guest.on(one)
            verified = home.verify()
            time.sleep(AFTER_S)
            lost = witness.lost_ticks()
        self.say(
            f"The guest runs on {one.name} again ({event['failover_ms']:.0f} ms of standstill "
            f"after the final round), {lost} ticks lost, its memory: {verified}"
        )
        return {
            "switchover": {
                "final_round_ms": final,
                "activation_ms": event["failover_ms"],
                "lost_ticks": lost,
                "memory_check": verified,
            }
        }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {
        "p50": round(float(np.percentile(values, 50)), 3),
        "p99": round(float(np.percentile(values, 99)), 3),
    }


def main(watch_s: float = 30.0, directory: Path | None = None) -> int:
    """Run the demo and write its summary."""
    target = directory or Path("build/demo")
    demo = Demo(watch_s, target)
    summary = demo.run()
    target.mkdir(parents=True, exist_ok=True)
    path = target / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    ratio = summary["pause_ms"]["p50"] / summary["pause_floor_ms"]["p50"]
    demo.say(
        f"Pause p50 {summary['pause_ms']['p50']:.1f} ms, {ratio:.2f} x the floor; summary in {path}"
    )
    return 0 if summary["lost_ticks"] == 0 else 1
