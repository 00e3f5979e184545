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

"""Makes a standby that went on an ordinary domain: no mark, a definition that can be started."""

from __future__ import annotations

import contextlib

import libvirt

from nova_pmt import exception
from nova_pmt.guest.domain import Domain
from nova_pmt.guest.monitor import Monitor
from nova_pmt.standby import domainxml

#: QEMU tells the switches where the guest's addresses are now, a few times.
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


def settle(domain: Domain, monitor: Monitor) -> None:
    """See the module's text. Idempotent; the guest runs whatever fails here.

    :raises nova_pmt.exception.GuestError: the domain runs, but is not as it should be.
    """
    with contextlib.suppress(exception.GuestError):
        monitor.execute("announce-self", **ANNOUNCE)
    mark = domainxml.read_mark(domain.xml())
    try:
        domain.handle.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT,
            None,
            "pmt",
            domainxml.PMT_NS,
            libvirt.VIR_DOMAIN_AFFECT_LIVE,
        )
        if mark is not None and mark.persistent:
            xml = domain.xml(libvirt.VIR_DOMAIN_XML_SECURE)
            domain.connection.defineXML(domainxml.definition_xml(xml))
    except libvirt.libvirtError as error:
        raise exception.GuestError(
            f"domain {domain.name} runs, but is not as it should be: {error}"
        ) from error
