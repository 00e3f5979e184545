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
"""The cloud as a whole: start, use, end."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nova_pmt.exception import LabError
from nova_pmt.lab import network
from nova_pmt.lab.domain import QUICK, GuestSpec, Workload
from nova_pmt.lab.host import LabHost
from nova_pmt.lab.lab import Lab
from nova_pmt.lab.lab_guest import LabGuest
from nova_pmt.lab.openstack import node, product, settings, ssh
from nova_pmt.lab.openstack.control import Control, wait_all, wait_for
from nova_pmt.lab.openstack.product import Product
from nova_pmt.lab.openstack.settings import Account

if TYPE_CHECKING:
    from openstack.compute.v2.server import Server
    from openstack.connection import Connection

IMAGE = "guest"
NETWORK = "guests"
#: Flavors: name to extra specs. All have one vCPU, 128 MiB and a disk of 1 GiB.
FLAVORS: Mapping[str, Mapping[str, str]] = {
    "plain": {},
    "ft-allowed": {"ft:mode": "allowed"},
    "ft-pmt": {"ft:mode": "pmt"},
}
MEMORY_MIB, DISK_GIB = 128, 1
#: Nova keeps what an image says in columns of this length and cuts off the rest.
_MAX_PROPERTY = 255
_READY_S = 300.0
_SERVER_S = 300.0


def _say_nothing(text: str) -> None:
    pass


class Cloud:
    """An OpenStack on a running lab that has RabbitMQ, from ``with`` to its end.

    :param pmt: with nova_pmt: its driver, filter, agents and managers.
    :param managers: how many, with ``pmt``.
    :param say: told of each step, for people.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        pmt: bool = True,
        managers: int = 2,
        say: Callable[[str], None] = _say_nothing,
    ) -> None:
        self.lab = lab
        self._program = product.PROGRAM if pmt else "nova-compute"
        self._say = say
        self.accounts = {
            name: Account(name, secrets.token_urlsafe(24), project)
            for name, project in (("admin", ""), ("demo", ""), ("nova_pmt", "service"))
        }
        self._stack = contextlib.ExitStack()
        self._standby_user = ""
        account = self.accounts["admin"]
        self._nova = {
            host.name: settings.merged(
                settings.nova(host, account, lab.transport_url),
                (product.COMPUTE if host.index else product.CONTROL) if pmt else {},
            )
            for host in lab.hosts
        }
        self._control = Control(lab, account, self._nova["ctl"], say)
        self._product = (
            Product(lab, self._control.database, self.accounts["nova_pmt"], managers)
            if pmt
            else None
        )

    @property
    def pmt(self) -> Product:
        """nova_pmt in this cloud."""
        if self._product is None:
            raise LabError("this cloud has no nova_pmt", cure="Use Cloud(lab, pmt=True).")
        return self._product

    # -- start and end -------------------------------------------------------------------------

    def __enter__(self) -> Cloud:
        with self._stack as stack:
            stack.enter_context(self._control.database)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The services live until the lab's hosts go, which is at once after this.
        self._stack.close()

    def _start(self) -> None:
        control, computes = self._control, self.lab.computes
        control.configure()
        self._say("MariaDB runs")
        with ThreadPoolExecutor(2 + len(computes), thread_name_prefix="cloud") as pool:
            network_parts = [pool.submit(control.start_ovn)]
            ssh.configure(computes)
            for host in computes:
                node.configure(host, self._nova[host.name])
                ssh.start(host)
                network_parts.append(pool.submit(node.start_network, host))
            control.make_schemas()
            cells = pool.submit(control.make_cells)
            wait_all(network_parts)
            self._say("Open vSwitch and OVN run")
            control.start_first()
            control.start_keystone()
            self._fill_keystone()
            self._say("Keystone has its catalog")
            if self._product is not None:
                self._product.configure(self._standby_user)
            wait_all([cells])
            control.start_second()
            control.wait_conductor()
            for host in computes:
                node.start_compute(host, self._program)
            if self._product is not None:
                self._product.start()
            for name in settings.PORTS:
                control.wait(name)
            self._say("all APIs answer")
            parts = [pool.submit(part) for part in (self._fill_glance, self._fill_neutron)]
            self._make_flavors()
            self.wait_computes(computes)
            self._say("all compute services are up")
            wait_all(parts)
        self._say("image, network and flavors are there")
        if self._product is not None:
            self._product.wait()
            self._say("agents and managers listen")

    def power_on(self, host: LabHost) -> None:
        """Start a host that was powered off, with all the cloud's services; does not wait."""
        host.power_on()
        ssh.start(host)
        node.start_network(host)
        self.start_compute(host)
        if self._product is not None:
            self._product.start_agent(host)

    def start_compute(self, host: LabHost) -> None:
        """Start a host's compute service, which does not run; does not wait."""
        node.start_compute(host, self._program)

    def wait_computes(self, hosts: list[LabHost], timeout: float = _READY_S) -> None:
        """Wait until the compute services of hosts are up, known, and have room to give."""
        wanted = {host.name for host in hosts}

        def ready() -> bool:
            compute = self.admin.compute
            up = {s.host for s in compute.services(binary="nova-compute") if s.state == "up"}
            return (
                wanted <= up
                and wanted <= {h.name for h in compute.hypervisors()}
                and wanted <= {p.name for p in self.admin.placement.resource_providers()}
            )

        wait_for(ready, f"compute services of {', '.join(sorted(wanted))}", timeout=timeout)

    # -- who talks to it -----------------------------------------------------------------------

    @cached_property
    def admin(self) -> Connection:
        """openstacksdk as the administrator."""
        return self.connect("admin")

    @cached_property
    def demo(self) -> Connection:
        """openstacksdk as an ordinary user of a project of the same name."""
        return self.connect("demo")

    def connect(self, name: str) -> Connection:
        """A new connection as one of :attr:`accounts`."""
        from nova_pmt.lab.openstack import client  # openstacksdk takes a second

        return client.connect(self.lab.ctl, self.accounts[name])

    def command_environment(self, name: str = "admin") -> dict[str, str]:
        """For the ``openstack`` command in ctl."""
        account = self.accounts[name].options()
        return {
            "OS_AUTH_URL": account["auth_url"],
            "OS_USERNAME": account["username"],
            "OS_PASSWORD": account["password"],
            "OS_PROJECT_NAME": account["project_name"],
            "OS_USER_DOMAIN_ID": "default",
            "OS_PROJECT_DOMAIN_ID": "default",
            "OS_REGION_NAME": settings.REGION,
            "OS_IDENTITY_API_VERSION": "3",
            "OS_COMPUTE_API_VERSION": "2.94",
        }

    def openstack(self, *arguments: str, account: str = "admin") -> str:
        """Run the ``openstack`` command in ctl; its output."""
        done = self.lab.ctl.run(
            ["openstack", *arguments], env=self.command_environment(account), timeout=300
        )
        return done.stdout

    # -- what it has from the start ------------------------------------------------------------

    def _fill_keystone(self) -> None:
        # Not with self.admin: it would remember a catalog without anything.
        identity = self.connect("admin").identity
        kinds = {
            "placement": "placement",
            "glance": "image",
            "neutron": "network",
            "nova": "compute",
        }
        for name, kind in kinds.items():
            service = identity.create_service(type=kind, name=name)
            for interface in ("public", "internal"):
                identity.create_endpoint(
                    service_id=service.id,
                    interface=interface,
                    region_id=settings.REGION,
                    url=settings.url(name),
                )
        roles = {role.name: role for role in identity.roles()}
        for name in ("service", "member"):
            if name not in roles:
                roles[name] = identity.create_role(name=name)
        admin_project = identity.find_project("admin")
        admin_user = identity.find_user("admin")
        identity.assign_project_role_to_user(admin_project, admin_user, roles["service"])
        for name, granted in (("nova_pmt", ("admin", "service")), ("demo", ("member",))):
            account = self.accounts[name]
            project = identity.create_project(name=account.project or name, domain_id="default")
            user = identity.create_user(name=name, password=account.password, domain_id="default")
            for role in granted:
                identity.assign_project_role_to_user(project, user, roles[role])
            if name == "nova_pmt":
                self._standby_user = str(user.id)

    def _fill_glance(self) -> None:
        found = self.lab.image()
        parts = {}
        for name, file in (("kernel", found.kernel), ("ramdisk", found.initrd)):
            form = {"kernel": "aki", "ramdisk": "ari"}[name]
            parts[f"{name}_id"] = self._upload(name, file, form, form).id
        disk = self.lab.ctl.disk / "guest.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
        self._upload(
            IMAGE,
            disk,
            "qcow2",
            "bare",
            os_command_line=kernel_arguments(),
            hw_machine_type="q35",
            hw_video_model="none",
            hw_rng_model="virtio",
            **parts,
        )

    def _upload(self, name: str, file: Path, form: str, container: str, **properties: str) -> Any:
        images = self.admin.image
        image = images.create_image(
            name=name,
            disk_format=form,
            container_format=container,
            visibility="public",
            **properties,
        )
        image.data = file.read_bytes()
        image.upload(images)
        return image

    def _fill_neutron(self) -> None:
        networks = self.admin.network
        net = networks.create_network(
            name=NETWORK,
            provider_network_type="flat",
            provider_physical_network=settings.PHYSICAL,
            shared=True,
        )
        prefix = network.DATA.prefix
        networks.create_subnet(
            name=NETWORK,
            network_id=net.id,
            ip_version=4,
            cidr=f"{prefix}.0/24",
            gateway_ip=network.DATA.address(0),
            allocation_pools=[{"start": f"{prefix}.100", "end": f"{prefix}.200"}],
        )
        own = self.demo.network
        project = self.demo.current_project_id
        (group,) = own.security_groups(name="default", project_id=project)
        for protocol in ("icmp", "tcp"):
            own.create_security_group_rule(
                security_group_id=group.id,
                direction="ingress",
                ethertype="IPv4",
                protocol=protocol,
            )

    def _make_flavors(self) -> None:
        for name, specs in FLAVORS.items():
            flavor = self.admin.compute.create_flavor(
                name=name, ram=MEMORY_MIB, vcpus=1, disk=DISK_GIB
            )
            if specs:
                self.admin.compute.create_flavor_extra_specs(flavor, dict(specs))

    # -- servers -------------------------------------------------------------------------------

    def create(self, name: str, flavor: str = "plain", **options: Any) -> Server:
        """Ask for a server, as the user demo; :meth:`wait_server` waits for it.

        :param options: of openstacksdk's create_server, such as ``metadata``.
        """
        compute = self.demo.compute
        net = self.demo.network.find_network(NETWORK)
        return compute.create_server(
            name=name,
            image_id=self.demo.image.find_image(IMAGE).id,
            flavor_id=compute.find_flavor(flavor).id,
            networks=[{"uuid": net.id}],
            **options,
        )

    def server(self, uuid: str) -> Server:
        """A server as the administrator sees it now."""
        return self.admin.compute.get_server(uuid)

    def ask_server(self, uuid: str, timeout: float = _SERVER_S) -> Server:
        """As :meth:`server`, asked again when the question fails, as it may on a busy machine.

        :raises openstack.exceptions.NotFoundException: there is none.
        :raises LabError: no answer in time.
        """
        from keystoneauth1.exceptions import ClientException
        from openstack.exceptions import NotFoundException, SDKException

        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.server(uuid)
            except NotFoundException:
                raise
            except (SDKException, ClientException) as e:
                if time.monotonic() > deadline:
                    raise LabError(f"server {uuid} cannot be looked at: {e}") from e
            time.sleep(0.25)

    def wait_server(
        self,
        uuid: str,
        status: str = "ACTIVE",
        host: str | None = None,
        timeout: float = _SERVER_S,
    ) -> Server:
        """Wait until a server has a status, no task, and is on ``host`` if one is named.

        :raises LabError: not in time, or it got into status ERROR.
        """
        deadline = time.monotonic() + timeout
        while True:
            server = self.ask_server(uuid, deadline - time.monotonic())
            if (
                server.status == status
                and server.task_state is None
                and host in (None, server.compute_host)
            ):
                return server
            seen = f"{server.status} ({server.task_state}) on {server.compute_host}"
            if server.status == "ERROR" != status:
                raise LabError(f"server {uuid} is in ERROR: {server.fault}")
            if time.monotonic() > deadline:
                raise LabError(f"server {uuid} is {seen}, not {status} after {timeout:.0f} s")
            time.sleep(0.25)

    def wait_gone(self, uuid: str, timeout: float = _SERVER_S) -> None:
        """Wait until there is no such server.

        :raises LabError: it is still there.
        """
        from openstack.exceptions import NotFoundException

        deadline = time.monotonic() + timeout
        while True:
            try:
                server = self.ask_server(uuid, deadline - time.monotonic())
            except NotFoundException:
                return
            if time.monotonic() > deadline:
                raise LabError(f"server {uuid} is still {server.status} ({server.task_state})")
            time.sleep(0.25)

    def address(self, server: Server) -> str:
        """Its first address."""
        for addresses in server.addresses.values():
            for address in addresses:
                return str(address["addr"])
        raise LabError(f"server {server.id} has no address")

    def guest(self, server: Server) -> LabGuest:
        """What runs in a server, seen from ctl."""
        instance = str(server.instance_name)
        spec = GuestSpec(instance, MEMORY_MIB, ip=self.address(server), uuid=str(server.id))
        return LabGuest(spec, self.lab.host(str(server.compute_host)), moved=True)


def kernel_arguments() -> str:
    """For all guests of the cloud; an image's property."""
    line = f"console=ttyS0 {QUICK} guest_ip=dhcp buffer_mib={Workload().buffer_mib}"
    if len(line) > _MAX_PROPERTY:
        raise LabError(f"the guests' command line has {len(line)} characters, Nova keeps 255")
    return line
