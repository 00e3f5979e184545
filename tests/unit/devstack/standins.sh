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

# Stand-ins of what devstack gives to a plugin, with the behaviour that its documentation and sources
# promise. Files of options are real files; everything else writes a line to $LOG. Usage:
#
#   bash standins.sh LOCALRC MODE/PHASE...
#
# Needs SANDBOX, below which everything happens, and NOVA_PMT_DIR. LOCALRC is read where devstack
# reads local.conf: before the plugin's settings.

set -o errexit

LOG=$SANDBOX/log

function record {
    local IFS=' '
    echo "$*" >> "$LOG"
}

# -- functions-common ---------------------------------------------------------------------------

function die {
    shift  # the line
    echo "$*" >&2
    record die "$*"
    exit 1
}

function is_service_enabled {
    local service
    for service in "$@"; do
        [[ ,$ENABLED_SERVICES, == *,"$service",* ]] && return 0
    done
    return 1
}

function enable_service {
    local service
    for service in "$@"; do
        # Said in local.conf, it holds.
        [[ ,$DISABLED_SERVICES, == *,"$service",* ]] && continue
        is_service_enabled "$service" || ENABLED_SERVICES+=",$service"
    done
}

function disable_service {
    DISABLED_SERVICES+=",$1"
}

function trueorfalse {
    case "${!2:-$1}" in
        1 | [Yy]es | [Tt]rue | TRUE) echo True ;;
        *) echo False ;;
    esac
}

