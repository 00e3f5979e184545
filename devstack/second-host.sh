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

# The second compute host of a devstack on one node: usage: second-host.sh SETTINGS, as root. It
# makes a network and calls itself in namespaces of its own, as their process 1; whatever it starts
# there ends with it. Written by lib/second_host: SETTINGS.

set -euo pipefail

settings=$1
source "$settings"

netns=nova-pmt-host2
outside=pmt-host2 inside=pmt-host1
dir=$NOVA_PMT_SECOND_HOST_DIR
net=$NOVA_PMT_SECOND_HOST_NET

if [[ ${2:-} != inside ]]; then
    ip netns delete "$netns" 2> /dev/null || true
    ip netns add "$netns"
    ip link delete "$outside" 2> /dev/null || true
    ip link add "$outside" type veth peer name "$inside" netns "$netns"
    ip address add "$net.1/24" dev "$outside"
    ip link set "$outside" up
    exec ip netns exec "$netns" unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc \
        /bin/bash "${BASH_SOURCE[0]}" "$settings" inside
fi

# -- process 1 of the host ----------------------------------------------------------------------

hostname "$NOVA_PMT_SECOND_HOST_NAME"
ip link set lo up
ip address add "$net.2/24" dev "$inside"
ip link set "$inside" up
ip route add default via "$net.1"

# Own, and gone with the host's power.
mount --make-rprivate /
for path in /run/libvirt /run/openvswitch /run/ovn "$NOVA_PMT_RUNTIME_DIR" /dev/shm; do
    mkdir -p "$path"
    mount -t tmpfs tmpfs "$path"
done
mkdir -p "$NOVA_PMT_MEMORY_BACKING_DIR"
# Own, and kept. Paths are those of the other host: disks must have the same ones on both.
if [[ ! -d $dir/etc-libvirt ]]; then
    cp -a /etc/libvirt "$dir/etc-libvirt"
    rm -rf "$dir/etc-libvirt/qemu"
    echo 'stdio_handler = "file"' >> "$dir/etc-libvirt/qemu.conf"
    echo "host_uuid = \"$(cat /proc/sys/kernel/random/uuid)\"" >> "$dir/etc-libvirt/libvirtd.conf"
fi
own() { # directory, path
    mkdir -p "$dir/$1" "$2"
    mount --bind "$dir/$1" "$2"
}
own etc-libvirt /etc/libvirt
own lib-libvirt /var/lib/libvirt
own cache-libvirt /var/cache/libvirt
own etc-openvswitch /etc/openvswitch
own nova "$NOVA_STATE_PATH"
own nova_pmt "$NOVA_PMT_STATE_PATH"
mkdir -p "$NOVA_STATE_PATH/instances" "$dir/log"

# -- network ------------------------------------------------------------------------------------

database=/etc/openvswitch/conf.db
[[ -e $database ]] || ovsdb-tool create "$database" /usr/share/openvswitch/vswitch.ovsschema
ovsdb-server "$database" --detach --pidfile --log-file="$dir/log/ovsdb-server.log" \
    --remote=punix:/run/openvswitch/db.sock --remote=ptcp:6640:127.0.0.1
ovs-vsctl --no-wait init
ovs-vsctl --no-wait set open_vswitch . \
    "external_ids:system-id=$NOVA_PMT_SECOND_HOST_NAME" \
    "external_ids:hostname=$NOVA_PMT_SECOND_HOST_NAME" \
    "external_ids:ovn-remote=$OVN_REMOTE" external_ids:ovn-encap-type=geneve \
    "external_ids:ovn-encap-ip=$net.2" "external_ids:ovn-bridge-mappings=$BRIDGE_MAPPINGS"
ovs-vswitchd unix:/run/openvswitch/db.sock --detach --pidfile --log-file="$dir/log/ovs-vswitchd.log"
ovs-vsctl --may-exist add-br br-int
for mapping in ${BRIDGE_MAPPINGS//,/ }; do
    ovs-vsctl --may-exist add-br "${mapping#*:}"
done
ovn-controller unix:/run/openvswitch/db.sock --detach --pidfile \
    --log-file="$dir/log/ovn-controller.log"

# -- guests -------------------------------------------------------------------------------------

libvirtd --daemon
export NOVA_PMT_CONFIG=$dir/nova-pmt.conf
"$BIN/nova-pmt-agent" --config-file "$NOVA_PMT_CONFIG" > "$dir/log/agent.log" 2>&1 &
"$BIN/nova-pmt-compute" --config-file "$dir/nova-cpu.conf" > "$dir/log/n-cpu.log" 2>&1 &
# Whichever ends takes the host with it; systemd tells.
wait -n
