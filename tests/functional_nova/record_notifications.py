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

"""Writes down what Nova really sends: ``tests/unit/openstack/notifications.json``.

Runs a server through its life on Nova's own functional fixtures (two compute services on a fake
libvirt) and keeps the versioned notifications, one of each kind. To be run by hand, from the root
of the repository, in an environment as of ``tox -e functional-nova``, when Nova changes them::

    OS_NOVA_DISABLE_EVENTLET_PATCHING=True python -m tests.functional_nova.record_notifications
"""

from __future__ import annotations

import json
import os
import sys
import unittest
from pathlib import Path

import nova.tests.functional  # noqa: F401 - before all else of Nova's
from nova.tests.functional.libvirt import base

FILE = Path(__file__).resolve().parents[1] / "unit" / "openstack" / "notifications.json"
PROTECTED = {"ft": "pmt"}


class Life(base.ServersTestBase):
    """One server that asks for protection, and a second one with a standby's mark."""

    api_major_version, microversion, ADMIN_API = "v2.1", "2.94", True
    CAST_AS_CALL = False

    def setUp(self) -> None:
        super().setUp()
        self.flags(notification_format="versioned", group="notifications")
        self.flags(notify_on_state_change="vm_and_task_state", group="notifications")
        for name in ("a", "b"):
            self.start_compute(hostname=name)

    def _act(self, server: dict, action: dict, status: str) -> None:
        self.api.post_server_action(server["id"], action)
        self._wait_for_state_change(server, status)

    def test_life(self) -> None:
        extra_specs = {"ft:mode": "allowed"}
        flavor = self._create_flavor(vcpu=1, memory_mb=512, disk=1, extra_spec=extra_specs)
        body = self._build_server(networks="none", host="a", flavor_id=flavor)
        server = self.api.post_server({"server": body})
        self._wait_for_state_change(server, "ACTIVE")
        body = self._build_server(networks="none", host="b", flavor_id=flavor)
        body["metadata"] = {"pmt:protects": server["id"]}
        standby = self.api.post_server({"server": body})
        self._wait_for_state_change(standby, "ACTIVE")
        self.api.post_server_metadata(server["id"], PROTECTED)
        self._act(server, {"pause": None}, "PAUSED")
        self._act(server, {"unpause": None}, "ACTIVE")
        self._act(server, {"suspend": None}, "SUSPENDED")
        self._act(server, {"resume": None}, "ACTIVE")
        self._act(server, {"os-stop": None}, "SHUTOFF")
        self._act(server, {"os-start": None}, "ACTIVE")
        self._act(server, {"shelve": None}, "SHELVED_OFFLOADED")
        self._act(server, {"unshelve": None}, "ACTIVE")
        self.api.delete_server(standby["id"])
        self._wait_until_deleted(standby)
        self.api.delete_server(server["id"])
        self._wait_until_deleted(server)
        kept: dict[tuple[str, bool], dict] = {}
        heard_first = None  # of the property that was set while the server ran
        for sent in self.notifier.versioned_notifications:
            data = sent["payload"]["nova_object.data"]
            mark = "pmt:protects" in (data.get("metadata") or {})
            if heard_first is None and data.get("metadata") == PROTECTED:
                heard_first = sent
            kept[sent["event_type"], mark] = sent
        FILE.write_text(
            json.dumps(
                {
                    "nova": "34.0.0",
                    "server": server["id"],
                    "standby": standby["id"],
                    "property_set": heard_first,
                    "sent": [kept[key] for key in sorted(kept)],
                },
                indent=1,
                sort_keys=True,
            )
            + "\n"
        )


if __name__ == "__main__":
    if not os.environ.get("OS_NOVA_DISABLE_EVENTLET_PATCHING"):
        sys.exit("set OS_NOVA_DISABLE_EVENTLET_PATCHING=True")
    unittest.main(argv=[sys.argv[0], "Life"])
