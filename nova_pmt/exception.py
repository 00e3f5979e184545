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

"""The one tree of errors: who is at fault, a stable code, a message and its cure.

The code is what the command line, the RPC and the notifications share; messages
may change between releases, codes may not.
"""

from __future__ import annotations

from typing import Any


class PmtError(Exception):
    """Base of everything that nova_pmt raises on purpose.

    :param message: what happened, for the operator.
    :param cure: what the operator can do about it.
    :param code: stable identifier; the class brings a default.
    :param details: facts for programs (JSON serialisable).
    """

    code = "ERROR"
    cure = "Look at the log of nova-pmt-agent on that host."

    def __init__(
        self,
        message: str,
        *,
        cure: str | None = None,
        code: str | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        if cure is not None:
            self.cure = cure
        if code is not None:
            self.code = code
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} [{self.code}] Cure: {self.cure}"

    def to_dict(self) -> dict[str, Any]:
        """The error as it crosses RPC, worker sockets and notifications."""
        return {
            "code": self.code,
            "message": self.message,
            "cure": self.cure,
            "details": self.details,
        }


def from_dict(data: dict[str, Any]) -> PmtError:
    """Make the error again that :meth:`PmtError.to_dict` described."""
    code = str(data.get("code", "ERROR"))
    kind = _BY_CODE.get(code, PmtError)
    details = data.get("details")
    error = kind(
        str(data.get("message", "no message")),
        cure=str(data.get("cure", PmtError.cure)),
        code=code,
    )
    error.details = details if isinstance(details, dict) else {}
    return error


class Refusal(PmtError):
    """Protection (or an operation) is refused before anything was changed."""

    code = "REFUSED"


class UnknownDomain(Refusal):
    code = "UNKNOWN_DOMAIN"
    cure = "Check the UUID or name with 'virsh list --all' on the host that you named."


class InvalidInput(Refusal):
    code = "INVALID_INPUT"
    cure = "Correct the value that the message names."


class NotReady(Refusal):
    code = "NOT_READY"
    cure = "Wait until 'nova-pmt status' shows 'protected', then try again."


class WrongHost(Refusal):
    code = "WRONG_HOST"
    cure = "Send the command to the primary's host with --host."


class PrimaryHealthy(Refusal):
    code = "PRIMARY_HEALTHY"
    cure = (
        "Move the server in an orderly way with 'nova-pmt failover --host' and the primary's "
        "host; add --force only when that host must be given up."
    )


class DuplicateDomain(Refusal):
    code = "DUPLICATE_DOMAIN"
    cure = "Find out which of the two copies is the right one, and end the other with virsh."


class NotRunning(Refusal):
    code = "NOT_RUNNING"
    cure = "Start the domain, then protect it."


class AlreadyProtected(Refusal):
    code = "ALREADY_PROTECTED"
    cure = "Use 'nova-pmt status', or 'nova-pmt unprotect' first to change the standby."


class NotProtected(Refusal):
    code = "NOT_PROTECTED"
    cure = "Use 'nova-pmt list' to see what each host protects."


class SameHost(Refusal):
    code = "SAME_HOST"
    cure = "Choose a standby host other than the one the domain runs on."


class HostUnreachable(Refusal):
    code = "HOST_UNREACHABLE"
    cure = "Check that nova-pmt-agent runs on that host and reaches the message bus."


class UnknownHost(Refusal):
    code = "UNKNOWN_HOST"
    cure = "Use 'nova-pmt hosts' to see which hosts there are."


class NoStandbyHost(Refusal):
    code = "NO_STANDBY_HOST"
    cure = "Bring a host back, or add one; the server is protected again as soon as one fits."


class TooLittleMemory(Refusal):
    code = "TOO_LITTLE_MEMORY"
    cure = "Choose a standby host with more free memory, or enlarge its memory_backing_dir."


class UnsupportedKernel(Refusal):
    code = "UNSUPPORTED_KERNEL"
    cure = "The default tracker needs Linux 6.7 or newer (userfaultfd WP_ASYNC, PAGEMAP_SCAN)."


class UnsupportedQemu(Refusal):
    code = "UNSUPPORTED_QEMU"
    cure = "Use QEMU 6.2 or newer with the commands and capabilities that the message names."


class UnsupportedDevice(Refusal):
    code = "UNSUPPORTED_DEVICE"
    cure = "Remove the device from the server, or leave the server unprotected."


class UnsupportedMemory(Refusal):
    code = "UNSUPPORTED_MEMORY"
    cure = "Back the guest with 4 KiB or 2 MiB pages and without hot-plugged memory."


class DiskNotReplicated(Refusal):
    code = "DISK_NOT_REPLICATED"
    cure = "Use BIOS instead of UEFI variables in a file, or leave the server unprotected."


