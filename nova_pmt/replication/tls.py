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

"""TLS 1.3 with certificates on both sides; each side's name is checked against the pair."""

from __future__ import annotations

import socket
import ssl
from typing import Any

from nova_pmt import exception


def _context(conf: Any, purpose: int) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET
    try:
        context.load_verify_locations(conf.tls.ca_file)
        context.load_cert_chain(conf.tls.cert_file, conf.tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise exception.ConfigError(
            f"certificates cannot be loaded ([tls] ca_file, cert_file, key_file): {error}"
        ) from error
    return context


def refused(error: OSError, peer: str) -> exception.PeerError:
    """The typed error for what a TLS or plain socket raised."""
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        return exception.CertificateError(f"TLS with {peer} failed: {reason}")
    return exception.PeerLost(f"connection with {peer} failed: {error}")


def broken(error: OSError, peer: str) -> exception.PeerLost:
    """The typed error for an established connection that failed."""
    if isinstance(error, ssl.SSLError) and error.reason:
        what = error.reason.replace("_", " ").lower()
        return exception.PeerLost(
            f"connection with {peer} failed: TLS says '{what}'",
            cure="Data was changed on its way: check the replication network.",
        )
    return exception.PeerLost(f"connection with {peer} failed: {error}")


def connect(conf: Any, sock: socket.socket, standby_host: str) -> socket.socket:
    """Client side, on a connected blocking socket with a timeout.

    :raises nova_pmt.exception.CertificateError: not the host it should be, or we are refused.
    """
    if conf.tls.insecure:
        return sock
    context = _context(conf, ssl.PROTOCOL_TLS_CLIENT)
    try:
        return context.wrap_socket(sock, server_hostname=standby_host)
    except OSError as error:
        raise refused(error, standby_host) from error


def accept(conf: Any, sock: socket.socket, primary_host: str) -> socket.socket:
    """Server side, on an accepted blocking socket with a timeout.

    :raises nova_pmt.exception.CertificateError: the client's certificate is not good, or
        not that of ``primary_host``.
    """
    if conf.tls.insecure:
        return sock
    context = _context(conf, ssl.PROTOCOL_TLS_SERVER)
    try:
        secure = context.wrap_socket(sock, server_side=True)
    except OSError as error:
        raise refused(error, primary_host) from error
    certificate: dict[str, Any] = dict(secure.getpeercert() or {})
    names = {
        value.lower() for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"
    }
    if primary_host.lower() not in names:
        secure.close()
        raise exception.CertificateError(
            f"client's certificate names {sorted(names)}, not the primary's host {primary_host}"
        )
    return secure
