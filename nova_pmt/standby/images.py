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

"""The images of standbys on this host, as this host is configured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from oslo_log import log

from nova_pmt import exception
from nova_pmt.guest import domain as guest_domain
from nova_pmt.guest.disk.spec import DiskSpec
from nova_pmt.standby import imagerecord
from nova_pmt.standby.disks import StandbyDisks

LOG = log.getLogger(__name__)


def records_directory(conf: Any) -> str:
    """Where it is written down which images are ours."""
    return os.path.join(conf.state_path, "images")


def images_are_kept(conf: Any, uuid: str) -> bool:
    """Whether there are images of a standby that the next synchronisation can go on from."""
    record = imagerecord.load(records_directory(conf), uuid)
    return record is not None and record.role == "standby" and record.consistent is not None


def became_primary(conf: Any, uuid: str) -> None:
    """A guest runs on the images of a standby now, whose worker could not say so."""
    record = imagerecord.load(records_directory(conf), uuid)
    if record is None:
        return
    with standby_disks(conf, uuid, [image.disk for image in record.images]) as disks:
        disks.became_primary()
        try:
            disks.sync()
        except exception.DiskImageError as error:
            LOG.error("%s: %s", uuid, error)


def forget_primary(conf: Any, uuid: str) -> None:
    """No standby may be made over the images of a primary on this host any more."""
    record = imagerecord.load(records_directory(conf), uuid)
    if record is not None and record.role == "primary":
        imagerecord.forget(records_directory(conf), uuid)


def standby_disks(conf: Any, uuid: str, specs: Sequence[DiskSpec]) -> StandbyDisks:
    """The images of one standby; nothing is made yet."""
    return StandbyDisks(
        list(specs),
        uuid,
        state_directory=records_directory(conf),
        owner=guest_domain.qemu_owner(conf),
        runtime_directory=os.path.join(conf.guest.runtime_directory, "images"),
    )
