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

"""``nova-pmt-lab``: hosts, a message bus and small guests on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nova_pmt.exception import PmtError

_DESCRIPTION = """\
Compute hosts on one machine: each is a set of namespaces with its own file system view, network,
processes and libvirtd; 'ctl' beside them has the bridges, RabbitMQ and the clients. Nothing is
changed outside of them, several labs do not meet, and nothing is left when a lab ends.
"""

_EXAMPLES = """\
a first walk:
  nova-pmt-lab up                          two hosts with agents; the first time builds a guest
  nova-pmt-lab shell compute1              a shell there; it says what can be done
  nova-pmt-lab shell compute1 -- virsh create /srv/nova_pmt/guests/guest1.xml
  nova-pmt-lab tell guest1 dirty 600 20    rewrite 600 pages every 20 ms (also: status, verify)
  nova-pmt-lab shell -- nova-pmt protect guest1 --standby compute2
  nova-pmt-lab shell -- nova-pmt top       pauses, pages and cache, live; Ctrl-C ends it
  nova-pmt-lab shell -- nova-pmt failover guest1
  nova-pmt-lab down

needs root and what bindep.txt lists under 'lab'. The guest image stays in build/lab/image.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nova-pmt-lab",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="start a lab and return; it runs until 'down'",
        description="Start a lab that runs in the background. Removes what dead labs left first.",
    )
    up.add_argument("-n", "--computes", type=int, default=2, help="compute hosts (default 2)")
    up.add_argument("--no-rabbit", action="store_true", help="no RabbitMQ, no agents")
    up.add_argument("--mtu", type=int, default=1500, help="of all networks (default 1500)")
    up.add_argument(
        "--accel",
        choices=("tcg", "auto"),
        default="tcg",
        help="auto: KVM for the guests, if a probe really boots one (default tcg)",
    )

    down = commands.add_parser(
        "down",
        help="end the lab; nothing is left",
        description="End the lab that 'up' started, and remove what dead labs left.",
    )
    down.add_argument("--lab", metavar="ID", help="this one, even if a test or demo owns it")
    down.add_argument("--all", action="store_true", help="every lab that 'up' started")

    shell = commands.add_parser(
        "shell",
        help="a shell, or a command, inside a host",
        description="Without HOST: ctl, where clients run. Exit status is the command's.",
    )
    shell.add_argument("--lab", metavar="ID", help="if more than one is up")
    shell.add_argument("host", nargs="?", default="ctl", help="ctl, compute1, ... (default ctl)")

    tell = commands.add_parser(
        "tell",
        help="a command to the workload of a guest",
        description="Commands: status, counter, boot, rounds, verify, reboot, dirty PAGES MS,"
        " burst PAGES, full 0|1, skew 0|1, fill MIB, tick MS, console EVERY.",
    )
    tell.add_argument("--lab", metavar="ID", help="if more than one is up")
    tell.add_argument("guest", help="guest1, guest2, guest3 or an address")
    tell.add_argument("words", nargs="+", metavar="COMMAND")

    status = commands.add_parser("status", help="labs of this machine and their hosts")
    status.add_argument("-f", "--format", choices=("text", "json"), default="text")

    demo = commands.add_parser(
        "demo",
        help="protect a guest, kill it, see it go on, in a lab of its own",
        description="Show the product at work, in a lab of its own that is gone afterwards.",
    )
    demo.add_argument("--watch", type=float, default=30.0, metavar="S", help="seconds under load")
    demo.add_argument("--directory", type=Path, help="for summary.json (default build/demo)")

    cloud = commands.add_parser(
        "openstack-demo",
        help="the same with a real Nova, which is told nothing",
        description="A server that asks for protection by a property loses its host and goes on;"
        " Nova, Placement and Neutron follow. Needs .venv-openstack: make openstack-demo.",
    )
    cloud.add_argument("--directory", type=Path, help="to write to (default build/openstack-demo)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0: done; 1: it failed, with reason and cure on stderr; 2: wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except PmtError as e:
        print(f"error {e.code}: {e.message}\ncure: {e.cure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    # What follows "--" belongs to the command inside the host, options and all.
    command: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, command = arguments[:split], arguments[split + 1 :]
    parser = _parser()
    options = parser.parse_args(arguments)
    if command and options.command != "shell":
        parser.error("only 'shell' takes a command after --")

    if options.command == "demo":
        from nova_pmt.lab import demo  # pulls in all of the product

        return demo.main(options.watch, options.directory)

    if options.command == "openstack-demo":
        from nova_pmt.lab.openstack import demo as openstack_demo

        return openstack_demo.main(options.directory)

    from nova_pmt.lab import detached, registry
    from nova_pmt.lab.lab import Lab

    if options.command == "up":
        lab = Lab(
            options.computes,
            rabbit=not options.no_rabbit,
            mtu=options.mtu,
            accel=options.accel,
            detached=True,
        )
        print("Starting; the very first time the guest is built, too ...", file=sys.stderr)
        print(detached.usage(detached.start(lab)), end="")
    elif options.command == "down":
        dead = registry.clean()
        if options.all:
            entries = [e for e in registry.entries() if e.detached]
        elif dead and not options.lab and not any(e.detached for e in registry.entries()):
            entries = []
        else:
            entries = [detached.find(options.lab)]
        for entry in entries:
            detached.stop(entry)
        for entry in [*dead, *entries]:
            print(f"Lab {entry.id} is down.")
    elif options.command == "shell":
        detached.shell(detached.find(options.lab), options.host, command)
    elif options.command == "tell":
        print(detached.tell(detached.find(options.lab), options.guest, options.words))
    elif options.command == "status":
        _print_status(detached.status(), options.format)
    return 0


def _print_status(labs: list[dict[str, object]], form: str) -> None:
    if form == "json":
        print(json.dumps(labs, indent=1))
        return
    if not labs:
        print("No lab. Start one with 'nova-pmt-lab up'.")
    for lab in labs:
        how = "detached" if lab["detached"] else f"of process {lab['owner']}"
        print(f"{lab['id']}  {lab['state']}  {how}  {lab['directory']}")
        hosts = lab["hosts"]
        assert isinstance(hosts, dict)
        for name, pid in hosts.items():
            print(f"    {name:<10} {f'PID 1 is {pid}' if pid else 'off'}")


if __name__ == "__main__":
    sys.exit(main())
