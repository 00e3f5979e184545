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

"""Who may talk to whom: TLS 1.3, one authority, names of hosts. Refusals have their type."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from nova_pmt import exception
from nova_pmt.replication import tls
from nova_pmt.replication.link import read_frame
from nova_pmt.replication.protocol import Type, pack_json
from tests.unit.fakes.sockets import both, secure_pair, tcp_pair, tls_conf


def test_hosts_of_one_authority_talk_over_tls_1_3(hosts: dict[str, Any]) -> None:
    client, server = secure_pair(hosts["one"], hosts["two"])
    with client, server:
        assert client.version() == server.version() == "TLSv1.3"
        client.sendall(pack_json(Type.BYE, {"reason": "x"}))
        assert read_frame(server)[1] == b'{"reason":"x"}'


def refusal_seen_by_client(result: Any) -> Exception:
    """With TLS 1.3 a client is through before it is judged: it hears of it when it reads."""
    if isinstance(result, Exception):
        return result
    with result, pytest.raises(exception.PeerError) as caught:
        read_frame(result)
    return caught.value


@pytest.mark.parametrize("server", ["foreign-two", "expired-two", "other", "one"])
def test_a_primary_refuses_a_standby_with_a_wrong_certificate(
    hosts: dict[str, Any], server: str
) -> None:
    client, accepted = secure_pair(hosts["one"], hosts[server])
    assert type(client) is exception.CertificateError
    assert client.code == "CERTIFICATE_REFUSED"
    assert "[tls] ca_file" in client.cure
    assert isinstance(accepted, exception.PeerError)


@pytest.mark.parametrize("client", ["foreign-one", "expired-one", "other", "two"])
def test_a_standby_refuses_a_primary_with_a_wrong_certificate(
    hosts: dict[str, Any], client: str
) -> None:
    connected, server = secure_pair(hosts[client], hosts["two"])
    assert type(server) is exception.CertificateError
    assert isinstance(refusal_seen_by_client(connected), exception.PeerError)


def test_an_expired_certificate_is_named_as_that(hosts: dict[str, Any]) -> None:
    client, _ = secure_pair(hosts["one"], hosts["expired-two"])
    assert "expired" in client.message
    _, server = secure_pair(hosts["expired-one"], hosts["two"])
    assert "expired" in server.message


def test_a_wrong_name_is_named(hosts: dict[str, Any]) -> None:
    client, _ = secure_pair(hosts["one"], hosts["other"])
    assert "two" in client.message
    _, server = secure_pair(hosts["other"], hosts["two"])
    assert "other" in server.message and "one" in server.message


def test_names_of_hosts_have_no_case(hosts: dict[str, Any]) -> None:
    client, server = tcp_pair()
    connected, accepted = both(
        lambda: tls.connect(hosts["one"], client, "TWO"),
        lambda: tls.accept(hosts["two"], server, "ONE"),
    )
    connected.close()
    accepted.close()


def raw_client(conf: Any, **changes: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(conf.tls.ca_file)
    for name, value in changes.items():
        setattr(context, name, value)
    return context


def test_a_client_without_a_certificate_is_refused(hosts: dict[str, Any]) -> None:
    client, server = tcp_pair()
    context = raw_client(hosts["one"])
    connected, accepted = both(
        lambda: context.wrap_socket(client, server_hostname="two"),
        lambda: tls.accept(hosts["two"], server, "one"),
    )
    assert type(accepted) is exception.CertificateError
    connected.close()


def test_a_client_that_knows_tls_1_2_only_is_refused(hosts: dict[str, Any]) -> None:
    client, server = tcp_pair()
    context = raw_client(hosts["one"], maximum_version=ssl.TLSVersion.TLSv1_2)
    context.load_cert_chain(hosts["one"].tls.cert_file, hosts["one"].tls.key_file)
    connected, accepted = both(
        lambda: context.wrap_socket(client, server_hostname="two"),
        lambda: tls.accept(hosts["two"], server, "one"),
    )
    assert isinstance(connected, ssl.SSLError)
    assert type(accepted) is exception.CertificateError
    assert "protocol" in accepted.message.lower()


def test_a_server_that_knows_tls_1_2_only_is_refused(hosts: dict[str, Any]) -> None:
    client, server = tcp_pair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(hosts["two"].tls.cert_file, hosts["two"].tls.key_file)
    connected, accepted = both(
        lambda: tls.connect(hosts["one"], client, "two"),
        lambda: context.wrap_socket(server, server_side=True),
    )
    assert type(connected) is exception.CertificateError
    assert isinstance(accepted, OSError)


@pytest.mark.parametrize(
    "first",
    [
        pack_json(Type.HELLO, {"protocol": 1}),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 64,
        b"\x16\x03\x01",
    ],
)
def test_a_client_that_speaks_in_the_clear_is_refused(hosts: dict[str, Any], first: bytes) -> None:
    client, server = tcp_pair()

    def speak() -> None:
        with client:
            client.sendall(first)
            client.shutdown(socket.SHUT_WR)
            client.recv(100)

    _, accepted = both(speak, lambda: tls.accept(hosts["two"], server, "one"))
    assert isinstance(accepted, exception.PeerError)


def test_a_standby_that_speaks_in_the_clear_is_refused(hosts: dict[str, Any]) -> None:
    client, server = tcp_pair()
    connected, _ = both(
        lambda: tls.connect(hosts["one"], client, "two"),
        lambda: server.sendall(pack_json(Type.WELCOME, {"protocol": 1})),
    )
    server.close()
    assert isinstance(connected, exception.PeerError)


def test_a_client_that_does_nothing_is_given_up(hosts: dict[str, Any]) -> None:
    client, server = tcp_pair()
    server.settimeout(0.05)
    with client, pytest.raises(exception.PeerLost):
        tls.accept(hosts["two"], server, "one")


def test_only_the_option_makes_it_insecure(hosts: dict[str, Any], tmp_path: Path) -> None:
    client, server = tcp_pair()
    insecure = tls_conf(tmp_path, insecure=True)
    with client, server:
        assert tls.connect(insecure, client, "two") is client
        assert tls.accept(insecure, server, "one") is server


@pytest.mark.parametrize("missing", ["ca.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize("how", ["absent", "garbage"])
def test_files_that_cannot_be_loaded_are_an_error_of_the_configuration(
    hosts: dict[str, Any], tmp_path: Path, missing: str, how: str
) -> None:
    source = Path(hosts["one"].tls.ca_file).parent
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if how == "absent":
        (tmp_path / missing).unlink()
    else:
        (tmp_path / missing).write_bytes(b"-----BEGIN NONSENSE-----\n")
    client, server = tcp_pair()
    with client, server, pytest.raises(exception.ConfigError, match=r"\[tls\] ca_file"):
        tls.accept(tls_conf(tmp_path), server, "one")


def test_a_broken_connection_is_a_lost_peer_and_not_a_bad_certificate() -> None:
    flipped = ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed")
    flipped.reason = "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
    error = tls.broken(flipped, "two")
    assert type(error) is exception.PeerLost
    assert "bad record mac" in error.message and "changed on its way" in error.cure
    assert "reset" in tls.broken(ConnectionResetError("reset"), "two").message


def _tap(source: socket.socket, target: socket.socket, heard: bytearray) -> None:
    """Pass on, and keep, what comes from one side."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            heard += data
            target.sendall(data)


def test_a_handshake_that_was_recorded_is_of_no_use_again(hosts: dict[str, Any]) -> None:
    """Whoever sits between the hosts hears all that a primary says, and says it to a standby."""
    client, near = tcp_pair()
    far, server = tcp_pair()
    heard, ignored = bytearray(), bytearray()
    for ways in ((near, far, heard), (far, near, ignored)):
        threading.Thread(target=_tap, args=ways, daemon=True).start()
    primary, standby = both(
        lambda: tls.connect(hosts["one"], client, "two"),
        lambda: tls.accept(hosts["two"], server, "one"),
    )
    primary.sendall(pack_json(Type.HELLO, {"pair": "of the generation that is over"}))
    assert read_frame(standby)[0].type is Type.HELLO
    for sock in (primary, standby, near, far):
        sock.close()
    attacker, server = tcp_pair()
    attacker.sendall(heard)
    with attacker, server, pytest.raises(exception.PeerError) as caught:
        tls.accept(hosts["two"], server, "one")
    assert type(caught.value) in (exception.CertificateError, exception.PeerLost)
