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

"""``nova-pmt-bench``: what a pause costs on this machine, next to the least it could cost.

Every figure here is a ratio of two things that were measured in the same run, interleaved: on a
machine that others use, absolute times say little. :mod:`nova_pmt.bench.pause` and
:mod:`nova_pmt.bench.qmp` drive a guest of the lab from outside; :mod:`nova_pmt.bench.measure` is
the process that measures, inside the host's namespaces, where a worker would be.

What does not live here: experiments on pairs, and anything that the product needs.
"""
