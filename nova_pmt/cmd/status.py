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

"""``nova-pmt-status upgrade check``: what is missing on this host and in this cloud."""

from __future__ import annotations

import logging
import sys
from typing import Any

from oslo_config import cfg
from oslo_upgradecheck import upgradecheck
from oslo_upgradecheck.upgradecheck import Result

from nova_pmt.conf import nova as nova_options
from nova_pmt.conf import opts
from nova_pmt.manager.rpcapi import ManagerAPI
from nova_pmt.messaging import oslo_messaging
from nova_pmt.status import configuration, host, services
from nova_pmt.status.finding import bad, good, result

#: What nova-compute reads is last, as there: it counts.
NOVA_CONF = ["/etc/nova/nova.conf", "/etc/nova/nova-compute.conf"]
_OPTIONS = [
    cfg.MultiStrOpt(
        "nova-config-file",
        default=NOVA_CONF,
        help="Nova's configuration on this host; may be repeated.",
    )
]


class Checks(upgradecheck.UpgradeCommands):
    """Exit status: 0 all is well, 1 there are warnings, 2 there are failures.

    What does not concern this host, as it is, is a success that says so: a host without libvirt
    needs no certificate, and only managers have a database.
    """

    display_title = "nova_pmt: what is missing"

    def __init__(self, conf: Any) -> None:
        self._conf = conf

    @property
    def _nova(self) -> configuration.NovaConf:
        return configuration.read_nova(self._conf.nova_config_file)

    def _ours(self) -> Result:
        return result(configuration.ours(self._conf, self._conf.config_file or []))

    def _bus(self) -> Result:
        return result(services.message_bus(oslo_messaging.get_rpc_transport(self._conf)))

    def _database(self) -> Result:
        return result(services.database(self._conf))

    def _agents(self) -> Result:
        managers = ManagerAPI(
            oslo_messaging.get_rpc_transport(self._conf), timeout_s=services.TIMEOUT_S
        )
        here = opts.host_name(self._conf) if host.is_compute_host() else None
        return result(services.agents(self._conf, managers, here))

    def _cloud(self) -> Result:
        return result(services.nova(self._conf))

    def _notifications(self) -> Result:
        return result(configuration.notifications(self._conf, self._nova))

    def _scheduler(self) -> Result:
        return result(configuration.scheduler(self._nova))

    def _compute(self) -> Result:
        if not self._conf.nova.enabled:
            return result([good("[nova] enabled is not set")])
        return self._on_compute(lambda: configuration.compute(self._conf, self._nova))

    def _kernel(self) -> Result:
        return self._on_compute(host.kernel)

    def _hypervisor(self) -> Result:
        return self._on_compute(lambda: host.hypervisor(self._conf.guest.libvirt_uri))

    def _memory(self) -> Result:
        return self._on_compute(lambda: host.memory(self._conf.guest.memory_backing_dir))

    def _certificates(self) -> Result:
        return self._on_compute(lambda: host.certificates(self._conf))

    def _on_compute(self, check: Any) -> Result:
        if not host.is_compute_host():
            return result([good("no compute host: it has no libvirt")])
        return result(check())

    _upgrade_checks = (
        ("nova-pmt.conf", _ours),
        ("message bus", _bus),
        ("database", _database),
        ("managers and agents", _agents),
        ("Nova, Placement, Neutron", _cloud),
        ("nova.conf: notifications", _notifications),
        ("nova.conf: scheduler", _scheduler),
        ("nova.conf: compute", _compute),
        ("kernel", _kernel),
        ("QEMU and libvirt", _hypervisor),
        ("memory of standbys", _memory),
        ("certificates", _certificates),
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point. 255: it could not look."""
    # The table says what matters; libraries would write of each attempt to connect.
    logging.getLogger().addHandler(logging.NullHandler())
    conf = cfg.CONF  # see nova_pmt.messaging
    opts.register(conf)
    nova_options.register_auth(conf)
    conf.register_cli_opts(_OPTIONS)
    try:
        return upgradecheck.main(
            conf,
            project="nova_pmt",
            upgrade_command=Checks(conf),
            argv=sys.argv[1:] if argv is None else argv,
            default_config_files=cfg.find_config_files(project="nova_pmt", prog="nova-pmt"),
        )
    except (cfg.Error, OSError) as error:
        print(bad(f"the configuration cannot be used: {error}").text, file=sys.stderr)
        return 255


if __name__ == "__main__":
    sys.exit(main())
