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

"""A devstack that consists of the plugin alone; see ``standins.sh``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from oslo_config import cfg

from nova_pmt.conf import opts

ROOT = Path(__file__).resolve().parents[3]
STACK = tuple(f"stack/{at}" for at in ("pre-install", "install", "post-config", "extra"))


class Devstack:
    """One node.

    :param sandbox: a directory of its own.
    :param localrc: what local.conf says.
    """

    def __init__(self, sandbox: Path, localrc: str = "") -> None:
        self.sandbox = sandbox
        self._localrc = sandbox / "localrc"
        self._localrc.write_text(localrc)
        (sandbox / "libvirt").mkdir(exist_ok=True)
        self.qemu_conf.touch()

    def run(self, *phases: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Go through phases; :meth:`log` has what was done."""
        return subprocess.run(
            ["bash", str(Path(__file__).with_name("standins.sh")), self._localrc, *phases],
            env={
                "PATH": os.environ["PATH"],
                "SANDBOX": str(self.sandbox),
                "NOVA_PMT_DIR": str(ROOT),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    def stack(self, *phases: str) -> list[str]:
        """Go through phases, which must succeed; what was done."""
        done = self.run(*(phases or STACK))
        assert done.returncode == 0, done.stderr
        return self.log()

    def call(self, function: str) -> None:
        """Call one function of the plugin's, with all that devstack gives it."""
        done = self.run(CALL=function)
        assert done.returncode == 0, done.stderr

    def log(self) -> list[str]:
        """Everything that was called, without the sandbox's path."""
        text = (self.sandbox / "log").read_text()
        return text.replace(f"{self.sandbox}/", "").splitlines()

    @property
    def nova_conf(self) -> Path:
        return self.sandbox / "nova/nova.conf"

    @property
    def nova_cpu_conf(self) -> Path:
        return self.sandbox / "nova/nova-cpu.conf"

    @property
    def qemu_conf(self) -> Path:
        return self.sandbox / "libvirt/qemu.conf"

    @property
    def pmt_conf(self) -> Path:
        return self.sandbox / "etc/nova_pmt/nova-pmt.conf"

    def read(self, path: Path | None = None) -> cfg.ConfigOpts:
        """``nova-pmt.conf`` as our commands read it."""
        conf = cfg.ConfigOpts()
        opts.register(conf)
        conf(["--config-file", str(path or self.pmt_conf)], project="nova_pmt")
        return conf
