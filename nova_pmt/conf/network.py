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

"""Options of group ``[network]``."""

from oslo_config import cfg

GROUP = cfg.OptGroup("network", title="Output commit of network packets")
OPTS = [
    cfg.StrOpt(
        "egress_buffer",
        default="auto",
        help="""
Plug-in (namespace ``nova_pmt.egress_buffers``) that holds what guests send until it is committed.
``auto`` chooses for each interface: ``redirector`` (in QEMU) without vhost, ``plug`` (in the
kernel) with it.
""",
    ),
    cfg.IntOpt(
        "buffer_limit_mib",
        default=64,
        min=1,
        help="""
Most that is held of one interface, in MiB. At half of it the next checkpoint is taken at once; what
the guest sends beyond it is dropped, as a full switch would.
""",
    ),
]
