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

"""Compute hosts without libvirt: real agents, real worker processes, oslo.messaging's fake bus."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from oslo_config import cfg
from oslo_messaging._drivers import impl_fake

from nova_pmt import exception
from nova_pmt.agent import endpoint
from nova_pmt.agent.host import DomainInfo, GuestDescription
from nova_pmt.agent.notifications import Notifications
from nova_pmt.agent.pairs import Pairs
from nova_pmt.agent.parts import Parts, Timing
from nova_pmt.agent.records import Generations, RecordStore
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.agent.service import AgentService
from nova_pmt.agent.supervisor import Supervisor
from nova_pmt.arbiter.file import FileArbiter
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.messaging import oslo_messaging
from tests.unit.agent.fake_worker import write_whole

UUID = "5d6c0c3e-5a1b-4c7d-9a53-0123456789ab"
NAME = "web1"
DISK = DiskSpec("vda", "raw", "/vda.raw", 1 << 30).to_dict()
FAST = Timing(
    resync_s=0.05,
    resync_max_s=0.2,
    worker_start_s=10,
    retry_s=0.02,
    claim_delay_s=0.3,
    follow_s=0.5,
    command_s=10,
    stop_s=5,
)


def eventually(what: Callable[[], Any], timeout_s: float = 10) -> Any:
    """Wait for a truth; the deadline fails the test with what was seen last."""
    deadline = time.monotonic() + timeout_s
    while not (seen := what()):
        assert time.monotonic() < deadline, f"it did not come about; last seen: {seen!r}"
        time.sleep(0.01)
    return seen


def file_arbiter(directory: Path) -> FileArbiter:
    """The real one, in that directory."""
    return FileArbiter(SimpleNamespace(arbiter=SimpleNamespace(directory=str(directory))))


class FakeHost:
    """Domains as files that workers change, too."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir()
        self.refusals: list[exception.Refusal] = []
        self.standby_refusals: list[exception.Refusal] = []
        self.warnings: list[str] = []
        self.broken: Exception | None = None  # what libvirt answers
        self.stuck: Exception | None = None  # what it answers to the end of a standby
        self.loaded = True  # a standby whose worker died after it won had loaded its state
        self.disks: list[dict[str, Any]] = [dict(DISK)]
        self.checked_disks: list[list[dict[str, Any]]] = []  # as a standby
        self.calls: list[tuple[str, str]] = []

    def abilities(self) -> dict[str, Any]:
        return {"cpu_model": "EPYC", "machine_types": ["pc", "q35"], "plug": False}

    def define(self, uuid: str = UUID, name: str = NAME, state: str = "running") -> None:
        text = json.dumps({"name": name, "state": state})
        write_whole(self.directory / f"{uuid}.json", text)

    def state(self, uuid: str = UUID) -> str | None:
        try:
            return str(json.loads((self.directory / f"{uuid}.json").read_text())["state"])
        except FileNotFoundError:
            return None

    def domains(self) -> list[DomainInfo]:
        found = []
        for path in self.directory.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # a worker may just have removed it
                data = json.loads(path.read_text())
                running = data["state"] in ("running", "paused")
                found.append(DomainInfo(path.stem, data["name"], running))
        return found

    def find(self, domain: str) -> DomainInfo:
        for info in self.domains():
            if domain in (info.uuid, info.name):
                return info
        raise exception.UnknownDomain(f"no domain {domain}")

    def check(self, uuid: str) -> tuple[list[exception.Refusal], list[str]]:
        return list(self.refusals), list(self.warnings)

    def describe(self, uuid: str) -> GuestDescription:
        layout = [{"name": "pc.ram", "size": 1 << 27}]
        return GuestDescription("<domain/>", layout, 1 << 27, self.disks)

    def check_standby(
        self, uuid: str, memory_bytes: int, disks: list[dict[str, Any]]
    ) -> list[exception.Refusal]:
        self.checked_disks.append(disks)
        return list(self.standby_refusals)

    def is_running(self, uuid: str) -> bool:
        if self.broken is not None:
            raise self.broken
        return self.state(uuid) in ("running", "paused")

    def recover(self, uuid: str) -> None:
        self.calls.append(("recover", uuid))
        self.define(uuid, self.find(uuid).name, "running")

    def destroy(self, uuid: str) -> None:
        self.calls.append(("destroy", uuid))
        self.define(uuid, self.find(uuid).name, "shut")

    def tidy(self, uuid: str) -> None:
        self.calls.append(("tidy", uuid))

    def holds_state(self, uuid: str, generation: int) -> bool:
        if not self.loaded or self.state(uuid) != "loaded":
            return False
        found = json.loads((self.directory / f"{uuid}.json").read_text())
        return bool(found["generation"] == generation)

    def finish_takeover(self, uuid: str) -> bool:
        self.calls.append(("finish_takeover", uuid))
        if not self.loaded or self.state(uuid) is None:
            return False
        self.define(uuid, self.find(uuid).name, "running")
        return True

    def let_go(self, uuid: str) -> None:
        self.calls.append(("let_go", uuid))

    def forget_images(self, uuid: str) -> None:
        self.calls.append(("forget_images", uuid))

    def cleanup_standby(self, uuid: str, generation: int) -> None:
        self.calls.append(("cleanup_standby", uuid))
        if self.stuck is not None:
            raise self.stuck
        if self.state(uuid) in ("waiting", "loaded"):
            (self.directory / f"{uuid}.json").unlink()


