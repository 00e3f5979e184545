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

"""Options of groups ``[replication]`` and ``[tls]``."""

from oslo_config import cfg

GROUP = cfg.OptGroup("replication", title="The connection between primary and standby")
OPTS = [
    cfg.StrOpt(
        "listen_address",
        default="$my_ip",
        help="""
Address on which this host's standbys listen and which their primaries connect to. Put it on the
network that should carry the checkpoints. Default: ``my_ip``.
""",
    ),
    cfg.StrOpt(
        "port_range",
        default="61152:61407",
        help="First and last TCP port for standbys, one each; open them between compute hosts.",
    ),
    cfg.IntOpt(
        "heartbeat_ms",
        default=100,
        min=10,
        help="Each side sends at least this often, in milliseconds.",
    ),
    cfg.IntOpt(
        "peer_timeout_ms",
        default=500,
        min=50,
        help="""
A peer that was silent for this long, in milliseconds, is lost. On a loaded host, where longer gaps
between heartbeats are usual, up to four times as long: three times the longest recent gap.
""",
    ),
    cfg.IntOpt(
        "claim_delay_ms",
        default=150,
        min=0,
        help="""
How long a standby that lost its primary without a word lets a primary that lives claim first, in
milliseconds. Not waited for when the primary's worker reports that its QEMU died.
""",
    ),
    cfg.IntOpt(
        "delta_cache_mib",
        default=64,
        min=0,
        max=65536,
        help="""
Most memory, in MiB, that a primary's worker uses for copies of what it sent of pages that are
written often, to send only what changes in them. Where that costs more time than it saves it is
left off for a while. 0: whole pages are sent.
""",
    ),
    cfg.ListOpt(
        "codecs",
        default=["zstd", "lz4"],
        help="""
What a primary may compress checkpoints with (plug-ins of ``nova_pmt.codecs``), best first: the
first that its standby has as well is used, as hard as it pays on this network with the CPU that is
left, which may be not at all. Of pages that are zero only the numbers are sent. Empty: all is sent
as it is, zeros too.
""",
    ),
    cfg.IntOpt(
        "connect_timeout_s",
        default=30,
        min=1,
        help="How long a standby waits for its primary to connect, in seconds.",
    ),
]
TLS_GROUP = cfg.OptGroup("tls", title="Certificates of the connection between primary and standby")
TLS_OPTS = [
    cfg.StrOpt(
        "ca_file",
        default="/etc/nova_pmt/tls/ca.pem",
        help="Certificate authority that signed the certificates of all compute hosts.",
    ),
    cfg.StrOpt(
        "cert_file",
        default="/etc/nova_pmt/tls/cert.pem",
        help="This host's certificate; its subject alternative names must hold the host's name.",
    ),
    cfg.StrOpt(
        "key_file", default="/etc/nova_pmt/tls/key.pem", help="This host's private key, mode 0600."
    ),
    cfg.BoolOpt(
        "insecure",
        default=False,
        help="""
Send guests' memory in the clear, and accept any peer. Only for benchmarks on a network of your own:
whoever reaches the port could put any state into a standby.
""",
    ),
]
