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

"""Options of group ``[checkpoint]``."""

from oslo_config import cfg

GROUP = cfg.OptGroup("checkpoint", title="The checkpoint loop of a primary")
OPTS = [
    cfg.StrOpt(
        "strategy",
        default="pmt",
        help="""
Plug-in (namespace ``nova_pmt.strategies``) that says when a round starts, and whether the guest
waits for the standby. ``pmt``: at an interval; the transfer goes on while the guest runs.
``auto``: like it, but the interval is chosen after each round by what pauses, output delay and
bytes cost, and without output epochs become long. ``kemari``: with an epoch's first output; the
guest stays paused until the standby has everything.
""",
    ),
    cfg.IntOpt(
        "interval_ms",
        default=50,
        min=5,
        max=10000,
        help="""
Time from the start of one pause to the start of the next, in milliseconds. With ``pmt`` the upper
bound of what a failover takes back from the guest; with output commit, the upper bound of added
latency. With ``auto`` the longest that a packet waits before its epoch ends. ``kemari`` has no use
for it.
""",
    ),
    cfg.IntOpt(
        "epoch_limit_ms",
        default=10000,
        min=50,
        max=60000,
        help="""
Longest time from pause to pause of the strategies that wait for output (``kemari``, ``auto``), in
milliseconds: what a failover takes back, at most, of the work of a guest that has no output.
""",
    ),
    cfg.FloatOpt(
        "max_pause_ms",
        default=0.0,
        min=0.0,
        help="""
Wanted length of the pause, in milliseconds. 0 keeps the interval fixed; otherwise the interval
is shortened or lengthened (between a quarter and four times ``interval_ms``) to hold this pause.
""",
    ),
    cfg.IntOpt(
        "passes",
        default=2,
        min=0,
        max=8,
        help="""
Most pre-copy passes just before each pause: each copies, while the guest runs, what was written
so far, so that little is left to copy in the pause; one that finds little is the last. 0 copies
everything in the pause.
""",
    ),
    cfg.IntOpt(
        "pipeline_depth",
        default=4,
        min=1,
        max=8,
        help="Checkpoints that may be under way to the standby at a time, the newest included.",
    ),
    cfg.IntOpt(
        "cache_limit_mib",
        default=512,
        min=8,
        help="""
Hard limit of the cache of one guest, in MiB. At the limit the next pause is held until a commit
frees memory (``throttle``); a checkpoint that can never fit is sent in parts as it is read.
""",
    ),
    cfg.IntOpt(
        "scan_threads",
        default=0,
        min=0,
        max=64,
        help="Threads that scan the guest's memory. 0: one for each 512 MiB, at most one a CPU.",
    ),
    cfg.StrOpt(
        "memory_tracker",
        default="uffd",
        help="Plug-in (namespace ``nova_pmt.memory_trackers``) for written pages.",
    ),
]
