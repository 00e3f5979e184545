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

"""Put on PYTHONPATH, this makes a standby acknowledge checkpoints without having looked at them.

The first two are honest, so that there is a pair.
"""

import os
import sys

_HONEST = 2

if "nova_pmt.cmd.worker" in " ".join(sys.orig_argv) and os.environ.get("PYTHONPATH"):
    from nova_pmt.worker.standby import Standby

    _acknowledge = Standby._acknowledge

    def lie(standby: Standby, epoch: int, receipt: int) -> None:
        _acknowledge(standby, epoch, receipt if epoch <= _HONEST else 0)

    Standby._acknowledge = lie  # type: ignore[method-assign]
