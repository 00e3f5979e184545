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

"""What the devstack plugin writes to nova.conf, as Nova reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nova import conf as nova_conf
from nova.scheduler import filters, weights
from oslo_config import cfg

from tests.unit.devstack.node import STACK, Devstack


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Devstack:
    stacked = Devstack(tmp_path_factory.mktemp("devstack"))
    stacked.stack(*STACK)
    return stacked


def read(path: Path) -> Any:
    """With Nova's own options and their own types."""
    conf = cfg.ConfigOpts()
    for module in (nova_conf.scheduler, nova_conf.notifications, nova_conf.base):
        module.register_opts(conf)
    nova_conf.compute.register_opts(conf)
    conf.register_opts(
        [cfg.MultiStrOpt("driver", default=[])], group="oslo_messaging_notifications"
    )
    conf([], project="nova", default_config_files=[str(path)], default_config_dirs=[])
    return conf


def test_the_scheduler_finds_our_filter_and_all_that_devstack_has(node: Devstack) -> None:
    conf = read(node.nova_conf).filter_scheduler
    handler = filters.HostFilterHandler()
    found = {kind.__name__ for kind in handler.get_matching_classes(conf.available_filters)}
    enabled = conf.enabled_filters
    assert enabled[-1] == "PMTStandbyFilter"
    assert "DifferentHostFilter" in enabled
    assert set(enabled) <= found


def test_the_scheduler_finds_our_weigher_and_its_own(node: Devstack) -> None:
    conf = read(node.nova_conf).filter_scheduler
    kinds = weights.HostWeightHandler().get_matching_classes(conf.weight_classes)
    names = {kind.__name__ for kind in kinds}
    assert {"PMTSpreadWeigher", "RAMWeigher"} <= names


def test_notifications_are_versioned_and_have_a_topic_for_managers(node: Devstack) -> None:
    for path in (node.nova_conf, node.nova_cpu_conf):
        conf = read(path)
        assert conf.notifications.notification_format == "both"
        assert conf.notifications.versioned_notifications_topics == [
            "versioned_notifications",
            node.read().nova.notification_topic,
        ]
        assert conf.notifications.notify_on_state_change == "vm_and_task_state"
        assert conf.oslo_messaging_notifications.driver == ["messagingv2"]


def test_only_nova_pmt_compute_is_told_of_our_driver(node: Devstack) -> None:
    assert read(node.nova_conf).compute_driver == "libvirt.LibvirtDriver"
    assert read(node.nova_cpu_conf).compute_driver == "pmt.PMTDriver"
