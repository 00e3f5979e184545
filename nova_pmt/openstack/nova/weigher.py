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

"""Which of the hosts that could hold a standby is best.

``nova.conf`` of the scheduler::

    [filter_scheduler]
    weight_classes = nova.scheduler.weights.all_weighers
    weight_classes = nova_pmt.openstack.nova.weigher.PMTSpreadWeigher
"""

from __future__ import annotations

from typing import Any

from nova.scheduler import weights

from nova_pmt.openstack import policy
from nova_pmt.openstack.nova.stats import HostStats

#: Other weighers are of 1 each: this one comes first for standbys, and has no say else.
MULTIPLIER = 10.0
#: So many Mbit/s count as one standby less.
_MBIT_PER_STANDBY = 100_000.0


class PMTSpreadWeigher(weights.BaseHostWeigher):
    """Few standbys first, so that one host's death makes few wait; then the fast network."""

    def weight_multiplier(self, host_state: Any) -> float:
        """See Nova."""
        return MULTIPLIER

    def _weigh_object(self, host_state: Any, weight_properties: Any) -> float:
        if not weight_properties.get_scheduler_hint(policy.HINT):
            return 0.0
        stats = HostStats.read(host_state.stats)
        speed = min(stats.replication_mbit / _MBIT_PER_STANDBY, 0.999)
        return speed - stats.standbys
