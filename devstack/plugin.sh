#!/usr/bin/env bash
#
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

# devstack sources this with a mode and a phase. What is done in each is in
# lib/nova_pmt; the contract is in https://docs.openstack.org/devstack/latest/plugins.html

source "$NOVA_PMT_DIR/devstack/lib/nova_pmt"
source "$NOVA_PMT_DIR/devstack/lib/second_host"

case "$1/${2:-}" in
    stack/pre-install) check_nova_pmt ;;
    stack/install) install_nova_pmt ;;
    stack/post-config) configure_nova_pmt ;;
    stack/extra) init_nova_pmt; start_nova_pmt ;;
    stack/test-config) try_nova_pmt ;;
    unstack/*) stop_nova_pmt ;;
    clean/*) cleanup_nova_pmt ;;
esac
