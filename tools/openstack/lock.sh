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

# Resolve tools/openstack/requirements.txt anew and write requirements.lock next to it, from the
# packages of a fresh environment. Then run `make openstack-demo` before you commit it.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q uv
export VIRTUAL_ENV=$venv
"$venv/bin/uv" pip install -q -r tools/openstack/requirements.txt
{
    echo "# Written by tools/openstack/lock.sh from requirements.txt; tried with Debian 12's Python 3.11."
    "$venv/bin/uv" pip freeze | grep -vE '^(uv|pip|setuptools)=='
} >tools/openstack/requirements.lock
