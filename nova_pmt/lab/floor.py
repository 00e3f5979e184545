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

"""The floor of a pause: stop, save the devices, go on, and nothing else. Runs inside a host.

``python -m nova_pmt.lab.floor UUID ROUNDS INTERVAL_MS`` prints JSON: ``floor_ms`` (list).
"""

from __future__ import annotations

import json
import sys
import time

from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest.execution import make_execution
from nova_pmt.worker import pausing

RUNTIME = "/run/nova_pmt"
#: In a round the last pass over the memory lies between the two.
PREPARED_S = 5e-4


def measure(uuid: str, rounds: int, interval_s: float) -> list[float]:
    """Milliseconds of each pause of a running domain on this host."""
    connection = guest_domain.connect("qemu:///system")
    domain = guest_domain.Domain.find(connection, uuid)
    directory = guest_domain.guest_directory(RUNTIME, domain.uuid, domain.pid())
    found = []
    with domain.monitor(RUNTIME) as monitor:
        execution = make_execution(monitor, directory)
        pausing.prepare()
        for _ in range(rounds):
            time.sleep(interval_s)
            execution.running()
            execution.prepare()
            time.sleep(PREPARED_S)
            start = time.perf_counter()
            execution.pause()
            execution.saved()
            execution.resume()
            found.append((time.perf_counter() - start) * 1e3)
        execution.close()
    connection.close()
    return found


if __name__ == "__main__":
    print(
        json.dumps({"floor_ms": measure(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1e3)})
    )
