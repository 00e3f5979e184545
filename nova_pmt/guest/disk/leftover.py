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

"""Where the write logs of a guest's disks lie, and what a dead worker left there."""

from __future__ import annotations

import os
import shutil
from typing import Any

from oslo_log import log as logging

from nova_pmt import exception
from nova_pmt.guest import process
from nova_pmt.guest.disk import bitmap, discover
from nova_pmt.guest.disk.changes import forget_changes, keep_changes
from nova_pmt.guest.disk.log import DiskLog, recover_all
from nova_pmt.guest.disk.source import DiskSource
from nova_pmt.guest.monitor import Monitor

LOG = logging.getLogger(__name__)


def recover_logs(conf: Any, uuid: str, xml: str, pid: int, monitor: Monitor) -> None:
    """End the logs and the copy of disks that a dead worker left, and note what has changed.

    :raises nova_pmt.exception.GuestError: a disk is still logged.
    """
    directory = log_directory(conf, uuid, pid)
    try:
        disks = [disk for disk in discover.disks(xml, monitor) if not disk.spec.readonly]
    except exception.Refusal as refusal:  # a disk was plugged in that cannot be replicated
        LOG.warning("%s: all of its disks must be copied again: %s", uuid, refusal)
        bitmap.Note.delete(directory)
        recover_all(monitor, directory)
        return
    DiskSource.recover(disks, monitor, os.path.join(conf.guest.runtime_directory, "guests", uuid))
    left = [DiskLog.left(disk, monitor, directory) for disk in disks]
    logs = [log for log in left if log is not None]
    try:
        if len(logs) == len(disks):
            keep_changes(logs, monitor)
    except exception.GuestError as error:
        LOG.warning("%s: all of its disks must be copied again: %s", uuid, error)
        forget_changes(disks, monitor, directory)
    finally:
        for log in logs:
            log.close()
    for disk in disks:
        DiskLog.recover(disk, monitor, directory)


def remove_logs(conf: Any, uuid: str) -> None:
    """The guest is gone from here: its logs are of no use."""
    shutil.rmtree(os.path.join(conf.disk.log_directory, uuid), ignore_errors=True)


def log_directory(conf: Any, uuid: str, pid: int) -> str:
    """Where the logs of a guest's disks are: only root and its QEMU can enter."""
    path = os.path.join(conf.disk.log_directory, uuid)
    os.makedirs(conf.disk.log_directory, mode=0o711, exist_ok=True)
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.chown(path, *process.owner(pid))
    return path
