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

"""``nova-pmt-status upgrade check`` as an operator calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nova_pmt.cmd import status


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nova_pmt.cmd.status", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_all_checks_run_and_say_something(tmp_path: Path) -> None:
    path = tmp_path / "nova-pmt.conf"
    path.write_text("[DEFAULT]\ntransport_url = fake://\n")
    path.chmod(0o600)
    # No libvirt in the path: not a compute host, so that nothing depends on this machine.
    done = call(
        "--config-file", str(path), "--nova-config-file", str(tmp_path / "absent"),
        "upgrade", "check", "--json",
    )  # fmt: skip
    assert done.returncode in (0, 1, 2), done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert [check["check"] for check in checks] == [
        name for name, _ in status.Checks._upgrade_checks
    ]
    assert all(check["details"] for check in checks)
    assert checks[0]["result"] == 0
    assert "message came back" in checks[1]["details"]
    assert done.stderr == ""


def test_a_configuration_that_cannot_be_read_is_no_finding(tmp_path: Path) -> None:
    done = call("--config-file", str(tmp_path / "absent"), "upgrade", "check")
    assert done.returncode == 255
    assert "cannot be used" in done.stderr


def test_every_check_is_documented() -> None:
    root = Path(__file__).resolve().parents[3]
    text = (root / "doc/source/install/verify.rst").read_text()
    names = [name for name, _ in status.Checks._upgrade_checks]
    assert [name for name in names if f"``{name}``" not in text and name not in text] == []
