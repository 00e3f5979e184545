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

"""Compute hosts, a message bus and small guests on one machine, for tests, demo and evaluation.

::

    from nova_pmt.lab import GuestSpec, Lab, Workload

    with Lab(computes=2, rabbit=False) as lab:          # root; all is gone at the end
        one, two = lab.computes                         # lab.host("compute1"), lab.ctl
        guest = one.boot(GuestSpec("g1", memory_mib=128, vcpus=1, machine="q35"))
        # further: disks=(Disk("/var/lib/libvirt/images/a.qcow2"), Disk(..., bus="scsi")),
        # extra_nics=1, mtu=9000
        guest.wait_ready()                              # READY on the console, answers over TCP
        guest.control("dirty 1500 20")                  # 1,500 pages every 20 ms, told over TCP
        guest.counter(); guest.boot_id(); guest.verify(); guest.reboot(); guest.console()
        guest.connect()                                 # TCP to the echo server, from ctl
        guest.control("disk write rand 4 1000 vda")     # what else there is: LabGuest.control
        with guest.transactions(1) as client: ...       # .request(), .answered; transactions.py
        with capture(lab.ctl, "data1") as seen: ...     # .take(), .packets(), .lost; traffic.py
        guest.pid, guest.uuid, guest.spec.monitor_path  # QEMU's pid in the root namespace, ...

        with one.libvirt() as connection: ...           # virConnect; or one.libvirt_uri[_inside]
        one.run(["virsh", "list"]).stdout               # inside its namespaces, to the end
        agent = one.spawn("agent", ["nova-pmt-agent"])  # background: .pid .log .stop() .alive()
        one.path("/run/nova_pmt")                       # as seen from here; see also disk_path()
        one.init_pid, one.mgmt_ip, one.repl_ip
        two.dial("10.77.1.11", 5000)                    # a socket that starts in compute2
        two.in_network(lambda: socket.create_server((two.repl_ip, 5000)))

        one.link("repl").down(); one.link("repl").limit(100); one.link("repl").unlimit()
        one.power_off()                                 # silent=True: its peers hear nothing at all
        guest.on(two).wait_ready()                      # the same guest after its failover
        one.power_on()                                  # disk as it was, memory empty, libvirtd up
        lab.transport_url                               # with rabbit=True

Inside each host: certificates in ``/etc/nova_pmt/tls/{ca,cert,key}.pem``; ``/srv/nova_pmt`` is one
directory that all hosts share; ``/run``, ``/tmp`` and ``/dev/shm`` are its own memory. Guests
boot from ``/var/lib/libvirt/boot``; their consoles are ``/var/log/libvirt/qemu/NAME-console.log``.

What does not live here: anything that the product needs on a real compute host.
"""

from nova_pmt.lab.capture import Capture, Packet, capture
from nova_pmt.lab.domain import Disk, GuestSpec, Workload, domain_xml
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.lab import Lab
from nova_pmt.lab.lab_guest import CONTROL_PORT, ECHO_PORT, LabGuest
from nova_pmt.lab.process import LabProcess
from nova_pmt.lab.view import SHARED

__all__ = [
    "CONTROL_PORT",
    "ECHO_PORT",
    "SHARED",
    "Capture",
    "Disk",
    "GuestSpec",
    "Lab",
    "LabGuest",
    "LabHost",
    "LabProcess",
    "Packet",
    "Workload",
    "capture",
    "domain_xml",
]
