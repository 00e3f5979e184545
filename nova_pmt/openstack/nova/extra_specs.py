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

"""Extra specs ``ft:*``, as Nova's API checks them from microversion 2.86 on.

Nova loads this module (entry point ``nova.api.extra_spec_validators``) on the hosts of its API.
"""

from __future__ import annotations

from nova.api.validation.extra_specs import base

from nova_pmt.openstack import policy


def _number(name: str, what: str) -> base.ExtraSpecValidator:
    low, high = policy.BOUNDS[name]
    return base.ExtraSpecValidator(
        name=name,
        description=f"{what}. A whole number from {low} to {high}; by default as the compute "
        "hosts are configured.",
        value={"type": int, "min": low, "max": high},
    )


def register() -> list[base.ExtraSpecValidator]:
    """What Nova asks for."""
    return [
        base.ExtraSpecValidator(
            name=policy.MODE,
            description=(
                "Fault tolerance of the server: a standby on another host goes on when its host "
                "dies. ``pmt``, ``kemari`` and ``auto`` protect every server of this flavor, "
                "``allowed`` those whose owner sets the property ``ft``, ``off`` none."
            ),
            value={
                "type": str,
                "description": "Strategy, or who decides.",
                "enum": list(policy.FLAVOR_MODES),
            },
        ),
        _number(policy.INTERVAL_MS, "Time between two checkpoints, in milliseconds"),
        _number(policy.MAX_PAUSE_MS, "How long a checkpoint may pause the server, in milliseconds"),
        _number(policy.CACHE_MIB, "Memory for checkpoints under way, at most, in MiB"),
    ]
