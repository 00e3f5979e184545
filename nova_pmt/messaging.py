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

"""oslo.messaging, imported without its warnings.

Releases of today import eventlet through oslo.service, futurist and oslo.utils although
nothing of it is used: we never patch anything and run the ``threading`` executor. Their
deprecation warnings would be the first lines of every command's output.

Commands that use it read their options into the global ``cfg.CONF``: oslo.messaging 18 looks for
its options of metrics and tracing in the transport's configuration but registers them there only.
"""

from __future__ import annotations

import os
import warnings

# A quarter of the time that our commands and workers take to start, for nothing.
os.environ.setdefault("EVENTLET_NO_GREENDNS", "yes")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import oslo_messaging

__all__ = ["oslo_messaging"]
