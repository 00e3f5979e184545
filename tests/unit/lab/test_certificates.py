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

"""Certificates of the lab: what is in them, and that TLS 1.3 takes them both ways."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import stat
import threading

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nova_pmt.lab.certificates import Authority


@pytest.fixture(scope="module")
def authority():
    return Authority()


def test_names_usage_and_lifetime(authority):
    issued = authority.issue("compute1", ["10.77.0.11", "10.77.1.11"])
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    (common_name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert common_name.value == "compute1"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["compute1"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.77.0.11"),
        ipaddress.ip_address("10.77.1.11"),
    ]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} == set(usage)
    life = certificate.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    assert datetime.timedelta(days=9) < life <= datetime.timedelta(days=10)


def test_key_is_for_the_owner_only(authority, tmp_path):
    authority.install(tmp_path, authority.issue("compute1"))
    authority.install(tmp_path, authority.issue("compute1"))  # again, over the first
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert {p.name for p in tmp_path.iterdir()} == {"ca.pem", "cert.pem", "key.pem"}


def handshake(server, client, server_name="compute1"):
    """Mutual TLS 1.3 over a socket pair between two installed certificates."""

    def context(purpose, directory):
        made = ssl.create_default_context(purpose, cafile=directory / "ca.pem")
        made.load_cert_chain(directory / "cert.pem", directory / "key.pem")
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.verify_mode = ssl.CERT_REQUIRED
        return made

    ours, theirs = socket.socketpair()
    errors = []

    def serve():
        try:
            with context(ssl.Purpose.CLIENT_AUTH, server).wrap_socket(
                theirs, server_side=True
            ) as s:
                s.sendall(s.recv(8))
        except (OSError, ssl.SSLError) as e:
            errors.append(e)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        outgoing = context(ssl.Purpose.SERVER_AUTH, client)
        with outgoing.wrap_socket(ours, server_hostname=server_name) as s:
            s.sendall(b"hello")
            return s.recv(8)
    finally:
        ours.close()
        thread.join()
        theirs.close()


@pytest.fixture
def installed(tmp_path):
    def install(authority, name, addresses=(), **options):
        directory = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        authority.install(directory, authority.issue(name, addresses, **options))
        return directory

    return install


@pytest.mark.parametrize("server_name", ["compute1", "10.77.1.11"])
def test_hosts_of_one_lab_trust_each_other(authority, installed, server_name):
    one = installed(authority, "compute1", ["10.77.1.11"])
    two = installed(authority, "compute2")
    assert handshake(one, two, server_name) == b"hello"


def test_other_labs_and_other_names_are_refused(authority, installed):
    one = installed(authority, "compute1")
    stranger = installed(Authority(), "compute1")
    with pytest.raises(ssl.SSLError):
        handshake(stranger, one)
    with pytest.raises(ssl.SSLError):
        handshake(one, one, server_name="compute2")


def test_expired_certificates_can_be_made(authority, installed):
    expired = installed(authority, "compute1", valid=datetime.timedelta(minutes=-1))
    with pytest.raises(ssl.SSLError, match="expired"):
        handshake(expired, installed(authority, "compute2"))
