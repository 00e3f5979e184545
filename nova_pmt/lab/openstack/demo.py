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
"""The demo with a real Nova: a server that asks for protection loses its host and goes on.

Nova, Placement, Neutron, Glance and Keystone are those of a release; a client talks to the server
over one TCP connection all the time. Writes ``summary.json``, ``timeline.json`` and
``timeline.png``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nova_pmt.exception import LabError, PmtError
from nova_pmt.lab import Lab, LabHost
from nova_pmt.lab.openstack import Cloud, leftovers
from nova_pmt.lab.openstack.cloud import IMAGE, NETWORK
from nova_pmt.lab.openstack.control import wait_for
from nova_pmt.lab.openstack.talker import Talker

FLAVOR = "ft-allowed"
NAME = "web"
STANDBY_MARK = "pmt:protects"
#: How long the server runs before its host dies, and after each step, in seconds.
CALM_S = 5.0
#: For each step; generous, since one machine is the whole data centre.
STEP_S = 900.0


@dataclass(frozen=True)
class Moment:
    """Something that happened; ``at`` in seconds since the demo's start."""

    at: float
    what: str


class OpenStackDemo:
    """One run.

    :param directory: where it writes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.console = Console(highlight=False, soft_wrap=True)
        self.moments: list[Moment] = []
        self._began = time.monotonic()

    # -- what a person sees --------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A step of the story."""
        self._mark(text)
        self.console.print(f"[bold cyan]{self.moments[-1].at:6.1f} s[/]  {text}")

    def _mark(self, text: str) -> None:
        self.moments.append(Moment(round(time.monotonic() - self._began, 2), text))

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """A line that moves while something is waited for, on a terminal."""
        with self.console.status(f"waiting until {what} ..."):
            yield

    # -- the story -----------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """The whole demo; the summary. It is written also when a step failed."""
        summary: dict[str, Any] = {
            "status": "failed",
            "same_uuid": False,
            "same_address": False,
            "connection_survived": False,
            "gap_ms": None,
            "nova_consistent_s": None,
            "reprotected": False,
            "leftovers": None,
        }
        talked: list[tuple[float, float]] = []
        try:
            self.say("Two compute hosts and a controller in namespaces, with RabbitMQ")
            with Lab(computes=2) as lab:
                try:
                    with Cloud(lab, say=self.say) as cloud:
                        summary["cloud_ready_s"] = round(time.monotonic() - self._began, 1)
                        self._story(cloud, summary, talked)
                finally:
                    self._keep_logs(lab)
            self.say("All hosts are down; nothing is left behind")
            good = ("same_uuid", "same_address", "connection_survived", "reprotected")
            if all(summary[name] for name in good) and summary["leftovers"] == []:
                summary["status"] = "ok"
        except PmtError as e:
            summary["reason"] = f"{e.code}: {e.message}"
            self.say(f"[bold red]failed:[/] {escape(e.message)}")
        except Exception as e:  # noqa: BLE001 - the summary says so, whatever it is
            summary["reason"] = f"{type(e).__name__}: {e}"
            self.say(f"[bold red]failed:[/] {escape(summary['reason'])}")
            self.console.print_exception()
        finally:
            summary["machine"] = {
                "cpus": os.cpu_count(),
                "load": [round(value, 1) for value in os.getloadavg()],
                "kernel": platform.release(),
                "python": platform.python_version(),
            }
            summary["seconds"] = round(time.monotonic() - self._began, 1)
            self._write(summary, talked)
        return summary

    def _story(
        self, cloud: Cloud, summary: dict[str, Any], talked: list[tuple[float, float]]
    ) -> None:
        uuid = self._create(cloud)
        with self._waiting("the server is ACTIVE"):
            server = cloud.wait_server(uuid, timeout=STEP_S)
        address, first = cloud.address(server), cloud.lab.host(server.compute_host)
        self.say(f"{NAME} is ACTIVE on {first.name}, with {address}")
        guest = cloud.guest(server)
        guest.wait_ready(STEP_S)
        boot = guest.boot_id()
        with Talker(guest) as talker:
            self.say("Its guest is up; a client talks to it over one TCP connection from now on")
            with self._waiting("it is protected"):
                pair = cloud.pmt.wait_protected(uuid, timeout=STEP_S)
            standby = self._standby_of(cloud, uuid)
            self.say(
                f"Nobody ordered it, the property did: it is protected. Its standby waits on"
                f" {pair.standby_host} (in Nova: {standby.name}, {standby.status})"
            )
            time.sleep(CALM_S)
            # Anew: a busy machine may have made it fail over already.
            pair = cloud.pmt.wait_protected(uuid, timeout=STEP_S)
            first, second = cloud.lab.host(pair.primary_host), cloud.lab.host(pair.standby_host)
            killed = time.monotonic()
            first.power_off(silent=True)
            self.say(f"{first.name} loses its power and its network")
            answer = talker.wait_answer(killed, STEP_S)
            self.say(f"The client has an answer again, over the same connection ({answer.seq})")
            with self._waiting("Nova, Placement and Neutron say so, too"):
                self._wait_consistent(cloud, uuid, second)
            summary["nova_consistent_s"] = round(time.monotonic() - killed, 1)
            moved = cloud.ask_server(uuid, STEP_S)
            survivor = guest.on(second).wait_ready(STEP_S)
            summary["same_uuid"] = str(moved.id) == uuid and survivor.boot_id() == boot
            summary["same_address"] = cloud.address(moved) == address
            self.say(f"Nova: {NAME} is {moved.status} on {moved.compute_host}, as is its port")
            time.sleep(CALM_S)
            with self._waiting(f"{first.name} is back"):
                cloud.power_on(first)
                cloud.wait_computes([first], STEP_S)
            self.say(f"{first.name} has power again, and Nova uses it")
            with self._waiting("there is a new standby"):
                cloud.pmt.wait_protected(uuid, first.name, STEP_S)
            again = self._standby_of(cloud, uuid)
            summary["reprotected"] = True
            self.say(f"A new standby waits on {first.name} (in Nova: {again.name})")
            time.sleep(CALM_S)
            held = talker.finish()
            summary["connection_survived"] = True
            summary["requests"] = {"answered": len(talker.answered), "held_by_the_server": held}
            began, seconds = talker.gap(killed)
            summary["gap_ms"] = round(seconds * 1e3)
            talked += [
                (one.sent_at - self._began, one.answered_at - one.sent_at)
                for one in talker.answered
                if one.answered_at is not None
            ]
        self.say(
            f"{len(talker.answered)} requests, none lost; the longest wait was"
            f" {summary['gap_ms']} ms, {began - killed:.1f} s after the power cut"
        )
        self._delete(cloud, uuid)
        with self._waiting("nothing is left of it"):
            left = leftovers.wait_none(
                cloud, [uuid, str(standby.id), str(again.id)], timeout=STEP_S / 3
            )
        summary["leftovers"] = left
        self.say(f"Left of it: {', '.join(left) or 'nothing'}")
        self._show(summary)

    def _create(self, cloud: Cloud) -> str:
        words = ["server", "create", "--flavor", FLAVOR, "--image", IMAGE, "--network", NETWORK]
        words += ["--property", "ft=pmt", NAME]
        self.console.print(f"          [green]$ openstack {' '.join(words)}[/]")
        self._mark("openstack server create")
        answer = cloud.openstack(*words, "-f", "json", account="demo")
        return str(json.loads(answer)["id"])

    def _delete(self, cloud: Cloud, uuid: str) -> None:
        self.console.print(f"          [green]$ openstack server delete {NAME}[/]")
        self._mark("openstack server delete")
        cloud.openstack("server", "delete", NAME, account="demo")
        cloud.wait_gone(uuid, STEP_S)
        self.say(f"{NAME} is deleted")

    @staticmethod
    def _standby_of(cloud: Cloud, uuid: str) -> Any:
        for server in cloud.admin.compute.servers(all_projects=True):
            if server.metadata.get(STANDBY_MARK) == uuid:
                return server
        raise LabError(f"Nova knows no standby of {uuid}")

    @staticmethod
    def _wait_consistent(cloud: Cloud, uuid: str, host: LabHost) -> None:
        def follows() -> bool:
            server = cloud.ask_server(uuid, STEP_S)
            seen = (server.status, server.task_state, server.compute_host)
            return seen == ("ACTIVE", None, host.name)

        def agree() -> bool:
            return not leftovers.attempt(lambda: disagreements(cloud, uuid, host.name))

        # (Not wait_server: the record may be in ERROR until the managers have tried again.)
        wait_for(follows, "Nova's record", timeout=STEP_S)
        wait_for(agree, "Nova's view", timeout=STEP_S)

    def _show(self, summary: dict[str, Any]) -> None:
        table = Table(title="A host died", show_header=False)
        for name in ("gap_ms", "nova_consistent_s", "same_uuid", "same_address"):
            table.add_row(name, str(summary[name]))
        for name in ("connection_survived", "reprotected", "leftovers"):
            table.add_row(name, str(summary[name]))
        self.console.print(table)

    # -- what is kept --------------------------------------------------------------------------

    def _keep_logs(self, lab: Lab) -> None:
        """The lab's own go with it."""
        target = self.directory / "logs"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(lab.directory / "logs", target)

    def _write(self, summary: dict[str, Any], talked: list[tuple[float, float]]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        timeline = {
            "moments": [asdict(moment) for moment in self.moments],
            "requests": [[round(at, 3), round(took, 4)] for at, took in talked],
        }
        (self.directory / "timeline.json").write_text(json.dumps(timeline) + "\n")
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if talked:
            draw(self.moments, talked, self.directory / "timeline.png")


def disagreements(cloud: Cloud, uuid: str, host: str) -> list[str]:
    """What does not say that a server runs on ``host``; empty when all of the cloud does."""
    found = []
    for port in cloud.admin.network.ports(device_id=uuid):
        if port.binding_host_id != host or port.status != "ACTIVE":
            found.append(f"port {port.id} is {port.status} on {port.binding_host_id}")
    placement = cloud.admin.placement
    names = {provider.id: provider.name for provider in placement.resource_providers()}
    allocations = placement.get(f"/allocations/{uuid}").json()["allocations"]
    held = {names.get(provider, provider) for provider in allocations}
    # Nova keeps the lost host's until its compute service is back.
    if host not in held:
        found.append(f"allocations are on {', '.join(sorted(held)) or 'no host'}")
    return found


def draw(moments: list[Moment], talked: list[tuple[float, float]], path: Path) -> None:
    """How long the client waited for each answer, over time, and what happened meanwhile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start, end = talked[0][0], talked[-1][0] + talked[-1][1]
    figure, axes = pyplot.subplots(figsize=(12, 6))
    axes.plot([at for at, _ in talked], [took * 1e3 for _, took in talked], ".", markersize=3)
    axes.set_yscale("log")
    axes.set_xlim(start - 1, end + 1)
    axes.set_xlabel("seconds since the demo began")
    axes.set_ylabel("wait for an answer, ms")
    for number, moment in enumerate(m for m in moments if start <= m.at <= end):
        axes.axvline(moment.at, color="0.6", linewidth=0.8)
        axes.text(
            moment.at,
            1.02,
            f" {number + 1}",
            transform=axes.get_xaxis_transform(),
            fontsize=8,
        )
    shown = [m for m in moments if start <= m.at <= end]
    legend = "\n".join(f"{n}  {m.at:.1f} s  {m.what[:100]}" for n, m in enumerate(shown, 1))
    figure.text(0.02, 0.01, legend, fontsize=7, family="monospace", va="bottom")
    figure.subplots_adjust(bottom=0.1 + 0.022 * len(shown), top=0.93, left=0.07, right=0.98)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(directory: Path | None = None) -> int:
    """Run the demo and write what it found. 0: all went as it is to go."""
    demo = OpenStackDemo(directory or Path("build/openstack-demo"))
    summary = demo.run()
    demo.console.print(f"{summary['status']}; written to {demo.directory}/")
    return 0 if summary["status"] == "ok" else 1
