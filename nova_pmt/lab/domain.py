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

"""What a lab guest is made of, and its libvirt domain XML."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from nova_pmt.lab.libvirtd import MONITORS

#: Where each host keeps its copy of the guest's kernel and initramfs.
BOOT = "/var/lib/libvirt/boot"
CONSOLES = "/var/log/libvirt/qemu"
#: For a guest that is emulated: retpolines, self-tests and security modules cost a second of its
#: boot, and the watchdog of the clock takes a busy host for a broken time stamp counter.
QUICK = (
    "quiet mitigations=off cryptomgr.notests tsc=reliable no_timer_check lsm= audit=0"
    " init_on_alloc=0 rcupdate.rcu_expedited=1"
)
#: QEMU 7.2 clears a whole jump cache for each translated block that it drops. After a reset the new
#: kernel overwrites the old one: that takes six seconds with the default cache, one with this.
_TCG = "<tcg><tb-cache unit='MiB'>16</tb-cache></tcg>"
_PREFIXES = {"virtio": "vd", "scsi": "sd"}
_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


@dataclass(frozen=True)
class Workload:
    """What the guest's program does from its start on; the control server changes it later."""

    tick_ms: int = 10
    console_every: int = 10  # ticks per TICK line on the console; 0: none
    dirty_pages: int = 0  # pages rewritten every dirty_ms; 0: idle
    dirty_ms: int = 20
    dirty_full: bool = False  # rewrite all 4096 bytes of a page, not 8
    dirty_once: int = 0  # pages rewritten once, before READY
    buffer_mib: int = 32  # the pages are spread over so much memory

    def kernel_arguments(self) -> str:
        """As the kernel hands them to init: in its environment."""
        return " ".join(f"{name}={int(value)}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Disk:
    """A disk; made empty at the first boot if its file is not there.

    The guest calls virtio disks vda, vdb, ... and SCSI disks, which are all on one virtio-scsi
    controller, sda, sdb, ..., each in the order of :attr:`GuestSpec.disks`.
    """

    path: str  # inside the host
    size_mib: int = 64
    format: Literal["qcow2", "raw"] = "qcow2"
    bus: Literal["virtio", "scsi"] = "virtio"
    readonly: bool = False
    discard: Literal["unmap", "ignore"] = "unmap"  # what QEMU does when the guest discards


@dataclass(frozen=True)
class GuestSpec:
    """A guest of the lab. Two specs of one name have the same MAC, but each its own UUID."""

    name: str
    memory_mib: int = 128
    vcpus: int = 1
    machine: Literal["q35", "pc"] = "q35"
    shared_memory: bool = True  # memfd; False: private anonymous RAM, as plain libvirt makes it
    nic: bool = True
    ip: str = "10.77.2.100"  # on the lab's data network
    extra_nics: int = 0  # eth1, ...: on the same network, up, without address
    second_monitor: bool = True  # QMP socket of its own, for us alone; see monitor_path
    persistent: bool = False  # defined, as Nova does it, and not only created
    vga: bool = False
    disks: tuple[Disk, ...] = ()
    workload: Workload = Workload()
    kernel_arguments: str = ""  # added to ours, at the end
    accel: Literal["tcg", "kvm"] = "tcg"  # the lab sets it, and the next one
    mtu: int | None = None  # bytes, at most network.JUMBO; None: the lab's
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def mac(self) -> str:
        """Of eth0; derived from the name, so that the guest keeps it on every host."""
        return self.macs[0]

    @property
    def macs(self) -> tuple[str, ...]:
        """Of eth0, eth1, ..."""
        seeds = [self.name, *(f"{self.name}/{number + 1}" for number in range(self.extra_nics))]
        digests = (hashlib.sha256(seed.encode()).digest() for seed in seeds)
        return tuple("52:54:00:" + digest[:3].hex(":") for digest in digests)

    @property
    def disk_names(self) -> tuple[str, ...]:
        """The guest's names of its disks, in the order of ``disks``."""
        names: dict[str, int] = {"virtio": 0, "scsi": 0}
        found = []
        for disk in self.disks:
            found.append(f"{_PREFIXES[disk.bus]}{ascii_lowercase[names[disk.bus]]}")
            names[disk.bus] += 1
        return tuple(found)

    @property
    def monitor_path(self) -> str:
        """The second monitor's socket, inside the host."""
        return f"{MONITORS}/{self.uuid}.sock"

    @property
    def console_path(self) -> str:
        """The serial console's file, inside the host. It grows over all boots."""
        return f"{CONSOLES}/{self.name}-console.log"


def domain_xml(spec: GuestSpec) -> str:
    """The libvirt domain of ``spec``; the same on each host of the lab."""
    arguments = f"console=ttyS0 {QUICK} {spec.workload.kernel_arguments()}"
    if spec.nic:
        arguments += f" guest_ip={spec.ip}/24"
    scsi_disks = sum(disk.bus == "scsi" for disk in spec.disks)
    if scsi_disks:
        arguments += f" scsi_disks={scsi_disks}"  # the guest loads its modules only then
    if spec.kernel_arguments:
        arguments += f" {spec.kernel_arguments}"
    parts = [
        f"<domain type='{'kvm' if spec.accel == 'kvm' else 'qemu'}'"
        + (f" xmlns:qemu={quoteattr(_QEMU_NAMESPACE)}>" if spec.second_monitor else ">"),
        f"<name>{escape(spec.name)}</name>",
        f"<uuid>{spec.uuid}</uuid>",
        f"<memory unit='MiB'>{spec.memory_mib}</memory>",
        "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
        if spec.shared_memory
        else "",
        f"<vcpu>{spec.vcpus}</vcpu>",
        f"<os><type arch='x86_64' machine='{spec.machine}'>hvm</type>"
        f"<kernel>{BOOT}/vmlinuz</kernel><initrd>{BOOT}/initrd.img</initrd>"
        f"<cmdline>{escape(arguments)}</cmdline></os>",
        # Without ACPI and APIC a pc guest neither resets properly nor has a second vCPU.
        f"<features><acpi/><apic/>{_TCG if spec.accel == 'tcg' else ''}</features>",
        "<on_reboot>restart</on_reboot><on_crash>destroy</on_crash>",
        "<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>",
        *(_disk(disk, name) for disk, name in zip(spec.disks, spec.disk_names, strict=True)),
        "<controller type='scsi' index='0' model='virtio-scsi'/>" if scsi_disks else "",
        *(_nic(spec, mac) for mac in (spec.macs if spec.nic else ())),
        f"<serial type='file'><source path={quoteattr(spec.console_path)} append='on'/></serial>",
        "<controller type='usb' model='none'/><memballoon model='none'/>",
        f"<video><model type='{'vga' if spec.vga else 'none'}'/></video>",
        "</devices>",
        _monitor(spec) if spec.second_monitor else "",
        "</domain>",
    ]
    return "\n".join(part for part in parts if part)


def _nic(spec: GuestSpec, mac: str) -> str:
    return (
        f"<interface type='bridge'><mac address='{mac}'/><source bridge='br-data'/>"
        f"<model type='virtio'/><mtu size='{spec.mtu or 1500}'/></interface>"
    )


def _disk(disk: Disk, name: str) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{disk.format}' cache='none'"
        f" discard='{disk.discard}'/><source file={quoteattr(disk.path)}/>"
        f"<target dev='{name}' bus='{disk.bus}'/>{'<readonly/>' if disk.readonly else ''}</disk>"
    )


def _monitor(spec: GuestSpec) -> str:
    return (
        "<qemu:commandline><qemu:arg value='-qmp'/>"
        f"<qemu:arg value='unix:{spec.monitor_path},server=on,wait=off'/></qemu:commandline>"
    )
