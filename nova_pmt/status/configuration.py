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

"""``nova-pmt.conf``, and what can be seen of ``nova.conf``."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oslo_config import cfg

from nova_pmt.conf import opts
from nova_pmt.status.finding import Finding, bad, doubt, good

FILTER = "nova_pmt.openstack.nova.filter.PMTStandbyFilter"
DRIVER = "pmt.PMTDriver"
#: Options that have a password, or a URL with one.
_SECRET = re.compile(r"^\s*(\w*password|\w*transport_url|\w*connection)\s*=\s*\S", re.MULTILINE)
_ALL_FILTERS = "nova.scheduler.filters.all_filters"
#: What is not set there has Nova's default.
_NOVA_OPTIONS: dict[str, list[cfg.Opt]] = {
    "DEFAULT": [
        cfg.StrOpt("compute_driver", default=""),
        cfg.StrOpt("host", default=""),
    ],
    "filter_scheduler": [
        cfg.MultiStrOpt("available_filters", default=[_ALL_FILTERS]),
        cfg.ListOpt("enabled_filters", default=[]),
    ],
    "notifications": [
        cfg.StrOpt("notification_format", default="unversioned"),
        cfg.ListOpt("versioned_notifications_topics", default=["versioned_notifications"]),
        cfg.StrOpt("notify_on_state_change", default=""),
    ],
    "oslo_messaging_notifications": [cfg.MultiStrOpt("driver", default=[])],
}


# -- ours ------------------------------------------------------------------------------------


def ours(conf: Any, files: Sequence[str]) -> Iterator[Finding]:
    """The files that were read, and options that must fit together.

    :param files: those that were read.
    """
    if not files:
        yield bad(
            "no nova-pmt.conf was found: every option has its default. Put it into /etc/nova_pmt/, "
            "or name it with --config-file."
        )
    for path in files:
        yield from _private(path)
    if conf.manager.enabled != (conf.arbiter.driver == "manager"):
        yield bad(
            "[manager] enabled and [arbiter] driver = manager go together, and only one is set."
        )
    if conf.nova.enabled and not conf.manager.enabled:
        yield bad("[nova] enabled needs managers: set [manager] enabled and [arbiter] driver.")
    if conf.nova.enabled and not conf.nova.standby_user_id:
        yield bad(
            "[nova] standby_user_id is empty: compute hosts take no server for a standby. It is "
            "the ID of the managers' user ('openstack user show nova_pmt -f value -c id')."
        )


def _private(path: str) -> Iterator[Finding]:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & stat.S_IWOTH:
        yield bad(f"{path} has mode {mode:04o}: everybody may change it. chmod o-w {path}")
    elif mode & stat.S_IROTH and _SECRET.search(Path(path).read_text()):
        yield bad(
            f"{path} has mode {mode:04o}: it has passwords, and others may read it. chmod 600, or "
            "640 with the group of the service that reads it."
        )
    else:
        yield good(f"{path}, mode {mode:04o}")


# -- Nova's ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NovaConf:
    """What was read of Nova's configuration.

    :param conf: None: nothing could be read.
    :param why: why not.
    """

    conf: Any
    files: tuple[str, ...]
    why: str = ""


def read_nova(paths: Sequence[str]) -> NovaConf:
    """Read as much as there is; does not need Nova."""
    there = [path for path in paths if os.path.exists(path)]
    if not there:
        return NovaConf(None, (), f"there is no {' and no '.join(paths)} here")
    readable = [path for path in there if os.access(path, os.R_OK)]
    if len(readable) < len(there):
        hidden = ", ".join(path for path in there if path not in readable)
        return NovaConf(None, (), f"{hidden} cannot be read; run this as root")
    conf = cfg.ConfigOpts()
    for group, options in _NOVA_OPTIONS.items():
        conf.register_opts(options, group=None if group == "DEFAULT" else group)
    try:
        conf([], project="nova", default_config_files=readable, default_config_dirs=[])
    except cfg.Error as error:
        return NovaConf(None, (), f"{', '.join(readable)} cannot be understood: {error}")
    return NovaConf(conf, tuple(readable))


def notifications(conf: Any, nova: NovaConf) -> Iterator[Finding]:
    """Do managers hear of what Nova does?"""
    if nova.conf is None:
        yield good(f"not looked at: {nova.why}")
        return
    where = " and ".join(nova.files)
    found, topic = nova.conf.notifications, conf.nova.notification_topic
    late = f"Managers see changes only every {conf.nova.reconcile_interval_s} s."
    if found.notification_format not in ("versioned", "both"):
        yield doubt(
            f"[notifications] notification_format is {found.notification_format} in {where}, not "
            f"versioned or both. {late}"
        )
    if topic not in found.versioned_notifications_topics:
        yield doubt(
            f"[notifications] versioned_notifications_topics in {where} lacks {topic}. {late}"
        )
    drivers = nova.conf.oslo_messaging_notifications.driver
    if not {"messaging", "messagingv2"} & set(drivers):
        yield doubt(
            f"[oslo_messaging_notifications] driver is {','.join(drivers) or 'not set'} in "
            f"{where}, not messagingv2. {late}"
        )
    if not found.notify_on_state_change:
        yield doubt(
            f"[notifications] notify_on_state_change is not set in {where}: of a property that is "
            f"set on a running server nothing is told. {late}"
        )
    yield good(f"versioned, topic {topic}")


def scheduler(nova: NovaConf) -> Iterator[Finding]:
    """Does the scheduler keep standbys off their primaries' hosts?"""
    if nova.conf is None:
        yield good(f"not looked at: {nova.why}")
        return
    found, name = nova.conf.filter_scheduler, FILTER.rpartition(".")[2]
    if name not in found.enabled_filters:
        yield doubt(
            f"{name} is not in [filter_scheduler] enabled_filters of {' and '.join(nova.files)}. "
            "If this host has a nova-scheduler, standbys may come to the host of their primary."
        )
    elif FILTER not in found.available_filters:
        yield bad(
            f"{name} is enabled but not available, and nova-scheduler does not start: add "
            f"available_filters = {FILTER} to [filter_scheduler], beside {_ALL_FILTERS}."
        )
    else:
        yield good(f"{name} is enabled")


def compute(conf: Any, nova: NovaConf) -> Iterator[Finding]:
    """Is this compute host's Nova ours?"""
    if nova.conf is None:
        yield doubt(f"nova-compute's driver is not known: {nova.why}.")
        return
    where = " and ".join(nova.files)
    if nova.conf.compute_driver != DRIVER:
        yield bad(
            f"[DEFAULT] compute_driver is {nova.conf.compute_driver or 'not set'} in {where}, not "
            f"{DRIVER}; and nova-pmt-compute must run in place of nova-compute. If nova-compute "
            "has a file of its own, name it with --nova-config-file."
        )
    else:
        yield good(f"compute_driver is {DRIVER}")
    host = opts.host_name(conf)
    if nova.conf.host and nova.conf.host != host:
        yield bad(
            f"this host is {host} to the agent and {nova.conf.host} to Nova: set [DEFAULT] host "
            "of nova-pmt.conf to the latter."
        )