# Usage: run_process: service, command, group, user.
function run_process {
    is_service_enabled "$1" || return 0
    [[ $2 == /* ]] || die $LINENO "systemd wants an absolute path: $2"
    record run_process "$@"
}

function stop_process {
    is_service_enabled "$1" || return 0
    record stop_process "$@"
}

function setup_develop {
    record setup_develop "$@"
}
function restart_service {
    record restart_service "$@"
}
function get_python_exec_prefix {
    echo "$SANDBOX/bin"
}
function is_fedora {
    [[ ${DISTRO:-bookworm} == rhel* ]]
}

function get_or_create_user {
    record get_or_create_user "$1" "$3"
    echo 0123456789abcdef
}
function get_or_create_project {
    record get_or_create_project "$@"
    echo fedcba9876543210
}
function get_or_add_user_project_role {
    record get_or_add_user_project_role "$@"
    echo "$1"
}

# -- lib ----------------------------------------------------------------------------------------

function recreate_database {
    record recreate_database "$@"
}
function database_connection_url {
    echo "mysql+pymysql://root:secret@127.0.0.1/$1?charset=utf8"
}

# Usage: iniset_rpc_backend: package, file, section, virtual host.
function iniset_rpc_backend {
    local url=rabbit://stackrabbit:secret@$SERVICE_HOST:5672/
    iniset "$2" "${3:-DEFAULT}" transport_url "$url${4:-}"
    iniset "$2" oslo_messaging_notifications transport_url "$url"
}

# -- inc/ini-config -----------------------------------------------------------------------------

# Usage: _ini FILE SECTION OPTION [VALUE...]: all lines of the option become these.
function _ini {
    local file=$1 section=$2 option=$3 lines="" value
    shift 3
    for value in "$@"; do
        lines+="$option = $value"$'\n'
    done
    touch "$file"
    LINES_=$lines awk -v section="[$section]" -v option="$option" '
        function put() { if (!done) { printf "%s", ENVIRON["LINES_"]; done = 1 } }
        /^\[/ { here = ($0 == section); print; if (here) put(); next }
        here && match($0, "^" option "[ \t]*=") { next }
        { print }
        END { if (!done) { print "\n" section; put() } }
    ' "$file" > "$file.new"
    printf '%s\n' "$(< "$file.new")" > "$file"  # (keeps its mode)
}

function iniset {
    [[ $1 == "${1#$SANDBOX}" ]] && die $LINENO "outside of the sandbox: $1"
    [[ -n $2 && -n $3 ]] || return 0
    _ini "$1" "$2" "$3" "${4:-}"
}

function iniget_multiline {
    awk -v section="[$2]" -v option="$3" '
        /^\[/ { here = ($0 == section); next }
        here && match($0, "^" option "[ \t]*=[ \t]*") {
            printf "%s%s", gap, substr($0, RLENGTH + 1)
            gap = " "
        }
    ' "$1"
}

function iniget {
    iniget_multiline "$@"
}

# Usage: iniadd: values with spaces come apart.
function iniadd {
    local file=$1 section=$2 option=$3
    shift 3
    # shellcheck disable=SC2046
    _ini "$file" "$section" "$option" $(iniget_multiline "$file" "$section" "$option") "$@"
}

# -- commands -----------------------------------------------------------------------------------

function sudo {
    local word
    for word in "$@"; do
        # ("/^" begins an expression of sed's.)
        [[ $word != /* || $word == /^* || $word == "$SANDBOX"* || $word == /dev/null ]] \
            || die $LINENO "outside of the sandbox: $*"
    done
    case $1 in
        modprobe) record "$@"; [[ ${NO_MODULES:-} != yes ]] ;;
        ip) record "$@" ;;
        *) "$@" ;;
    esac
}

function openstack {
    record openstack "$@"
    case "$*" in
        *"flavor show"*) return 1 ;;
        *"service list"*) printf '%s\n' node1 "${COMES-node1-pmt}" ;;
    esac
}

function sleep {
    record sleep "$@"
}

mkdir -p "$SANDBOX/bin"
for name in nova-pmt-manage nova-pmt-status nova-manage; do
    printf '#!/bin/sh\necho %s "$@" >> %s\nexit ${STATUS:-0}\n' "$name" "$LOG" > "$SANDBOX/bin/$name"
    chmod +x "$SANDBOX/bin/$name"
done

# -- stack.sh -----------------------------------------------------------------------------------

DEST=$SANDBOX/opt DATA_DIR=$SANDBOX/data STACK_USER=$(id -un)
HOST_IP=192.0.2.11 LOCAL_HOSTNAME=node1 SERVICE_HOST=192.0.2.11
SERVICE_DOMAIN_NAME=Default SERVICE_PASSWORD=secret REGION_NAME=RegionOne
KEYSTONE_SERVICE_URI=http://$SERVICE_HOST/identity
VIRT_DRIVER=libvirt LIBVIRT_GROUP=libvirt ENABLE_DEBUG_LOG_LEVEL=True
NOVA_STATE_PATH=$DATA_DIR/nova NOVA_BIN_DIR=$SANDBOX/bin
NOVA_CONF=$SANDBOX/nova/nova.conf NOVA_CPU_CONF=$SANDBOX/nova/nova-cpu.conf
NOVA_FILTERS=ComputeFilter,ComputeCapabilitiesFilter,ImagePropertiesFilter
NOVA_FILTERS+=,ServerGroupAntiAffinityFilter,ServerGroupAffinityFilter,SameHostFilter
NOVA_FILTERS+=,DifferentHostFilter
DISABLED_SERVICES=""
ENABLED_SERVICES=key,mysql,rabbit,n-api,n-cond,n-sch,n-cpu

# Nothing outside: the plugin's own defaults that are elsewhere.
NOVA_PMT_CONF_DIR=$SANDBOX/etc/nova_pmt NOVA_PMT_RUNTIME_DIR=$SANDBOX/run/nova_pmt
NOVA_PMT_MEMORY_BACKING_DIR=$SANDBOX/shm/libvirt NOVA_PMT_QEMU_CONF=$SANDBOX/libvirt/qemu.conf

source "$1"
shift
source "$NOVA_PMT_DIR/devstack/override-defaults"
NOVA_NOTIFICATION_FORMAT=${NOVA_NOTIFICATION_FORMAT:-unversioned}
source "$NOVA_PMT_DIR/devstack/settings"

# lib/nova, as far as it matters here.
mkdir -p "$SANDBOX/nova" "$SANDBOX/libvirt" "$DATA_DIR"
function create_nova_conf {
    rm -f "$NOVA_CONF"
    iniset "$NOVA_CONF" DEFAULT compute_driver libvirt.LibvirtDriver
    iniset "$NOVA_CONF" filter_scheduler enabled_filters "$NOVA_FILTERS"
    iniset_rpc_backend nova "$NOVA_CONF"
    iniset "$NOVA_CONF" oslo_messaging_notifications driver messagingv2
    iniset "$NOVA_CONF" notifications notification_format "$NOVA_NOTIFICATION_FORMAT"
}
function start_nova_compute {
    cp "$NOVA_CONF" "$NOVA_CPU_CONF"
    iniset_rpc_backend nova "$NOVA_CPU_CONF" DEFAULT nova_cell1
    run_process n-cpu "$NOVA_BIN_DIR/nova-compute --config-file $NOVA_CPU_CONF" "$LIBVIRT_GROUP"
}

for at in "$@"; do
    [[ $at != stack/post-config ]] || create_nova_conf
    [[ $at != stack/extra ]] || start_nova_compute
    record "# $at"
    # shellcheck disable=SC2086
    source "$NOVA_PMT_DIR/devstack/plugin.sh" ${at/\// }
done

if [[ -n ${CALL:-} ]]; then
    source "$NOVA_PMT_DIR/devstack/lib/nova_pmt"
    $CALL
fi
