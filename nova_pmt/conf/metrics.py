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

"""Options of group ``[metrics]``: figures for Prometheus, and whether a service is well."""

from oslo_config import cfg

GROUP = cfg.OptGroup("metrics", title="Figures for Prometheus, and health, over HTTP")
OPTS = [
    cfg.PortOpt(
        "agent_port",
        default=0,
        help="""
TCP port on which nova-pmt-agent serves ``/metrics`` and ``/healthz``. 0: none is opened.
""",
    ),
    cfg.PortOpt(
        "manager_port",
        default=0,
        help="The same of nova-pmt-manager; managers on one machine need one each.",
    ),
    cfg.HostAddressOpt(
        "listen_address",
        default="127.0.0.1",
        help="""
Address that they are served on. There is no password: names and UUIDs of servers are told to
whoever can connect.
""",
    ),
]
