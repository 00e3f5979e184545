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

"""Options of group ``[disk]``."""

from oslo_config import cfg

GROUP = cfg.OptGroup("disk", title="Replication of disks")
OPTS = [
    cfg.StrOpt(
        "log_directory",
        default="$guest.runtime_directory/guests",
        help="""
Directory on tmpfs in which each protected guest gets a directory for the logs of its disks' writes.
""",
    ),
    cfg.IntOpt(
        "log_limit_mib",
        default=256,
        min=16,
        help="""
Most that the logs of one guest's disks may hold, in MiB, before a checkpoint must have carried them
to the standby. At half of it the next checkpoint is taken at once; at nine tenths the guest waits
for the checkpoints that are under way.
""",
    ),
    cfg.IntOpt(
        "copy_limit_mib_s",
        default=0,
        min=0,
        help="Most that the first copy of disks may send, in MiB per second. 0: no limit.",
    ),
]
