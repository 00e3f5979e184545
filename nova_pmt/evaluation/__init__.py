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

"""``nova-pmt-campaign``: many random failures of a whole pair, and what clients saw of them.

A campaign is a lab with two hosts and their agents, one guest with a transactional server, and
clients outside that hold their connections open while one host, QEMU or worker after the other is
killed (:mod:`nova_pmt.evaluation.campaign`). What the clients were answered is the truth; memory
and disks of the guest are compared with it after each failure (:mod:`nova_pmt.evaluation.ledger`,
:mod:`nova_pmt.evaluation.images`).

The same with managers, three hosts and all that can fail there is the fault campaign
(:mod:`nova_pmt.evaluation.faultcampaign`): what is done when follows from a seed
(:mod:`nova_pmt.evaluation.faults`), and a timeline of all that hosts let out shows whether two of
them ever did (:mod:`nova_pmt.evaluation.timeline`).

What does not live here: measurements of time (:mod:`nova_pmt.bench`), and anything that the product
needs.
"""
