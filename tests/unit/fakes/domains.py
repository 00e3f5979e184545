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

"""Domains as libvirt 9.0 describes them: plain ones, and Nova's."""

from __future__ import annotations

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"

#: As defined by hand with virsh; memory is private; it runs (libvirt added what is live).
PLAIN = f"""\
<domain type='kvm' id='3'>
  <name>plain</name>
  <uuid>{UUID}</uuid>
  <memory unit='KiB'>131072</memory>
  <currentMemory unit='KiB'>131072</currentMemory>
  <vcpu placement='static'>1</vcpu>
  <resource>
    <partition>/machine</partition>
  </resource>
  <os>
    <type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>
    <kernel>/srv/vmlinuz</kernel>
    <boot dev='hd'/>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu mode='custom' match='exact' check='full'>
    <model fallback='forbid'>Broadwell</model>
  </cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='/srv/cd.iso' index='1'/>
      <backingStore/>
      <target dev='hda' bus='ide'/>
      <readonly/>
      <alias name='ide0-0-0'/>
    </disk>
    <interface type='bridge'>
      <mac address='52:54:00:12:34:56'/>
      <source bridge='br0'/>
      <target dev='vnet7'/>
      <model type='virtio'/>
      <alias name='net0'/>
    </interface>
    <serial type='pty'>
      <source path='/dev/pts/4'/>
      <target type='isa-serial' port='0'>
        <model name='isa-serial'/>
      </target>
      <alias name='serial0'/>
    </serial>
    <console type='pty' tty='/dev/pts/4'>
      <source path='/dev/pts/4'/>
      <target type='serial' port='0'/>
      <alias name='serial0'/>
    </console>
    <graphics type='vnc' port='5903' autoport='yes' listen='192.0.2.10'>
      <listen type='address' address='192.0.2.10'/>
    </graphics>
    <video>
      <model type='cirrus' vram='16384' heads='1' primary='yes'/>
    </video>
    <memballoon model='none'/>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'>
    <label>+64055:+104</label>
    <imagelabel>+64055:+104</imagelabel>
  </seclabel>
</domain>
"""

MEMFD = PLAIN.replace(
    "  <vcpu placement",
    """  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
    <locked/>
  </memoryBacking>
  <vcpu placement""",
)

HUGEPAGES = PLAIN.replace(
    "  <vcpu placement",
    """  <memoryBacking>
    <hugepages>
      <page size='2048' unit='KiB'/>
    </hugepages>
    <allocation mode='immediate'/>
    <discard/>
  </memoryBacking>
  <vcpu placement""",
)

NUMA = PLAIN.replace(
    "    <model fallback='forbid'>Broadwell</model>",
    """    <model fallback='forbid'>Broadwell</model>
    <numa>
      <cell id='0' cpus='0' memory='65536' unit='KiB' memAccess='private'/>
      <cell id='1' cpus='1' memory='65536' unit='KiB'/>
    </numa>""",
)

#: Somebody's own arguments and environment, as Nova's never has but operators' do.
FOREIGN = PLAIN.replace(
    "<domain type='kvm' id='3'>",
    "<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>",
).replace(
    "</domain>",
    """  <qemu:commandline>
    <qemu:arg value='-global'/>
    <qemu:arg value='virtio-net-pci.tx=bh'/>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:/run/somebody.sock,server=on,wait=off'/>
    <qemu:env name='MALLOC_PERTURB_' value='1'/>
  </qemu:commandline>
</domain>""",
)

#: As nova-compute 27 (Antelope) makes them, without a disk.
NOVA = PLAIN.replace(
    "  <memory unit",
    """  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:package version="27.1.0"/>
      <nova:name>ft-1</nova:name>
      <nova:flavor name="ft.small">
        <nova:memory>128</nova:memory>
      </nova:flavor>
    </nova:instance>
  </metadata>
  <memory unit""",
).replace("vnet7", "tap0c1f2d3e-45")

SAMPLES = {
    "plain": PLAIN,
    "memfd": MEMFD,
    "hugepages": HUGEPAGES,
    "numa": NUMA,
    "foreign": FOREIGN,
    "nova": NOVA,
}


def with_device(device: str, xml: str = PLAIN) -> str:
    """The domain with one device more."""
    return xml.replace("    <memballoon", f"    {device}\n    <memballoon")
