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
"""Configuration files of the cloud's services, as dictionaries: group to option to value."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nova_pmt.lab import network
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.rabbit import private_file

Settings = dict[str, dict[str, Any]]

REGION = "RegionOne"
#: Where the APIs listen, in ctl.
PORTS: Mapping[str, int] = {
    "keystone": 5000,
    "placement": 8778,
    "glance": 9292,
    "neutron": 9696,
    "nova": 8774,
}
DATABASES = ("keystone", "placement", "glance", "neutron", "nova", "nova_api", "nova_cell0")
#: The physical network of the guests, as Neutron calls it, and the OVS bridge that leads there.
PHYSICAL, PROVIDER_BRIDGE = "data", "br-provider"

NOVA_DIRECTORY = "/var/lib/nova"
NOVA_CONFIG = "/etc/nova/nova.conf"
NOTIFICATION_TOPIC = "pmt_notifications"


@dataclass(frozen=True)
class Account:
    """A user of Keystone's, in a project of the same name unless told otherwise."""

    name: str
    password: str = field(repr=False)
    project: str = ""

    def options(self) -> dict[str, str]:
        """keystoneauth's, as they stand in a configuration file."""
        return {
            "auth_type": "password",
            "auth_url": url("keystone"),
            "username": self.name,
            "password": self.password,
            "project_name": self.project or self.name,
            "user_domain_id": "default",
            "project_domain_id": "default",
            "region_name": REGION,
        }


def url(service: str) -> str:
    """Where an API is, for Keystone's catalog and for clients."""
    path = {"keystone": "/v3", "nova": "/v2.1"}.get(service, "")
    return f"http://{network.MGMT.address(0)}:{PORTS[service]}{path}"


def etc(service: str) -> Path:
    """What the service's package brought for /etc."""
    return Path(sys.prefix) / "etc" / service


