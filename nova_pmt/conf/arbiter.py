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

"""Options of group ``[arbiter]``."""

from oslo_config import cfg

GROUP = cfg.OptGroup("arbiter", title="Who may go on when a pair breaks apart")
OPTS = [
    cfg.StrOpt(
        "driver",
        default="file",
        help="""
Plug-in (namespace ``nova_pmt.arbiters``) that decides which side of a pair goes on.

Possible values:

* ``file``: a directory that all hosts share.
* ``manager``: nova-pmt-manager, asked over the message bus.
""",
    ),
    cfg.StrOpt(
        "directory",
        default="/var/lib/nova_pmt/arbiter",
        help="""
Directory of the ``file`` arbiter. All compute hosts must see the same one (for instance a small
NFS export); 'nova-pmt check' and 'nova-pmt protect' verify that they do. A side that can reach
neither its peer nor this directory does not go on.
""",
    ),
    cfg.StrOpt(
        "on_isolation",
        default="hold",
        choices=[
            ("hold", "the guest stands still and its output is held, until the arbiter answers"),
            (
                "release",
                "the guest goes on alone: ONLY where another system makes sure that its "
                "standby does not, such as [manager] fence",
            ),
        ],
        help="""
What a primary does that has lost its standby and cannot reach the arbiter. Its standby may be going
on at that very time.
""",
    ),
]
