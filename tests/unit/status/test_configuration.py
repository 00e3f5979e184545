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

"""What ``nova-pmt-status`` says of nova-pmt.conf and nova.conf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Code

from nova_pmt.conf import opts
from nova_pmt.status import configuration
from nova_pmt.status.finding import Finding, bad, doubt, good, result

GOOD_NOVA = f"""
[DEFAULT]
compute_driver = pmt.PMTDriver
host = compute1
[filter_scheduler]
available_filters = nova.scheduler.filters.all_filters
available_filters = {configuration.FILTER}
enabled_filters = ComputeFilter,PMTStandbyFilter
[notifications]
notification_format = both
versioned_notifications_topics = versioned_notifications,pmt_notifications
notify_on_state_change = vm_and_task_state
[oslo_messaging_notifications]
driver = messagingv2
"""
GOOD_OURS = """
[DEFAULT]
host = compute1
[arbiter]
driver = manager
[manager]
enabled = true
[nova]
enabled = true
standby_user_id = 0123
"""


def worst(findings: list[Finding]) -> Code:
    return result(findings).code


def text(findings: list[Finding]) -> str:
    return " ".join(finding.text for finding in findings if finding.code)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str, name: str = "nova-pmt.conf", mode: int = 0o600) -> Path:
        path = tmp_path / name
        path.write_text(content)
        path.chmod(mode)
        return path

    return write


def ours(path: Path) -> Any:
    conf = cfg.ConfigOpts()
    opts.register(conf)
    conf(["--config-file", str(path)], project="nova_pmt")
    return conf


def look(path: Path) -> list[Finding]:
    return list(configuration.ours(ours(path), [str(path)]))


# -- the result of a check --------------------------------------------------------------------


def test_the_worst_counts_and_comes_first() -> None:
    found = result([good("a"), doubt("b"), bad("c")])
    assert found.code == Code.FAILURE
    assert found.details == "c / b"


def test_without_complaints_what_is_good_is_told() -> None:
    assert result([good("a"), good("b")]).details == "a / b"
    assert result([]).code == Code.SUCCESS


# -- ours -------------------------------------------------------------------------------------


def test_a_configuration_as_it_should_be(write: Any) -> None:
    assert worst(look(write(GOOD_OURS))) == Code.SUCCESS


@pytest.mark.parametrize(
    ("mode", "code"),
    [(0o600, Code.SUCCESS), (0o640, Code.SUCCESS), (0o644, Code.FAILURE), (0o602, Code.FAILURE)],
)
def test_passwords_are_not_for_everybody(write: Any, mode: int, code: Code) -> None:
    secret = GOOD_OURS + "\n[database]\nconnection = mysql+pymysql://nova_pmt:secret@db/nova_pmt\n"
    assert worst(look(write(secret, mode=mode))) == code


@pytest.mark.parametrize(("mode", "code"), [(0o644, Code.SUCCESS), (0o646, Code.FAILURE)])
def test_without_passwords_everybody_may_read_it(write: Any, mode: int, code: Code) -> None:
    assert worst(look(write(GOOD_OURS, mode=mode))) == code


def test_without_any_file_it_says_so(write: Any) -> None:
    found = list(configuration.ours(ours(write("")), []))
    assert "no nova-pmt.conf" in text(found)


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("driver = manager", "go together"),
        ("enabled = true\n[nova]", "needs managers"),
        ("standby_user_id = 0123", "standby_user_id is empty"),
    ],
)
def test_options_that_need_each_other(write: Any, without: str, says: str) -> None:
    changed = GOOD_OURS.replace(without, "[nova]" if "[nova]" in without else "")
    found = look(write(changed))
    assert worst(found) == Code.FAILURE
    assert says in text(found)


# -- Nova's -----------------------------------------------------------------------------------


def test_novas_configuration_as_it_should_be(write: Any) -> None:
    nova = configuration.read_nova([str(write(GOOD_NOVA, "nova.conf"))])
    conf = ours(write(GOOD_OURS))
    for found in (
        configuration.notifications(conf, nova),
        configuration.scheduler(nova),
        configuration.compute(conf, nova),
    ):
        assert worst(list(found)) == Code.SUCCESS


def test_a_host_without_nova_is_not_complained_of(write: Any, tmp_path: Path) -> None:
    nova = configuration.read_nova([str(tmp_path / "absent")])
    conf = ours(write(GOOD_OURS))
    assert worst(list(configuration.notifications(conf, nova))) == Code.SUCCESS
    assert worst(list(configuration.scheduler(nova))) == Code.SUCCESS
    # But a compute host that has libvirt must have it.
    assert worst(list(configuration.compute(conf, nova))) == Code.WARNING


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("notification_format = both", "", "is unversioned"),
        (",pmt_notifications", "", "lacks pmt_notifications"),
        ("driver = messagingv2", "driver = noop", "driver is noop"),
        ("notify_on_state_change = vm_and_task_state", "", "notify_on_state_change"),
    ],
)
def test_what_managers_would_not_hear(write: Any, old: str, new: str, says: str) -> None:
    nova = configuration.read_nova([str(write(GOOD_NOVA.replace(old, new), "nova.conf"))])
    found = list(configuration.notifications(ours(write(GOOD_OURS)), nova))
    assert worst(found) == Code.WARNING  # they look at all servers from time to time
    assert says in text(found)


@pytest.mark.parametrize(
    ("old", "code", "says"),
    [
        (",PMTStandbyFilter", Code.WARNING, "not in [filter_scheduler] enabled_filters"),
        (f"available_filters = {configuration.FILTER}", Code.FAILURE, "not available"),
    ],
)
def test_a_scheduler_without_the_filter(write: Any, old: str, code: Code, says: str) -> None:
    nova = configuration.read_nova([str(write(GOOD_NOVA.replace(old, ""), "nova.conf"))])
    found = list(configuration.scheduler(nova))
    assert worst(found) == code
    assert says in text(found)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("pmt.PMTDriver", "libvirt.LibvirtDriver", "not pmt.PMTDriver"),
        ("compute_driver = pmt.PMTDriver", "", "not set"),
        ("host = compute1", "host = compute1.example.org", "compute1.example.org to Nova"),
    ],
)
def test_a_nova_compute_that_is_not_ours(write: Any, old: str, new: str, says: str) -> None:
    nova = configuration.read_nova([str(write(GOOD_NOVA.replace(old, new), "nova.conf"))])
    found = list(configuration.compute(ours(write(GOOD_OURS)), nova))
    assert worst(found) == Code.FAILURE
    assert says in text(found)


def test_the_last_of_novas_files_counts(write: Any) -> None:
    first = write(GOOD_NOVA.replace("pmt.PMTDriver", "libvirt.LibvirtDriver"), "nova.conf")
    second = write("[DEFAULT]\ncompute_driver = pmt.PMTDriver\n", "nova-compute.conf")
    nova = configuration.read_nova([str(first), str(second)])
    assert worst(list(configuration.compute(ours(write(GOOD_OURS)), nova))) == Code.SUCCESS


def test_a_nova_conf_that_nobody_understands_is_told_of(write: Any) -> None:
    nova = configuration.read_nova([str(write("no section = 1\n", "nova.conf"))])
    assert nova.conf is None
    assert "cannot be understood" in nova.why