def write(path: Path, settings: Settings) -> None:
    """Write them; the file may hold passwords and is for root alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for group, options in settings.items():
        lines.append(f"[{group}]")
        for name, value in options.items():
            values = value if isinstance(value, (list, tuple)) else (value,)  # MultiStrOpt
            lines += [f"{name} = {_text(one)}" for one in values]
    private_file(path, "\n".join(lines) + "\n")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def merged(*parts: Mapping[str, Mapping[str, Any]]) -> Settings:
    """All of them in one; the last that names an option decides."""
    result: Settings = {}
    for part in parts:
        for group, options in part.items():
            result.setdefault(group, {}).update(options)
    return result


def _database(where: str) -> dict[str, Any]:
    return {"connection": where, "max_pool_size": 5, "max_overflow": 20}


def _authtoken(account: Account) -> dict[str, Any]:
    return {**account.options(), "www_authenticate_uri": url("keystone")}


def keystone(database: str, state: Path) -> Settings:
    return {
        "database": _database(database),
        "token": {"provider": "fernet", "expiration": 86400},
        "fernet_tokens": {"key_repository": state / "fernet"},
        "fernet_receipts": {"key_repository": state / "fernet"},
        "credential": {"key_repository": state / "credential"},
        "oslo_messaging_notifications": {"driver": "noop"},
        "cache": {"enabled": True, "backend": "dogpile.cache.memory"},
    }


def placement(database: str, account: Account) -> Settings:
    return {
        "api": {"auth_strategy": "keystone"},
        "placement_database": _database(database),
        "keystone_authtoken": _authtoken(account),
    }


def glance(database: str, account: Account, state: Path, transport_url: str) -> Settings:
    return {
        "DEFAULT": {
            "enabled_backends": "fs:file",
            "workers": 1,
            "enabled_import_methods": "[glance-direct]",
            "transport_url": transport_url,
        },
        "database": _database(database),
        "glance_store": {"default_backend": "fs"},
        "fs": {"filesystem_store_datadir": state / "images"},
        "os_glance_staging_store": {"filesystem_store_datadir": state / "staging"},
        "os_glance_tasks_store": {"filesystem_store_datadir": state / "tasks"},
        "paste_deploy": {
            "flavor": "keystone",
            "config_file": etc("glance") / "glance-api-paste.ini",
        },
        "keystone_authtoken": _authtoken(account),
        "oslo_messaging_notifications": {"driver": "noop"},
        "oslo_concurrency": {"lock_path": state / "locks"},
    }


def neutron(database: str, account: Account, state: Path, transport_url: str) -> Settings:
    address = network.MGMT.address(0)
    return {
        "DEFAULT": {
            "core_plugin": "ml2",
            "service_plugins": "",
            "auth_strategy": "keystone",
            "transport_url": transport_url,
            "state_path": state,
            "api_paste_config": etc("neutron") / "api-paste.ini",
            "notify_nova_on_port_status_changes": True,
            "notify_nova_on_port_data_changes": True,
            "send_events_interval": 1,
            "api_workers": 1,
            "rpc_workers": 1,
            "rpc_state_report_workers": 0,
            "agent_down_time": 30,
            "global_physnet_mtu": 1500,
        },
        "database": _database(database),
        "keystone_authtoken": _authtoken(account),
        "nova": account.options(),
        "oslo_messaging_notifications": {"driver": "noop"},
        "oslo_concurrency": {"lock_path": state / "locks"},
        "ml2": {
            "type_drivers": "flat,geneve,local",
            "tenant_network_types": "geneve",
            "project_network_types": "geneve",
            "mechanism_drivers": "ovn",
            "extension_drivers": "port_security",
        },
        "ml2_type_flat": {"flat_networks": "*"},
        "ml2_type_geneve": {"vni_ranges": "1:1000", "max_header_size": 38},
        "securitygroup": {"enable_security_group": True},
        "ovn": {
            "ovn_nb_connection": f"tcp:{address}:6641",
            "ovn_sb_connection": f"tcp:{address}:6642",
            "ovn_metadata_enabled": False,
            "neutron_sync_mode": "off",
        },
    }


def nova(host: LabHost, account: Account, transport_url: str) -> Settings:
    """What a compute host has; see :func:`nova_control` for the rest of ctl's."""
    privsep = {"helper_command": f"{sys.prefix}/bin/privsep-helper --config-file {NOVA_CONFIG}"}
    return {
        "DEFAULT": {
            "host": host.name,
            "my_ip": host.mgmt_ip,
            "transport_url": transport_url,
            "state_path": NOVA_DIRECTORY,
            "instances_path": f"{NOVA_DIRECTORY}/instances",
            "log_options": False,
            "default_log_levels": "amqp=WARN,oslo.messaging=INFO,sqlalchemy=WARN,urllib3=WARN,"
            "oslo_concurrency=INFO,stevedore=WARN",
            "compute_driver": "libvirt.LibvirtDriver",
            "service_down_time": 15,
            "report_interval": 3,
            "periodic_fuzzy_delay": 0,
            "vif_plugging_timeout": 120,
            "rpc_response_timeout": 120,
            "reserved_host_memory_mb": 256,
            "reserved_host_disk_mb": 0,
            "cpu_allocation_ratio": 16.0,
            "update_resources_interval": 15,
            "heal_instance_info_cache_interval": -1,
            "sync_power_state_interval": 30,
            "instance_delete_interval": 10,
            "shutdown_timeout": 5,  # the guests do not hear of it
        },
        "keystone_authtoken": _authtoken(account),
        "service_user": {"send_service_user_token": True, **account.options()},
        "keystone": {"region_name": REGION},
        "placement": account.options(),
        "glance": {"region_name": REGION},
        "neutron": account.options(),
        "cinder": account.options(),
        "notifications": {
            "notification_format": "versioned",
            "versioned_notifications_topics": NOTIFICATION_TOPIC,
            "notify_on_state_change": "vm_and_task_state",
        },
        "oslo_messaging_notifications": {"driver": "messagingv2"},
        "oslo_messaging_rabbit": {"heartbeat_timeout_threshold": 15, "heartbeat_rate": 2},
        "oslo_concurrency": {"lock_path": f"{NOVA_DIRECTORY}/locks"},
        "vnc": {"enabled": False},
        "spice": {"enabled": False},
        "libvirt": {
            "virt_type": "qemu",
            "cpu_mode": "none",
            "connection_uri": "qemu:///system",
            "inject_partition": -2,
            "num_pcie_ports": 0,
            "mem_stats_period_seconds": 0,
            "wait_soft_reboot_seconds": 5,
            "tb_cache_size": 16,
            "live_migration_scheme": "ssh",
        },
        # Else Nova takes a kernel for a disk image when it migrates a server that has one.
        "workarounds": {"disable_deep_image_inspection": True},
        "compute": {"consecutive_build_service_disable_threshold": 0, "shutdown_retry_interval": 2},
        "os_vif_ovs": {"ovsdb_connection": "tcp:127.0.0.1:6640"},
        "nova_sys_admin": privsep,
        "vif_plug_ovs_privileged": privsep,
        "privsep_osbrick": privsep,
    }


def nova_control(database: str, api_database: str) -> Settings:
    """What only ctl has: API, conductor and scheduler."""
    return {
        "api_database": _database(api_database),
        "database": _database(database),
        "api": {"local_metadata_per_cell": False},
        "conductor": {"workers": 1},
        "scheduler": {"workers": 1, "discover_hosts_in_cells_interval": 2},
    }
