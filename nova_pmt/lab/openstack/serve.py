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
"""One API under waitress, in one process: ``serve.py NAME MODULE:ATTRIBUTE HOST PORT THREADS``."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    name, target, host, port, threads = sys.argv[1:]
    # Nova and Neutron read the command line when they are imported; ours is not for them.
    sys.argv = [name]
    module, attribute = target.split(":")
    application = getattr(importlib.import_module(module), attribute)
    import waitress

    waitress.serve(
        application,
        host=host,
        port=int(port),
        threads=int(threads),
        ident=None,
        channel_timeout=300,
        max_request_body_size=1 << 34,
    )


if __name__ == "__main__":
    main()
