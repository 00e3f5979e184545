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


"""Every name of Nova's that is private, and what we make of it.

Nova promises nothing for any of them. Each was read, and run, in the series that its line names;
where a signature differs between them the arguments are passed through.

===========================================  ============  ======================================
name                                         series        difference
===========================================  ============  ======================================
``LibvirtDriver.__init__``: ``_host``,       32, 33, 34
``vif_driver``, ``_uri``,
``_handle_conn_event``
``LibvirtDriver._get_guest_xml``             32, 33, 34    ``old_guest`` since 33
``LibvirtGenericVIFDriver.get_config``       32, 33, 34
``LibvirtDriver._hard_reboot``               32, 33, 34
``LibvirtDriver._ensure_console_log_for_``   32, 33, 34
``instance``, ``_undefine_domain``
``libvirt.utils.fetch_raw_image``            32, 33, 34
``LibvirtDriver._network_api``               32, 33, 34
``LibvirtDriver._live_migration_operation``  32, 33, 34
``host.Host._get_domain``                    32, 33, 34
``ComputeVirtAPI._compute``                  32, 33, 34
``ComputeManager._get_nodes``,               32, 33, 34
``_destroy_evacuated_instances``
``nova.compute.utils.add_instance_fault_``   32, 33, 34
``from_exc``
===========================================  ============  ======================================
"""

from __future__ import annotations

import os
from typing import Any

import nova.conf
import nova.context
from nova.compute import utils as compute_utils
from nova.virt.libvirt import LibvirtDriver, host, vif
from nova.virt.libvirt import utils as libvirt_utils

#: Nova series that all of this was run with.
SERIES = ("32", "33", "34")


class _Host(host.Host):
    """Libvirt's host, on which some servers' domains are other servers'."""

    def __init__(self, driver: Seams, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._driver = driver

    def _get_domain(self, instance: Any) -> Any:
        return super()._get_domain(self._driver.domain_of(instance))


class _Interfaces(vif.LibvirtGenericVIFDriver):
    """What Nova makes of its ports: for a domain's XML, and for an interface that is attached."""

    def __init__(self, driver: Seams, libvirt_host: _Host) -> None:
        super().__init__(libvirt_host)
        self._driver = driver

    def get_config(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        config = super().get_config(instance, *args, **kwargs)
        self._driver.adapt_interface(instance, config)
        return config


class _Migrated:
    """A guest (``nova.virt.libvirt.guest.Guest``) whose destination's XML is adapted."""

    def __init__(self, driver: Seams, guest: Any) -> None:
        self._driver, self._guest = driver, guest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guest, name)

    def migrate(self, destination: str, **kwargs: Any) -> Any:
        xml = kwargs.get("destination_xml")
        if xml is not None:
            running = self._guest.get_xml_desc(dump_migratable=True)
            kwargs["destination_xml"] = self._driver.adapt_migration(xml, running)
        return self._guest.migrate(destination, **kwargs)


class Seams(LibvirtDriver):
    """Nova's libvirt driver, with the places where ours is different under public names."""

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        self._host = _Host(
            self,
            self._uri(),
            read_only,
            lifecycle_event_handler=self.emit_event,
            conn_event_handler=self._handle_conn_event,
        )
        self.vif_driver = _Interfaces(self, self._host)

    # -- what may be overridden -----------------------------------------------------------

    def domain_of(self, instance: Any) -> Any:
        """Whose domain to look up, as something with a ``uuid`` and a ``name``.

        :raises nova.exception.InstanceNotFound: it has none.
        """
        return instance

    def adapt_xml(self, instance: Any, xml: str) -> str:
        """The XML to define for a server, from the one that Nova has made."""
        return xml

    def adapt_migration(self, xml: str, running: str) -> str:
        """The XML of a live migration's destination, from Nova's and the running domain's."""
        return xml

    def adapt_interface(self, instance: Any, config: Any) -> None:
        """Change an interface (``LibvirtConfigGuestInterface``) before it is written as XML."""

    def before_start(self, instance: Any) -> None:
        """The server's domain is about to be made anew, and started."""

    # -- Nova's own names ------------------------------------------------------------------

    def _get_guest_xml(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> str:
        return self.adapt_xml(instance, super()._get_guest_xml(context, instance, *args, **kwargs))

    def _hard_reboot(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        self.before_start(instance)
        return super()._hard_reboot(context, instance, *args, **kwargs)

    def _live_migration_operation(
        self,
        context: Any,
        instance: Any,
        dest: Any,
        block_migration: Any,
        migrate_data: Any,
        guest: Any,
        device_names: Any,
    ) -> None:
        guest = _Migrated(self, guest)
        super()._live_migration_operation(
            context, instance, dest, block_migration, migrate_data, guest, device_names
        )

    # -- what may be called ----------------------------------------------------------------

    def connection(self) -> Any:
        """Nova's connection to libvirt."""
        return self._host.get_connection()

    def fetch_boot_files(self, context: Any, instance: Any) -> None:
        """Kernel and ramdisk of a server, where its XML says that they are; and its console's log,
        which Nova must be able to read.

        As spawn() fetches them, and not as a migration does: that takes a kernel for a disk image
        and refuses its boot sector ("Image does not pass safety check: mbr").
        """
        self._ensure_console_log_for_instance(instance)
        directory = instance_directory(instance.uuid)
        images = {"kernel": instance.kernel_id, "ramdisk": instance.ramdisk_id}
        for name, image in images.items():
            path = os.path.join(directory, name)
            if image and not os.path.exists(path):
                libvirt_utils.fetch_raw_image(
                    context, f"{path}.part", image, instance.trusted_certs
                )
                os.replace(f"{path}.part", path)

    def network_info(self, context: Any, instance: Any) -> Any:
        """The interfaces of a server, as Neutron has them now."""
        return self._network_api.get_instance_nw_info(
            context.elevated(), instance, force_refresh=True
        )

    def undefine(self, instance: Any) -> None:
        """Take away the definition of a server's domain; no error when there is none."""
        self._undefine_domain(instance)

    def finish_evacuations(self) -> None:
        """Clean up after servers that were evacuated from here, as a start of nova-compute does."""
        compute = self.virtapi._compute
        context = nova.context.get_admin_context()
        compute._destroy_evacuated_instances(context, compute._get_nodes(context))


def add_fault(context: Any, instance: Any, error: Exception) -> None:
    """Have users see in ``openstack server show`` why something was not done."""
    compute_utils.add_instance_fault_from_exc(context, instance, error)


def no_such_domain(error: Exception) -> bool:
    """Whether libvirt says that there is no such domain."""
    libvirt = host.libvirt  # imported late by Nova, and replaced by its tests
    return (
        isinstance(error, libvirt.libvirtError)
        and error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN
    )


def instance_directory(uuid: str) -> str:
    """Where Nova keeps the files of a server."""
    return os.path.join(nova.conf.CONF.instances_path, uuid)


def notes_directory(host_name: str) -> str:
    """Where we keep what must survive a restart of nova-compute; beside the servers' files."""
    return os.path.join(nova.conf.CONF.instances_path, "pmt-standbys", host_name)
