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

"""Options of group ``[guest]``."""

from oslo_config import cfg

GROUP = cfg.OptGroup("guest", title="QEMU and libvirt on this host")
OPTS = [
    cfg.StrOpt(
        "libvirt_uri", default="qemu:///system", help="Connection URI of this host's libvirt."
    ),
    cfg.StrOpt(
        "qemu_user",
        default="libvirt-qemu",
        help="""
User that libvirt runs QEMU as: ``user`` of /etc/libvirt/qemu.conf (Debian and Ubuntu: libvirt-qemu;
Fedora, RHEL and CentOS: qemu). Owns the directory of the second monitors.
""",
    ),
    cfg.StrOpt(
        "runtime_directory",
        default="/run/nova_pmt",
        help="""
Directory on tmpfs for sockets and device state; each guest gets a directory of its own in it, open
to its QEMU's user only. Its sub-directory ``qmp`` holds the second monitors of domains.
""",
    ),
    cfg.StrOpt(
        "memory_backing_dir",
        default="/var/lib/libvirt/qemu/ram",
        help="""
Directory in which libvirt makes the memory files of standbys: ``memory_backing_dir`` of
/etc/libvirt/qemu.conf. It must be on tmpfs or hugetlbfs; protection is refused elsewhere.
""",
    ),
]
