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

# From a fresh Debian 12 with make and git to a .venv that can run the demo and
# the tests. Does nothing, quickly, when nothing changed since the last time.
# PYTHON=python3.12 tools/setup.sh chooses the interpreter of a new .venv.
# `tools/setup.sh openstack` does the same for .venv-openstack, in which the
# lab's cloud runs: OpenStack's services as tools/openstack/requirements.lock
# pins them, and nova_pmt. It needs Python 3.11 or later.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${PYTHON:-python3}
variant=${1:-}
venv=$root/.venv${variant:+-$variant}
stamp=$venv/.setup-stamp          # what the environment was made from
wanted=$venv/.setup-packages      # system packages that bindep asked for
logs=$root/build/setup
policy=/usr/sbin/policy-rc.d
policy_is_ours=no
profiles=(compile lab test)
requirements=(-r requirements.txt -r test-requirements.txt)
files=(requirements.txt test-requirements.txt)
oldest=10                         # Python 3.x
case $variant in
    '') ;;
    openstack)
        profiles+=(openstack)
        requirements=(-r tools/openstack/requirements.lock)
        files=(tools/openstack/requirements.lock)
        oldest=11
        ;;
    *) echo "usage: $0 [openstack]" >&2; exit 2 ;;
esac

say() { printf '==> %s\n' "$*"; }

die() { # cause, cure
    printf '\nsetup: %s\n  cure: %s\n' "$1" "$2" >&2
    exit 1
}

failed() { # log, cause, cure: with what the tool said, first
    tail -n 15 "$1" | sed 's/^/    /' >&2
    die "$2 (all of it: ${1#"$root/"})" "$3"
}

