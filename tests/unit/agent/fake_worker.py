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

"""A worker without a guest: a real process that keeps the real one's protocol and order.

Primary and standby talk over a real TCP connection, ask the real file arbiter, and change the
state of their domains in the rig's directories, so that deaths and races are real, too.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from nova_pmt.agent import control
from nova_pmt.arbiter.file import FileArbiter

STATS = {
    "primary": {
        "epoch": 12, "committed": 11, "in_flight": 1, "strategy": "pmt", "interval_ms": 50,
        "throttled": False, "rounds": 12, "deferred": 0,
        "pause_ms": {"p50": 1.5, "p99": 2.5, "max": 3.0, "mean": 1.6, "last": 1.4},
        "pages": {"p50": 1000, "last": 900, "in_pause_p50": 20},
        "bytes_per_s": 80e6, "sent_bytes": 9e6, "commit_ms": {"p50": 4.0, "p99": 9.0},
        "cache": {"used_mib": 4.0, "backed_mib": 8.0, "peak_mib": 8.0, "limit_mib": 512},
        "codec": {"name": "zstd", "level": -1, "left": 0.412}, "delta_cache_mib": 1.5,
        "last_commit_age_ms": 31.0, "guest_running": True, "output_commit": True,
        "output_delay_ms": {"p50": 7.25, "p99": 19.0, "max": 21.0, "mean": 8.0},
        "log_bytes_total": 5 << 20,
        "network": [
            {"nic": "net0", "mac": "52:54:00:00:00:0a", "buffer": "redirector",
             "held_bytes": 1 << 19, "peak_bytes": 3 << 20, "limit_bytes": 64 << 20,
             "dropped_packets": 0, "released_bytes": 7 << 20},
        ],
        "disks": [
            {"disk": "vda", "log_bytes": 1 << 18, "log_peak_bytes": 2 << 20,
             "written_bytes": 5 << 20},
        ],
    },
    "standby": {
        "committed": 11, "received_bytes": 9 << 20, "apply_ms": {"p50": 1.0, "p99": 2.0},
        "staging_mib": 3.0, "disks": 1, "disk_bytes_applied": 5 << 20,
    },
}  # fmt: skip


def write_whole(path: Path, text: str) -> None:
    """Write a file that others read, and write, at any time."""
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    draft.write_text(text)
    draft.replace(path)


class FakeWorker:
    def __init__(self, agent: socket.socket, behaviour: Path) -> None:
        self.agent = agent
        self.lines = control.Lines()
        first = control.receive_one(agent, self.lines)
        assert first is not None
        self.spec = control.parse_spec(first)
        told = json.loads(behaviour.read_text())
        self.mode = told.get(self.spec.role, "normal")
        self.claim_delay_s = told["claim_delay_s"]
        self.domain = Path(told["domains"]) / f"{self.spec.pair.uuid}.json"
        self.arbiter = FileArbiter(
            SimpleNamespace(arbiter=SimpleNamespace(directory=told["arbiter"]))
        )
        (Path(told["domains"]) / f"{self.spec.role}.spec").write_text(json.dumps(first["spec"]))

    def say(self, event: str, **content: object) -> None:
        self.agent.sendall(control.to_line({"event": event, **content}))

    def end(self, state: str, reason: str = "", **details: object) -> None:
        self.say("state", state=state, reason=reason, details=details)
        sys.exit(0)

    def set_domain(self, **changes: object) -> None:
        known = json.loads(self.domain.read_text()) if self.domain.exists() else {}
        write_whole(self.domain, json.dumps({**known, **changes}))

    def claim(self) -> bool:
        pair = self.spec.pair
        return self.arbiter.claim(pair.uuid, pair.generation, self.spec.role)

    def run(self) -> None:
        if self.mode == "die_at_once":
            os._exit(3)
        if self.mode == "refuse":
            self.say(
                "error",
                error={"code": "CERTIFICATE_REFUSED", "message": "wrong CA", "cure": "sign it",
                       "details": {}},
            )  # fmt: skip
            self.end("error", "wrong CA")
        if self.mode == "mute":
            while self.agent.recv(4096):
                pass
            self.end("unprotected")
        if self.spec.role == "primary":
            self.primary()
        self.standby()

    def rounds(self, peer: socket.socket) -> tuple[str, str]:
        """Serve until something happens: ('agent', command) or ('peer', message)."""
        self.say("state", state="syncing", reason="", details={})
        self.say("progress", done_pages=50, total_pages=200, sent_bytes=50 * 4096)
        if self.mode == "stay_syncing":
            timeout = None
        else:
            self.say("state", state="protected", reason="", details={})
            timeout = 0.1
        while True:
            readable, _, _ = select.select([self.agent, peer], [], [], timeout)
            if self.agent in readable:
                message = control.receive_one(self.agent, self.lines)
                return "agent", "gone" if message is None else str(message["command"])
            if peer in readable:
                try:
                    return "peer", peer.recv(16).decode()
                except OSError:
                    return "peer", ""
            self.say("stats", **STATS[self.spec.role])

    def primary(self) -> None:
        peer = socket.create_connection((self.spec.address, self.spec.port))
        who, what = self.rounds(peer)
        if who == "agent" and what == "switchover":
            peer.sendall(b"switchover")
            assert peer.recv(16) == b"active"
            self.set_domain(state="shut")
            self.end("standby_active", "planned", switchover_ms=12)
        if who == "agent":
            peer.sendall(b"unprotect")
            self.end("unprotected", "on request")
        if self.claim():
            self.end("primary_alone", "the standby was lost")
        self.set_domain(state="shut")
        self.end("standby_active", "the standby won")

    def standby(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            name, pair = self.spec.pair.name, self.spec.pair
            self.set_domain(name=name, state="waiting", generation=pair.generation)
            self.say("ready", port=listener.getsockname()[1])
            readable, _, _ = select.select([listener, self.agent], [], [], 10)
            if listener not in readable:
                self.cancel("nobody came")
            peer, _ = listener.accept()
        who, what = self.rounds(peer)
        if who == "agent" and what == "gone":
            peer.close()
            self.cancel("the agent is gone")
        if what == "unprotect":
            self.domain.unlink()
            self.end("unprotected", "on request")
        if what == "" and self.mode != "hold":
            self.set_domain(state="loaded")
            if self.mode == "die_after_load":
                os._exit(9)
        if what == "":
            if self.mode == "hold":
                control.receive_one(self.agent, self.lines)
                self.cancel("the agent is gone")
            if select.select([self.agent], [], [], self.claim_delay_s)[0]:
                self.cancel("the agent is gone")
        if not self.claim():
            self.cancel("the primary won")
        self.say("state", state="failing_over", reason="the primary was lost", details={})
        if self.mode == "die_after_claim":
            os._exit(9)
        self.set_domain(state="running")
        if what == "switchover":
            peer.sendall(b"active")
        peer.close()
        self.end("standby_active", "failed over", failover_ms=42)

    def cancel(self, reason: str) -> None:
        self.domain.unlink()
        self.end("cancelled", reason)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--behaviour", type=Path)
    parser.add_argument("--control-fd", type=int)
    args = parser.parse_args()
    FakeWorker(socket.socket(fileno=args.control_fd), args.behaviour).run()


if __name__ == "__main__":
    main()
