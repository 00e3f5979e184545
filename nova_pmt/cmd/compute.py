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


"""nova-pmt-compute: nova-compute, which knows ``compute_driver = pmt.PMTDriver``.

Nova loads compute drivers from the package ``nova.virt`` only. Our files cannot lie there: of an
editable Nova (as devstack has it) they would hide the rest. So the package's path is made longer,
and then it is nova-compute as ever, with its options and its configuration.
"""

# The first import: it chooses between threads and eventlet, and nothing may have chosen before.
from nova.cmd import compute  # isort: skip

import nova.virt

from nova_pmt.openstack.nova import namespace


def main() -> None:
    """Entry point; see ``nova-compute``."""
    nova.virt.__path__.extend(namespace.__path__)
    compute.main()


if __name__ == "__main__":
    main()
