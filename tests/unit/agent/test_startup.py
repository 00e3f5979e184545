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

"""An agent starts where protection can work, and refuses with the cure elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oslo_config import cfg
from oslo_messaging._drivers import impl_fake
from oslo_messaging.notify import _impl_test

from nova_pmt import exception
from nova_pmt.agent import presence, startup
from nova_pmt.agent.rpcapi import AgentAPI
from nova_pmt.arbiter.file import FileArbiter
from nova_pmt.conf import opts
from nova_pmt.messaging import oslo_messaging
from tests.unit.agent.rig import FakeHost, eventually


def conf(tmp_path: Path, **tls: Any) -> Any:
    names = {"ca_file": "ca.pem", "cert_file": "cert.pem", "key_file": "key.pem"}
    paths = {key: str(tmp_path / name) for key, name in names.items()}
    return SimpleNamespace(
        state_path=str(tmp_path / "state"),
        tls=SimpleNamespace(**{"insecure": False, **paths, **tls}),
        arbiter=SimpleNamespace(driver="file"),
        manager=SimpleNamespace(enabled=False),
    )


def test_only_root_may_start_it(tmp_path: Path) -> None:
    with pytest.raises(exception.ConfigError, match="root"):
        startup.check(conf(tmp_path, insecure=True), euid=1000)


@pytest.mark.parametrize(("driver", "enabled"), [("manager", False), ("file", True)])
def test_managers_that_would_not_be_told_of_pairs_are_refused(
    tmp_path: Path, driver: str, enabled: bool
) -> None:
    given = conf(tmp_path, insecure=True)
    given.arbiter.driver, given.manager.enabled = driver, enabled
    with pytest.raises(exception.ConfigError, match="go together"):
        startup.check(given, euid=0)


def test_without_certificates_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(exception.ConfigError, match="ca_file") as error:
        startup.check(conf(tmp_path), euid=0)
    assert "insecure" in error.value.cure


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0o644)
    with pytest.raises(exception.ConfigError, match="others") as error:
        startup.check(conf(tmp_path), euid=0)
    assert error.value.cure.startswith("chmod 600")


def test_files_that_are_no_certificates_are_refused(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0o600)
    with pytest.raises(exception.ConfigError, match="fit together"):
        startup.check(conf(tmp_path), euid=0)


def test_a_state_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(exception.ConfigError, match="state_path"):
        startup.check(conf(tmp_path, insecure=True), euid=0)


def test_workers_read_the_configuration_that_the_agent_has_read(tmp_path: Path) -> None:
    path = tmp_path / "x.conf"
    path.write_text("")
    loaded = cfg.ConfigOpts()
    loaded(["--config-file", str(path), "--config-dir", str(tmp_path)])
    argv = startup.worker_argv(loaded)
    assert argv[:3] == [sys.executable, "-m", "nova_pmt.cmd.worker"]
    assert argv[3:] == ["--config-file", str(path), "--config-dir", str(tmp_path)]


def test_workers_log_beside_the_agent(tmp_path: Path) -> None:
    def place(log_dir: str | None, log_file: str | None) -> str | None:
        return startup.log_directory(SimpleNamespace(log_dir=log_dir, log_file=log_file))

    assert place("/var/log/nova_pmt", "agent.log") == "/var/log/nova_pmt"
    assert place(None, "/var/log/agent.log") == "/var/log"
    assert place(None, None) is None


def test_a_started_agent_answers_over_the_bus_and_ends_when_closed(tmp_path: Path) -> None:
    impl_fake.FakeExchangeManager.cleanup()
    loaded = cfg.CONF
    opts.register(loaded)
    loaded.register_opts([cfg.StrOpt("log_dir"), cfg.StrOpt("log_file")])
    path = tmp_path / "nova-pmt.conf"
    path.write_text(
        "[DEFAULT]\ntransport_url = fake://\nhost = alone\n"
        f"state_path = {tmp_path}\n"
        "[oslo_messaging_notifications]\ndriver = test\n"
        f"[guest]\nruntime_directory = {tmp_path}/run\n"
    )
    loaded(["--config-file", str(path)], project="nova_pmt")
    host = FakeHost(tmp_path / "domains")
    host.define()
    arbiter = FileArbiter(SimpleNamespace(arbiter=SimpleNamespace(directory=str(tmp_path))))
    _impl_test.reset()
    agent = startup.Agent(loaded, host, arbiter)
    try:
        present = eventually(lambda: presence.read(presence.path(f"{tmp_path}/run")))
        assert (present.host, present.pid) == ("alone", os.getpid())
        api = AgentAPI(oslo_messaging.get_rpc_transport(loaded), timeout_s=5)
        assert api.find("alone", "web1")["running"] is True
        assert api.list("alone") == {"host": "alone", "pairs": []}
        with pytest.raises(exception.SameHost):
            api.protect("alone", "web1", "alone")
    finally:
        agent.close()
        loaded.reset()
    assert presence.read(presence.path(f"{tmp_path}/run")) is None


def test_the_command_refuses_with_the_cure_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "nova-pmt.conf"
    path.write_text(f"[DEFAULT]\nstate_path = {tmp_path}\n[tls]\nca_file = {tmp_path}/none\n")
    ended = _agent(path).communicate(timeout=60)
    assert "error CONFIG_ERROR: " in ended[1]
    assert "cure: " in ended[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="the agent runs as root only")
def test_the_command_ends_in_order_with_sigterm(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    pytest.importorskip("nova_pmt.agent.libvirt_host")
    path = tmp_path / "nova-pmt.conf"
    path.write_text(
        "[DEFAULT]\ntransport_url = fake://\n"
        f"state_path = {tmp_path}\nlog_file = {tmp_path}/agent.log\n[tls]\ninsecure = true\n"
        f"[guest]\nruntime_directory = {tmp_path}/run\n"
    )
    process = _agent(path)
    log = tmp_path / "agent.log"
    eventually(lambda: (log.exists() and "is ready" in log.read_text()) or process.poll(), 60)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "guests run on" in log.read_text()


def _agent(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nova_pmt.cmd.agent", "--config-file", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
