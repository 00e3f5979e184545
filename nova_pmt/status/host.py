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

"""What a compute host needs: kernel, QEMU, libvirt, memory for standbys, certificates."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from nova_pmt import exception
from nova_pmt.conf import opts
from nova_pmt.guest import checks
from nova_pmt.guest.network import tapredirect
from nova_pmt.guest.uffd import UffdTracker
from nova_pmt.status.finding import Finding, bad, doubt, failed, good

MIN_LIBVIRT, MIN_QEMU = 8_000_000, 6_002_000
EXPIRES_SOON = datetime.timedelta(days=30)
_PROGRAMS = ("qemu-img", "qemu-storage-daemon", "setpriv", "ip", "tc")
_BACKING = re.compile(r'^\s*memory_backing_dir\s*=\s*"([^"]*)"', re.MULTILINE)
_TIMEOUT_S = 10


def is_compute_host() -> bool:
    """Whether guests can run here: it has a libvirt that drives QEMU."""
    return any(shutil.which(name, path=_path()) for name in ("virtqemud", "libvirtd"))


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def kernel(
    check: Callable[[], None] = UffdTracker.check,
    missing: Callable[[], str] = tapredirect.missing_feature,
) -> Iterator[Finding]:
    """Can writes to a guest's memory be followed, and packets of NICs with vhost be held?"""
    try:
        check()
        yield good(f"Linux {os.uname().release}")
    except exception.PmtError as error:
        yield failed(error)
    if why := missing():
        yield doubt(
            f"servers whose NICs use vhost cannot be protected: {why}. The driver turns vhost off "
            "for servers that may be protected, from their next start on; or use a kernel with "
            "sch_plug, sch_prio, sch_ingress, cls_matchall, act_mirred and ifb."
        )


def hypervisor(uri: str) -> Iterator[Finding]:
    """libvirt answers; it and QEMU are new enough; all programs are there."""
    for name in _PROGRAMS:
        if shutil.which(name, path=_path()) is None:
            yield bad(f"there is no program {name}: see bindep.txt for its package.")
    if (qemu_img := shutil.which("qemu-img", path=_path())) and not _logs_writes(qemu_img):
        yield bad("QEMU has no block driver blklogwrites: servers with disks are refused.")
    try:
        from nova_pmt.guest import domain  # it needs libvirt's Python module
    except ImportError as error:
        yield bad(f"libvirt's Python module is missing: {error}")
        return
    try:
        connection = domain.connect(uri)
    except exception.PmtError as error:
        yield failed(error)
        return
    try:
        yield from versions(connection.getLibVersion(), connection.getVersion())
    finally:
        connection.close()


def _logs_writes(qemu_img: str) -> bool:
    try:
        done = subprocess.run(
            [qemu_img, "--help"], check=False, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "blklogwrites" in done.stdout


def versions(libvirt: int, qemu: int) -> Iterator[Finding]:
    """Both as libvirt counts: 7002009 is 7.2.9."""
    if libvirt < MIN_LIBVIRT:
        yield bad(f"libvirt is {_dotted(libvirt)}, and 8.0.0 is needed.")
    if qemu < MIN_QEMU:
        yield bad(f"QEMU is {_dotted(qemu)}, and 6.2.0 is needed.")
    elif qemu < 7_002_009 or 8_000_000 <= qemu < 8_001_005 or qemu == 8_002_000:
        yield doubt(
            f"QEMU {_dotted(qemu)} logs zeros wrongly that are written beside other data: the "
            "standby notices, and the pair synchronises again each time. Fixed in 7.2.9, 8.1.5 and "
            "8.2.1."
        )
    yield good(f"libvirt {_dotted(libvirt)}, QEMU {_dotted(qemu)}")


def _dotted(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def memory(directory: str, qemu_conf: Path = Path("/etc/libvirt/qemu.conf")) -> Iterator[Finding]:
    """Standbys' memory lies in memory, where libvirt makes it."""
    for refusal in checks.standby_memory(directory, 0):
        yield failed(refusal)
    try:
        found = _BACKING.findall(qemu_conf.read_text())
    except OSError as error:
        yield doubt(f"what libvirt's memory_backing_dir is cannot be seen: {error}.")
        return
    theirs = found[-1] if found else "/var/lib/libvirt/qemu/ram"
    if theirs.rstrip("/") != directory.rstrip("/"):
        yield bad(
            f"libvirt makes memory in {theirs} ({qemu_conf}), and [guest] memory_backing_dir is "
            f"{directory}: they must be the same."
        )
    status = os.statvfs(_existing(directory))
    yield good(f"{directory}, {status.f_bavail * status.f_frsize >> 20} MiB free")


def _existing(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def certificates(conf: Any, now: datetime.datetime | None = None) -> Iterator[Finding]:
    """They are there, fit together, name this host, and are valid for some time."""
    tls, now = conf.tls, now or datetime.datetime.now(datetime.timezone.utc)
    if tls.insecure:
        yield doubt("[tls] insecure is set: guests' memory crosses the network in the clear.")
        return
    try:
        own = x509.load_pem_x509_certificate(Path(tls.cert_file).read_bytes())
        authority = x509.load_pem_x509_certificate(Path(tls.ca_file).read_bytes())
        mode = stat.S_IMODE(os.stat(tls.key_file).st_mode)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ValueError) as error:
        yield bad(f"[tls] ca_file, cert_file and key_file cannot be used: {error}")
        return
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield bad(f"{tls.key_file} can be read by others: chmod 600 {tls.key_file}")
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        yield bad(f"{tls.cert_file} is not of the authority in {tls.ca_file}.")
    host = opts.host_name(conf)
    if host.lower() not in (names := _names(own)):
        yield bad(f"{tls.cert_file} names {', '.join(names) or 'no host'}, and this is {host}.")
    for path, certificate in ((tls.cert_file, own), (tls.ca_file, authority)):
        yield from _validity(path, certificate, now)


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [name.lower() for name in found.value.get_values_for_type(x509.DNSName)]


def _validity(
    path: str, certificate: x509.Certificate, now: datetime.datetime
) -> Iterator[Finding]:
    begins, ends = _moment(certificate, "not_valid_before"), _moment(certificate, "not_valid_after")
    if now >= ends:
        yield bad(f"{path} ended on {ends:%Y-%m-%d}: no server can be protected from here.")
    elif now < begins:
        yield bad(f"{path} is valid from {begins:%Y-%m-%d %H:%M} UTC on: is the clock right?")
    elif now + EXPIRES_SOON >= ends:
        yield doubt(f"{path} ends on {ends:%Y-%m-%d}, in {(ends - now).days} days: renew it.")
    else:
        yield good(f"{path} is valid until {ends:%Y-%m-%d}")


def _moment(certificate: x509.Certificate, name: str) -> datetime.datetime:
    aware = getattr(certificate, f"{name}_utc", None)  # since cryptography 42, which warns then
    found: datetime.datetime = aware or getattr(certificate, name)
    return found.replace(tzinfo=datetime.timezone.utc)