class UnsupportedDisk(Refusal):
    code = "UNSUPPORTED_DISK"
    cure = "Put the disk on a qcow2 or raw file on the host's own file system, or detach it."


class SharedStorage(Refusal):
    code = "SHARED_STORAGE"
    cure = (
        "Only disks on the host's own file system can be protected in this release; move the "
        "server to local disks, or leave it unprotected."
    )


class ImageExists(Refusal):
    code = "IMAGE_EXISTS"
    cure = "Move the file away, or choose another standby host; nova_pmt overwrites no stranger's."


class TooLittleDisk(Refusal):
    code = "TOO_LITTLE_DISK"
    cure = "Choose a standby host with more free space, or free some in the image's directory."


class NoEgressBuffer(Refusal):
    code = "NO_EGRESS_BUFFER"
    cure = (
        "Turn vhost off for the interface (<driver name='qemu'/>), or load the kernel modules "
        "that the message names on the host."
    )


class ArbiterUnavailable(PmtError):
    code = "ARBITER_UNAVAILABLE"
    cure = "Make [arbiter] directory a directory that both hosts mount and may write."


class FencingFailed(ArbiterUnavailable):
    code = "FENCING_FAILED"
    cure = "Turn the host off by hand, or correct [manager] fence_command; the standby asks again."


class DatabaseUnavailable(ArbiterUnavailable):
    code = "DATABASE_UNAVAILABLE"
    cure = "Check [database] connection and the database server; whoever waits goes on by itself."


class NovaUnavailable(PmtError):
    code = "NOVA_UNAVAILABLE"
    cure = "Check Nova, Placement, Neutron and Keystone; the managers ask again by themselves."


class NovaRefused(PmtError):
    code = "NOVA_REFUSED"
    cure = "The message is the service's own; correct what it names. It is tried again by itself."


class PeerError(PmtError):
    """The other side of a pair broke the protocol, or went away."""

    code = "PEER_ERROR"
    cure = "Look at the log of the agent on the peer host."


class PeerLost(PeerError):
    code = "PEER_LOST"
    cure = "Check the peer host and the replication network; protection resumes by itself."


class ProtocolMismatch(PeerError):
    code = "PROTOCOL_MISMATCH"
    cure = "Run releases of nova_pmt that speak the same protocol version on both hosts."


class PairMismatch(PeerError):
    code = "PAIR_MISMATCH"
    cure = "Unprotect the server and protect it again; the peer serves another pair or generation."


class CheckpointCorrupt(PeerError):
    code = "CHECKPOINT_CORRUPT"
    cure = "Check memory and network hardware; the checkpoint was thrown away whole."


class CertificateError(PeerError):
    code = "CERTIFICATE_REFUSED"
    cure = (
        "Check [tls] ca_file, cert_file and key_file on both hosts: one CA must have signed "
        "both certificates, and each must name its host."
    )


class GuestError(PmtError):
    """QEMU or libvirt refused or failed something about this guest."""

    code = "GUEST_ERROR"
    cure = "Look at the log of QEMU and of libvirtd for this domain."


class GuestGone(GuestError):
    code = "GUEST_GONE"
    cure = "The guest's QEMU ended; look at its log to learn why."


class InjectionRefused(GuestError):
    code = "INJECTION_REFUSED"
    cure = (
        "The agent must run as root and QEMU must not be traced by a debugger; "
        "'nova-pmt check' tells more."
    )


class DiskLogError(GuestError):
    code = "DISK_LOG_FAILED"
    cure = "Check the space in [disk] log_directory; protection resumes by itself."


class DevicesChanged(GuestError):
    code = "DEVICES_CHANGED"
    cure = "Nothing: the server is protected again, with its new devices, as soon as that can be."


class DiskImageError(PeerError):
    code = "DISK_IMAGE_FAILED"
    cure = "Check space and health of the file system of the standby's images."


class VmstateError(GuestError):
    code = "VMSTATE_UNREADABLE"
    cure = "Report the QEMU version with this message; the stream has a part we do not know."


class WorkerDied(PmtError):
    code = "WORKER_DIED"
    cure = "The guest runs on unprotected; protection resumes by itself. See the worker's log."


class ConfigError(PmtError):
    code = "CONFIG_ERROR"
    cure = "Correct the option in nova-pmt.conf and restart nova-pmt-agent."


class NovaMissing(PmtError):
    code = "NOVA_MISSING"
    cure = "Run it with a Python that has Nova: pip install nova==34.0.0 'SQLAlchemy<2.1'."


class LabError(PmtError):
    code = "LAB_ERROR"
    cure = "Run 'nova-pmt-lab down', then try again; logs are in the lab's directory."


def _tree(kind: type[PmtError]) -> dict[str, type[PmtError]]:
    found = {kind.code: kind}
    for sub in kind.__subclasses__():
        found.update(_tree(sub))
    return found


_BY_CODE = _tree(PmtError)
