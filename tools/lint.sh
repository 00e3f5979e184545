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

# All style checks; `make lint` and `tox -e pep8` both come here. The tools are
# taken from PATH. Runs every check even when one fails, and says which did.

set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
mkdir -p build
failures=()

check() { # name, command
    local name=$1
    shift
    printf '==> %s\n' "$name"
    "$@" || failures+=("$name")
}

# Tracked or new, not ignored; every shell script, also those without a suffix.
mapfile -d '' -t files < <(git ls-files -coz --exclude-standard)
scripts=()
for file in "${files[@]}"; do
    [[ -f $file ]] || continue
    if [[ $file == *.sh ]] || head -c 64 "$file" | head -n 1 | grep -qaE '^#!.*\b(ba)?sh\b'; then
        scripts+=("$file")
    fi
done

check ruff ruff check .
# E006 is a line length of 79; ours is 100 as for Python, and review does that.
check bashate bashate -i E006 "${scripts[@]}"
check codespell codespell
check mypy mypy

if [[ ${#failures[@]} -gt 0 ]]; then
    printf 'lint: failed: %s\n' "${failures[*]}" >&2
    exit 1
fi
echo 'lint: all checks passed'