cleanup() {
    [[ $policy_is_ours == no ]] || rm -f "$policy"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# -- is there anything to do? --------------------------------------------------

fingerprint() {
    # The path too: console scripts name it, so a moved .venv is another one.
    { echo "$root"; sha256sum "${files[@]}" bindep.txt \
        pyproject.toml setup.cfg tools/setup.sh; } | sha256sum | cut -d' ' -f1
}

installed() { # packages: are all of them installed?
    local states
    states=$(dpkg-query -W -f '${db:Status-Status}\n' "$@" 2>/dev/null) || return 1
    ! grep -qvx installed <<<"$states"
}

up_to_date() {
    [[ -s $stamp && -x $venv/bin/python && $(<"$stamp") == "$(fingerprint)" ]] || return 1
    # A kept .venv on a new machine: the packages are to be installed again.
    local packages
    mapfile -t packages <"$wanted" || return 1
    [[ ${#packages[@]} -eq 0 ]] || installed "${packages[@]}"
}

if up_to_date; then
    exit 0
fi

mkdir -p "$logs"
exec 9>"$logs/lock"
flock 9                           # `make test` and `make demo` side by side
if up_to_date; then
    exit 0
fi

# -- system packages -----------------------------------------------------------

apt_is_fresh=no

apt_install() { # packages
    local missing="$*"
    [[ -e /etc/debian_version ]] && command -v apt-get >/dev/null || die \
        "this is not a Debian system; these packages are missing: $missing" \
        "use Debian 12, or install their counterparts and Python >= 3.10 yourself (bindep.txt says what each is for)"
    [[ $(id -u) == 0 ]] || die \
        "system packages are missing and only root can install them: $missing" \
        "run make as root, or let root do: apt-get install --no-install-recommends $missing"
    if [[ ! -e $policy && ! -L $policy ]]; then
        # Else apt would start libvirtd and RabbitMQ on the host; the lab has its own.
        policy_is_ours=yes
        printf '#!/bin/sh\n# made by nova_pmt tools/setup.sh for the time of an installation\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    if [[ $apt_is_fresh == no ]]; then
        say "reading the package lists (apt-get update)"
        apt-get -o DPkg::Lock::Timeout=600 update >"$logs/apt-update.log" 2>&1 9>&- \
            || failed "$logs/apt-update.log" "apt-get update failed" \
                "check the network, the proxy and /etc/apt/sources.list*, then run make again"
        apt_is_fresh=yes
    fi
    say "installing $# system packages: $missing"
    apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends "$@" \
        </dev/null >"$logs/apt-install.log" 2>&1 9>&- \
        || failed "$logs/apt-install.log" "apt-get could not install: $missing" \
            "if it could not fetch, check the network; if a package is unknown, this is not Debian 12"
    if [[ $policy_is_ours == yes ]]; then
        rm -f "$policy"
        policy_is_ours=no
    fi
}

pip_install() { # what, pip arguments
    local what=$1 pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    shift
    if [[ -x $venv/bin/uv ]]; then
        pip=(env VIRTUAL_ENV="$venv" "$venv/bin/uv" pip)
    fi
    "${pip[@]}" install -q "$@" >"$logs/pip.log" 2>&1 9>&- \
        || failed "$logs/pip.log" "pip could not install $what" \
            "check the network and pip's index or proxy (pip config list), then run make again"
}

python_works() { # interpreter: does it run, and is it new enough?
    "$1" -c "import sys; sys.exit(sys.version_info < (3, $oldest))" 2>/dev/null
}

started=$SECONDS
[[ ! -e /etc/os-release ]] || (
    . /etc/os-release
    [[ ${ID:-}${VERSION_ID:-} == debian12 ]] \
        || say "note: tested on Debian 12, this is ${PRETTY_NAME:-something else}"
)

if ! command -v "$python" >/dev/null || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    [[ $python == python3 ]] || die "PYTHON=$python cannot make virtual environments" \
        "install it with its venv and ensurepip modules, or leave PYTHON unset"
    apt_install python3 python3-venv
fi
python_works "$python" || die \
    "$python is $("$python" -V 2>&1), this needs Python 3.$oldest or later" \
    "use Debian 12, or name another interpreter: make PYTHON=python3.11 ..."

# A half-made environment, one whose interpreter was upgraded away, or one that
# was moved here does not work: make it anew.
if ! python_works "$venv/bin/python" || ! "$venv/bin/python" -m pip -V >/dev/null 2>&1 \
    || [[ $("$venv/bin/python" -c 'import sys; print(sys.prefix)') != "$venv" ]]; then
    say "making the virtual environment ${venv##*/} with $("$python" -V)"
    rm -rf "$venv"
    "$python" -m venv "$venv" 9>&- || die "$python -m venv failed" "read the lines above"
fi
rm -f "$stamp"

if [[ ! -x $venv/bin/bindep ]]; then
    say "installing bindep"
    pip_install bindep 'bindep>=2.11'
fi

# bindep exits with 1 both when packages are missing and when it fails; only in
# the first case it prints package names.
"$venv/bin/bindep" -f bindep.txt -l newline "${profiles[@]}" >"$wanted.new" 2>"$logs/bindep.log" \
    || failed "$logs/bindep.log" "bindep cannot read bindep.txt" "mend the line that it names"
mapfile -t missing < <("$venv/bin/bindep" -f bindep.txt -b "${profiles[@]}" 2>"$logs/bindep.log")
if [[ -s $logs/bindep.log ]]; then
    failed "$logs/bindep.log" "bindep failed" "mend what it names"
fi
if [[ ${#missing[@]} -gt 0 ]]; then
    apt_install "${missing[@]}"
fi

# -- the Python side -----------------------------------------------------------

# pbr takes the version from git. A clone without tags is fine (0.0.1.devN); a
# tree without a readable commit and without PKG-INFO needs to be told one.
if [[ -z ${PBR_VERSION:-} && ! -e PKG-INFO ]] && ! git rev-parse -q --verify HEAD >/dev/null 2>&1; then
    export PBR_VERSION=0.0.0
fi

say "installing the Python packages into ${venv##*/} (first time: about a minute)"
if [[ $variant == openstack && ! -x $venv/bin/uv ]]; then
    # 180 packages: pip takes a minute for them, uv ten seconds.
    pip_install uv 'uv>=0.5'
fi
pip_install "the requirements" "${requirements[@]}"
pip_install "nova_pmt itself" --no-deps -e .

mv "$wanted.new" "$wanted"
fingerprint >"$stamp"
say "setup done in $((SECONDS - started)) s"