class Recorder:
    """A notifier that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, ctxt: Any, event_type: str, payload: dict[str, Any]) -> None:
        self.events.append(("info", event_type, payload))

    def warn(self, ctxt: Any, event_type: str, payload: dict[str, Any]) -> None:
        self.events.append(("warn", event_type, payload))

    def error(self, ctxt: Any, event_type: str, payload: dict[str, Any]) -> None:
        self.events.append(("error", event_type, payload))

    def states(self) -> list[str]:
        return [kind.rsplit(".", 1)[1] for _, kind, _ in self.events]


class FakeCompute:
    """One compute host: what a restart of its agent keeps, and the agent itself."""

    def __init__(self, rig: Rig, name: str) -> None:
        self.rig = rig
        self.name = name
        self.path = rig.path / name
        self.path.mkdir()
        self.host = FakeHost(self.path / "domains")
        self.behaviour = self.path / "behaviour.json"
        self.recorder = Recorder()
        self.behave()
        self.arbiter = rig.arbiter
        self.resync = True
        self.timing = FAST
        self.service: AgentService | None = None

    def behave(self, claim_delay_s: float = 2.0, **modes: str) -> None:
        """How the workers that start from now on behave."""
        self.behaviour.write_text(
            json.dumps(
                {
                    "domains": str(self.host.directory),
                    "arbiter": str(self.rig.arbiter_path),
                    "claim_delay_s": claim_delay_s,
                    **modes,
                }
            )
        )

    def start(self) -> None:
        transport = self.rig.transport
        script = Path(__file__).with_name("fake_worker.py")
        argv = [sys.executable, str(script), "--behaviour", str(self.behaviour)]
        store = RecordStore(str(self.path))
        records = store.load()
        self.notifications = Notifications(self.recorder)
        self.parts = Parts(
            name=self.name,
            address="127.0.0.1",
            host=self.host,
            arbiter=self.arbiter,
            api=AgentAPI(transport, timeout_s=5, work_timeout_s=20),
            supervisor=Supervisor(argv, str(self.path)),
            pairs=Pairs(self.name, store, self.notifications),
            generations=Generations(str(self.path)),
            resync=self.resync,
            timing=self.timing,
            stopping=threading.Event(),
        )
        self.service = AgentService(self.parts, frozenset({"pmt"}))
        self.service.resume(records)
        self.server = endpoint.server(transport, self.name, endpoint.Endpoint(self.service))
        self.server.start()

    def stop(self) -> None:
        if self.service is not None:
            self.server.stop()
            self.service.stop()
            # Its pool takes a second to end; nothing here depends on that.
            threading.Thread(target=self.server.wait, daemon=True).start()
            self.notifications.close(2)
            self.service = None

    def crash(self) -> None:
        """The agent is gone at once and hears nothing any more, and so are its workers."""
        assert self.service is not None
        self.parts.stopping.set()
        self.server.stop()
        for entry in self.parts.pairs:
            if entry.worker is not None:
                entry.worker.kill()
                entry.worker.wait(5)
        self.service = None

    def state(self) -> str | None:
        entry = self.parts.pairs.get(UUID)
        return entry.state if entry else None

    def recent(self) -> str | None:
        found = self.parts.pairs.recent(UUID)
        return found[0]["state"] if found else None

    def kill_worker(self) -> None:
        entry = self.parts.pairs.get(UUID)
        assert entry is not None
        assert entry.worker is not None
        entry.worker.kill()

    def record(self) -> dict[str, Any] | None:
        try:
            text = (self.path / "pairs" / f"{UUID}.json").read_text()
        except FileNotFoundError:
            return None
        return dict(json.loads(text))

    def spec(self, role: str) -> dict[str, Any]:
        return json.loads((self.host.directory / f"{role}.spec").read_text())


class Rig:
    """A message bus, an arbiter, and compute hosts ``a`` (has the domain) and ``b``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arbiter_path = path / "arbiter"
        self.arbiter_path.mkdir()
        impl_fake.FakeExchangeManager.cleanup()
        cfg.CONF([], default_config_files=[], default_config_dirs=[])
        self.transport = oslo_messaging.get_rpc_transport(cfg.CONF, url="fake://")
        self.arbiter = file_arbiter(self.arbiter_path)
        self.api = AgentAPI(self.transport, timeout_s=5, work_timeout_s=20)
        self.a, self.b = FakeCompute(self, "a"), FakeCompute(self, "b")
        self.a.host.define()
        self.config = path / "nova-pmt.conf"
        self.config.write_text(
            "[DEFAULT]\ntransport_url = fake://\n[client]\nhosts = a, b\ntimeout_s = 5\n"
        )

    def start(self) -> None:
        self.a.start()
        self.b.start()

    def protect(self, **arguments: Any) -> dict[str, Any]:
        """Protect the domain on a with its standby on b, and wait until it is protected."""
        pair = self.api.protect("a", NAME, "b", **arguments)
        eventually(lambda: self.a.state() == "protected" and self.b.state() == "protected")
        return pair

    def generation(self) -> int:
        entry = self.a.parts.pairs.get(UUID)
        assert entry is not None
        return entry.pair.generation

    def close(self) -> None:
        self.a.stop()
        self.b.stop()
