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

"""The devstack plugin: what each phase does, and what is in the files afterwards."""

from __future__ import annotations

import configparser
import re
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from keystoneauth1 import loading

from nova_pmt.agent import startup
from nova_pmt.conf import nova as nova_options
from tests.unit.devstack.node import ROOT, STACK, Devstack

FILTER = "nova_pmt.openstack.nova.filter.PMTStandbyFilter"


@pytest.fixture
def node(tmp_path: Path) -> Devstack:
    return Devstack(tmp_path)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Devstack:
    """A controller with guests, after stack.sh: to be looked at, not to be changed."""
    node = Devstack(tmp_path_factory.mktemp("stacked"))
    node.stack(*STACK, "stack/test-config")
    return node


def ini(path: Path) -> dict[str, dict[str, list[str]]]:
    """Sections, options, all of their values."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"\[(.+)\]", line):
            section = match[1]
        elif line:
            option, _, value = line.partition(" = ")
            found.setdefault(section, {}).setdefault(option, []).append(value)
    return found


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- phases --------------------------------------------------------------------------------


def test_pre_install_changes_nothing(node: Devstack) -> None:
    assert node.stack("stack/pre-install") == ["# stack/pre-install"]


def test_other_hypervisors_are_refused(tmp_path: Path) -> None:
    done = Devstack(tmp_path, "VIRT_DRIVER=fake").run("stack/pre-install")
    assert done.returncode == 1
    assert "VIRT_DRIVER is fake" in done.stderr


def test_install_brings_the_package_modules_and_libvirts_configuration(node: Devstack) -> None:
    node.qemu_conf.write_text('user = "libvirt-qemu"\n')
    log = node.stack("stack/install")
    assert f"setup_develop {ROOT}" in log
    assert "modprobe sch_plug" in log
    assert log[-1] == "restart_service libvirtd"
    text = node.qemu_conf.read_text()
    assert text.startswith('user = "libvirt-qemu"\n')
    assert f'memory_backing_dir = "{node.sandbox}/shm/libvirt"' in text
    assert 'security_driver = "none"' in text


def test_a_kernel_without_modules_is_no_reason_to_stop(tmp_path: Path) -> None:
    assert Devstack(tmp_path, "NO_MODULES=yes").stack("stack/install")


def test_stacking_twice_changes_nothing_more(node: Devstack) -> None:
    node.stack()
    before = {path: path.read_text() for path in (node.qemu_conf, node.nova_conf, node.pmt_conf)}
    node.stack()
    assert {path: path.read_text() for path in before} == before


def test_the_driver_is_set_only_after_devstack_has_started_nova_compute(stacked: Devstack) -> None:
    log = stacked.log()
    extra = log[log.index("# stack/post-config") :]
    compute = [line for line in extra if " n-cpu" in line]
    assert compute == [
        "run_process n-cpu bin/nova-compute --config-file nova/nova-cpu.conf libvirt",
        "stop_process n-cpu",
        "run_process n-cpu bin/nova-pmt-compute --config-file nova/nova-cpu.conf libvirt",
    ]
    assert ini(stacked.nova_conf)["DEFAULT"]["compute_driver"] == ["libvirt.LibvirtDriver"]
    assert ini(stacked.nova_cpu_conf)["DEFAULT"]["compute_driver"] == ["pmt.PMTDriver"]


def test_the_database_is_there_before_managers_and_agents_before_compute(stacked: Devstack) -> None:
    log = stacked.log()
    config = "--config-file etc/nova_pmt/nova-pmt.conf"
    wanted = [
        "recreate_database nova_pmt",
        f"nova-pmt-manage {config} db sync",
        f"run_process nova-pmt-manager bin/nova-pmt-manager {config}",
        f"run_process nova-pmt-agent bin/nova-pmt-agent {config}  root",
        "stop_process n-cpu",
    ]
    assert [line for line in log if line in wanted] == wanted


def test_the_user_has_both_roles_in_a_project_of_its_own(stacked: Devstack) -> None:
    log = stacked.log()
    assert "get_or_create_project nova_pmt Default" in log
    assert [line for line in log if line.startswith("get_or_add_user")] == [
        "get_or_add_user_project_role admin nova_pmt nova_pmt Default Default",
        "get_or_add_user_project_role service nova_pmt nova_pmt Default Default",
    ]


def test_test_config_makes_a_flavor_and_looks_whether_all_is_there(stacked: Devstack) -> None:
    log = stacked.log()
    assert "openstack --os-cloud devstack-admin flavor set --property ft:mode=allowed pmt" in log
    assert log[-1].startswith("nova-pmt-status --config-file etc/nova_pmt/nova-pmt.conf")
    assert log[-1].endswith("upgrade check")


@pytest.mark.parametrize(
    ("status", "localrc", "ends"),
    [(1, "", 0), (2, "", 1), (2, "NOVA_PMT_CHECK=False", 0)],
    ids=["warnings", "failures", "failures-that-nobody-minds"],
)
def test_what_nova_pmt_status_finds_ends_stack_sh(
    tmp_path: Path, status: int, localrc: str, ends: int
) -> None:
    node = Devstack(tmp_path, localrc)
    done = node.run("stack/test-config", STATUS=str(status))
    assert done.returncode == ends, done.stderr


def test_unstack_ends_managers_before_agents(node: Devstack) -> None:
    log = node.stack("unstack")
    assert log[log.index("# unstack") + 1 :] == [
        "stop_process nova-pmt-manager",
        "stop_process nova-pmt-agent",
    ]


def test_clean_leaves_nothing_behind(node: Devstack) -> None:
    node.qemu_conf.write_text('user = "libvirt-qemu"\n')
    node.stack(*STACK, "unstack", "clean")
    assert node.qemu_conf.read_text() == 'user = "libvirt-qemu"\n'
    assert not node.pmt_conf.parent.exists()
    assert not (node.sandbox / "data/nova_pmt").exists()
    assert not (node.sandbox / "data/CA/nova_pmt").exists()


def test_phases_that_it_does_not_know_do_nothing(node: Devstack) -> None:
    assert node.stack("stack/something-new") == ["# stack/something-new"]


# -- files ---------------------------------------------------------------------------------


def test_our_own_configuration_can_be_read_by_our_commands(stacked: Devstack) -> None:
    conf = stacked.read()
    assert (conf.host, conf.my_ip) == ("node1", "192.0.2.11")
    assert conf.arbiter.driver == "manager"
    assert conf.manager.enabled
    assert conf.nova.enabled
    assert conf.nova.standby_user_id == ["0123456789abcdef"]
    assert conf.database.connection.endswith("/nova_pmt?charset=utf8")
    startup._check_tls(conf.tls)
    written = ini(stacked.pmt_conf)
    assert written["DEFAULT"]["transport_url"] == ["rabbit://stackrabbit:secret@192.0.2.11:5672/"]


def test_managers_can_log_in_with_it(stacked: Devstack) -> None:
    conf = stacked.read()
    nova_options.register_auth(conf)
    plugin = loading.load_auth_from_conf_options(conf, "nova")
    assert plugin is not None
    assert plugin.auth_url == "http://192.0.2.11/identity"
    assert (plugin._username, plugin._project_name) == ("nova_pmt", "nova_pmt")


def test_nobody_else_can_read_what_has_passwords_and_keys(stacked: Devstack) -> None:
    private = [stacked.pmt_conf, stacked.pmt_conf.parent / "tls/key.pem"]
    private.append(stacked.sandbox / "data/CA/nova_pmt/ca-key.pem")
    assert [mode(path) for path in private] == [0o600] * 3


def test_certificates_name_the_host_and_are_good_both_ways(stacked: Devstack) -> None:
    tls = stacked.pmt_conf.parent / "tls"
    certificate = x509.load_pem_x509_certificate((tls / "cert.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node1"]
    certificate.verify_directly_issued_by(
        x509.load_pem_x509_certificate((tls / "ca.pem").read_bytes())
    )
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {use._name for use in usage} == {"serverAuth", "clientAuth"}
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls / "cert.pem", tls / "key.pem")


def test_the_filter_is_added_to_those_that_there_are(stacked: Devstack) -> None:
    scheduler = ini(stacked.nova_conf)["filter_scheduler"]
    assert scheduler["available_filters"] == ["nova.scheduler.filters.all_filters", FILTER]
    (enabled,) = scheduler["enabled_filters"]
    assert enabled.startswith("ComputeFilter,")
    assert enabled.endswith(",DifferentHostFilter,PMTStandbyFilter")


def test_filters_and_topics_of_others_stay(node: Devstack) -> None:
    node.stack("stack/post-config")
    text = node.nova_conf.read_text()
    text = text.replace(FILTER, "blazarnova.scheduler.filters.blazar_filter.BlazarFilter")
    text = text.replace(",pmt_notifications", ",masakari")
    node.nova_conf.write_text(text)
    node.call(f"configure_nova_for_nova_pmt {node.nova_conf}")
    scheduler = ini(node.nova_conf)["filter_scheduler"]
    assert [name.rpartition(".")[2] for name in scheduler["available_filters"]] == [
        "all_filters",
        "BlazarFilter",
        "PMTStandbyFilter",
    ]
    topics = ini(node.nova_conf)["notifications"]["versioned_notifications_topics"]
    assert topics == ["versioned_notifications,masakari,pmt_notifications"]


def test_nova_sends_versioned_notifications_to_a_topic_of_ours(stacked: Devstack) -> None:
    for path in (stacked.nova_conf, stacked.nova_cpu_conf):
        found = ini(path)
        assert found["notifications"]["notification_format"] == ["both"]
        assert found["notifications"]["versioned_notifications_topics"] == [
            "versioned_notifications,pmt_notifications"
        ]
        assert found["oslo_messaging_notifications"]["driver"] == ["messagingv2"]
        # The bus that managers listen to, whatever cell nova-compute is in.
        assert found["oslo_messaging_notifications"]["transport_url"] == [
            "rabbit://stackrabbit:secret@192.0.2.11:5672/"
        ]


def test_what_local_conf_says_counts(tmp_path: Path) -> None:
    node = Devstack(
        tmp_path,
        "NOVA_PMT_TOPIC=other\nNOVA_PMT_HONOUR_PROPERTY=always\nNOVA_PMT_SECURITY_DRIVER=\n"
        "NOVA_PMT_QEMU_USER=somebody\nNOVA_PMT_FLAVOR=\nNOVA_NOTIFICATION_FORMAT=versioned\n",
    )
    log = node.stack(*STACK, "stack/test-config")
    conf = node.read()
    assert conf.nova.notification_topic == "other"
    assert conf.nova.honour_property == "always"
    assert conf.guest.qemu_user == "somebody"
    assert "security_driver" not in node.qemu_conf.read_text()
    assert not [line for line in log if "flavor" in line]
    notifications = ini(node.nova_conf)["notifications"]
    assert notifications["notification_format"] == ["versioned"]
    assert notifications["versioned_notifications_topics"] == ["versioned_notifications,other"]


# -- layouts -------------------------------------------------------------------------------

COMPUTE = (
    "ENABLED_SERVICES=n-cpu\nLOCAL_HOSTNAME=node2\nHOST_IP=192.0.2.12\n"
    "disable_service nova-pmt-manager\n"
)


def test_a_compute_node_takes_the_controllers_authority(stacked: Devstack, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    authority = other / "authority"
    authority.mkdir()
    for name in ("ca.pem", "ca-key.pem"):
        (authority / name).write_bytes((stacked.sandbox / "data/CA/nova_pmt" / name).read_bytes())
    second = Devstack(other, COMPUTE + f"NOVA_PMT_CA_DIR={authority}\n")
    log = second.stack()
    assert not [line for line in log if "manage" in line or "database" in line]
    conf = second.read()
    assert conf.host == "node2"
    assert conf.database.connection is None
    assert "password" not in ini(second.pmt_conf)["nova"]
    verified = subprocess.run(
        ["openssl", "verify", "-CAfile", conf.tls.ca_file, conf.tls.cert_file],
        capture_output=True,
    )
    assert verified.returncode == 0
    assert (
        Path(conf.tls.ca_file).read_bytes() == (stacked.pmt_conf.parent / "tls/ca.pem").read_bytes()
    )


def test_a_compute_node_without_the_authority_says_what_to_copy(tmp_path: Path) -> None:
    done = Devstack(tmp_path, COMPUTE).run(*STACK)
    assert done.returncode == 1
    assert "CA/nova_pmt of the controller" in done.stderr


def test_a_controller_without_guests_has_no_agent_and_no_certificate(tmp_path: Path) -> None:
    node = Devstack(
        tmp_path,
        "ENABLED_SERVICES=key,mysql,rabbit,n-api,n-sch\ndisable_service nova-pmt-agent\n",
    )
    log = node.stack()
    assert not [line for line in log if "agent" in line or "libvirt" in line or "n-cpu" in line]
    assert not (node.pmt_conf.parent / "tls").exists()
    assert "PMTStandbyFilter" in node.nova_conf.read_text()


SECOND = "NOVA_PMT_SECOND_HOST=True\nNOVA_PMT_SECOND_HOST_NAME=node1-pmt\n"


@pytest.fixture(scope="module")
def with_second(tmp_path_factory: pytest.TempPathFactory) -> Devstack:
    """A node with a second host, after stack.sh: to be looked at, not to be changed."""
    node = Devstack(tmp_path_factory.mktemp("second"), SECOND)
    node.stack()
    return node


def test_the_second_host_has_its_own_name_address_and_certificate(with_second: Devstack) -> None:
    node, log = with_second, with_second.log()
    directory = node.sandbox / "data/nova_pmt_host2"
    first, second = node.read(), node.read(directory / "nova-pmt.conf")
    assert (first.host, second.host) == ("node1", "node1-pmt")
    assert second.my_ip == "192.168.251.2"
    startup._check_tls(second.tls)
    assert second.nova.standby_user_id == first.nova.standby_user_id
    compute = ini(directory / "nova-cpu.conf")
    assert compute["DEFAULT"]["host"] == ["node1-pmt"]
    assert compute["DEFAULT"]["compute_driver"] == ["pmt.PMTDriver"]
    assert mode(directory / "nova-pmt.conf") == mode(directory / "nova-cpu.conf") == 0o600
    started = [line for line in log if line.startswith("run_process nova-pmt-host2")]
    assert started == [
        f"run_process nova-pmt-host2 /bin/bash {ROOT}/devstack/second-host.sh "
        "data/nova_pmt_host2/settings  root"
    ]
    assert log[-1] == "nova-manage cell_v2 discover_hosts --verbose"


def test_the_second_hosts_script_has_every_setting_that_it_uses(with_second: Devstack) -> None:
    written = (with_second.sandbox / "data/nova_pmt_host2/settings").read_text()
    script = (ROOT / "devstack/second-host.sh").read_text()
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)\b", script)) - {"BASH_SOURCE", "SETTINGS"}
    known = set(re.findall(r"\b([A-Z][A-Z_]+)=", written)) | {"NOVA_PMT_CONFIG"}
    assert used - known == set()


def test_a_second_host_that_does_not_come_is_told_of(tmp_path: Path) -> None:
    done = Devstack(tmp_path, SECOND + "COMES=\nNOVA_PMT_SECOND_HOST_TRIES=3\n").run(*STACK)
    assert done.returncode == 1
    assert "node1-pmt does not come" in done.stderr


@pytest.mark.parametrize(
    ("localrc", "why"),
    [
        ("Q_AGENT=openvswitch", "Q_AGENT is openvswitch"),
        ("ENABLED_SERVICES+=,tls-proxy", "disable_service tls-proxy"),
        ("HOST_IP=127.0.0.1", "HOST_IP 127.0.0.1"),
    ],
)
def test_where_the_second_host_cannot_be_it_is_refused(
    tmp_path: Path, localrc: str, why: str
) -> None:
    done = Devstack(tmp_path, f"{SECOND}{localrc}\n").run("stack/pre-install")
    assert done.returncode == 1
    assert why in done.stderr


def test_the_second_host_ends_with_unstack(tmp_path: Path) -> None:
    node = Devstack(tmp_path, SECOND)
    log = node.stack(*STACK, "unstack", "clean")
    assert "stop_process nova-pmt-host2" in log
    assert not (tmp_path / "data/nova_pmt_host2").exists()


# -- what people forget -----------------------------------------------------------------------


def test_the_readme_has_every_variable_that_can_be_set() -> None:
    readme = (ROOT / "devstack/README.rst").read_text().replace("``, ``_USER``", "NOVA_PMT_USER")
    settings = (ROOT / "devstack/settings").read_text()
    names = set(re.findall(r"^(NOVA_PMT_\w+)=", settings, re.M))
    names -= {"NOVA_PMT_DIR", "NOVA_PMT_CONF", "NOVA_PMT_SECOND_HOST_DIR"}
    assert names
    assert sorted(name for name in names if name not in readme) == []


@pytest.mark.parametrize("name", ["controller", "compute", "single-node"])
def test_samples_of_local_conf_are_one_localrc(name: str) -> None:
    text = (ROOT / f"devstack/local.conf.{name}").read_text()
    assert text.count("[[local|localrc]]") == 1
    assert "enable_plugin nova-pmt " in text
    body = text.split("[[local|localrc]]\n")[1]
    parser = configparser.ConfigParser(interpolation=None, strict=True, allow_no_value=True)
    parser.read_string("[localrc]\n" + body)  # no variable twice
    assert subprocess.run(["bash", "-n"], input=body, text=True).returncode == 0
