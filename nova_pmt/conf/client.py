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

"""Options of group ``[client]``: the ``nova-pmt`` command."""

from oslo_config import cfg

GROUP = cfg.OptGroup("client", title="The nova-pmt command")
OPTS = [
    cfg.ListOpt(
        "hosts",
        default=[],
        help="Compute hosts to ask: 'list', 'status' and 'top', and where a domain is searched.",
    ),
    cfg.IntOpt(
        "timeout_s", default=10, min=1, help="How long an agent may take to answer, in seconds."
    ),
]
