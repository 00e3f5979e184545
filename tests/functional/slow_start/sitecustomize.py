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

"""Put on PYTHONPATH, this makes a primary take long between handshake and first frame.

As one does whose guest is large, or whose host is busy.
"""

import os
import sys
import time
from typing import Any

#: Above the tests' peer_timeout_ms; below four times that, the most a peer waits at first.
_LONG_S = 7.0

if "nova_pmt.cmd.worker" in " ".join(sys.orig_argv) and os.environ.get("PYTHONPATH"):
    from nova_pmt.guest import prelude

    _take = prelude.take

    def take(*arguments: Any) -> Any:
        time.sleep(_LONG_S)
        return _take(*arguments)

    prelude.take = take
