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

"""Options of ``[DEFAULT]`` and of group ``[agent]``."""

from oslo_config import cfg

DEFAULT_OPTS = [
    cfg.HostAddressOpt(
        "my_ip",
        default="127.0.0.1",
        help="Address of this host for its peers, unless said otherwise.",
    ),
    cfg.StrOpt(
        "host",
        default=None,
        help="""
Name of this host: as in ``nova-compute``'s option of the same name, and as in its certificate.
Default: the machine's host name.
""",
    ),
    cfg.StrOpt(
        "state_path",
        default="/var/lib/nova_pmt",
        help="Directory for what must survive a restart of the agent or the host.",
    ),
]
GROUP = cfg.OptGroup("agent", title="nova-pmt-agent")
OPTS = [
    cfg.BoolOpt(
        "resync",
        default=True,
        help="Protect again, with the same standby host, a guest whose protection broke.",
    ),
    cfg.IntOpt(
        "resync_interval_s",
        default=5,
        min=1,
        help="""
Time between two attempts to protect again, in seconds; doubles with each failure, up to five
minutes.
""",
    ),
    cfg.IntOpt(
        "worker_start_timeout_s",
        default=30,
        min=1,
        help="A worker that is not ready after this time, in seconds, is ended.",
    ),
]
