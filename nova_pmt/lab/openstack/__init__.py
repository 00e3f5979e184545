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
"""A small OpenStack on the lab: Keystone, Placement, Glance, Neutron with OVN, Nova, and nova_pmt.

::

    from nova_pmt.lab import Lab
    from nova_pmt.lab.openstack import Cloud

    with Lab(computes=3) as lab, Cloud(lab) as cloud:
        cloud.admin.compute.services()                  # openstacksdk, from inside ctl
        server = cloud.boot("web", cloud.flavor("plain"))
        guest = cloud.guest(server)                     # a LabGuest: answers over TCP
        lab.computes[0].power_off(silent=True)
        cloud.power_on(lab.computes[0])                 # with all of its services

All processes are those of a real cloud, from ``.venv-openstack``; there are fewer of them (the
APIs run under waitress, OVN's datapath is in user space), and they ask each other more often.
"""

from nova_pmt.lab.openstack.cloud import Cloud

__all__ = ["Cloud"]
