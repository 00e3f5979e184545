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

"""Options of group ``[manager]``. Its database is oslo.db's group ``[database]``."""

from oslo_config import cfg

GROUP = cfg.OptGroup("manager", title="nova-pmt-manager")
OPTS = [
    cfg.BoolOpt(
        "enabled",
        default=False,
        help="""
Whether this deployment has managers: agents tell them how their pairs are. Set it on every compute
host, together with ``[arbiter] driver = manager``.
""",
    ),
    cfg.IntOpt(
        "call_timeout_s",
        default=2,
        min=1,
        help="""
How long a manager may take to answer, in seconds. A side that has to know who goes on asks again,
as a rule another manager.
""",
    ),
    cfg.FloatOpt(
        "heartbeat_interval_s",
        default=2.0,
        min=0.2,
        help="An agent tells the managers of itself at least this often, in seconds.",
    ),
    cfg.FloatOpt(
        "host_timeout_s",
        default=15.0,
        min=1.0,
        help="""
A host whose agent says nothing for so long is taken for dead, in seconds: standbys are made
elsewhere then. It moves no guest: the two sides of a pair see for themselves whether they live.

Must be more than twice ``heartbeat_interval_s``.
""",
    ),
    cfg.FloatOpt(
        "repair_interval_s",
        default=2.0,
        min=0.2,
        help="How often a manager looks for pairs that have to be protected again, in seconds.",
    ),
    cfg.FloatOpt(
        "repair_backoff_s",
        default=10.0,
        min=1.0,
        help="""
Time after a repair that failed until the next one, in seconds; doubles with each failure, up to
five minutes.
""",
    ),
    cfg.IntOpt(
        "repairs_at_once",
        default=8,
        min=1,
        help="How many pairs one manager protects again at the same time.",
    ),
    cfg.StrOpt(
        "fence",
        default="none",
        help="""
Plug-in (namespace ``nova_pmt.fences``) that turns a primary's host off before its standby may go
on.

Possible values:

* ``none``: nobody is turned off. Safe: a primary that has lost its standby holds its output until
  it has asked, and is destroyed when it is told that it lost.
* ``command``: ``fence_command``. A standby waits for it: that much longer is a failover, also of a
  guest that only died by itself.
""",
    ),
    cfg.StrOpt(
        "fence_command",
        default="",
        help="""
Program, with arguments, that turns off the host whose name follows as last argument; status 0 says
that it is off. It may be called again for a host that is off. Not run by a shell; passwords belong
into a file that it reads.
""",
    ),
    cfg.FloatOpt(
        "fence_timeout_s",
        default=30.0,
        min=1.0,
        help="Time after which ``fence_command`` is ended, and counts as failed, in seconds.",
    ),
    cfg.IntOpt(
        "event_days",
        default=90,
        min=1,
        help="Lines of the audit trail are kept for so many days.",
    ),
]
