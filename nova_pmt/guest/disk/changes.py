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

"""What a standby's images lack after their pair broke: bitmaps, and a note beside the logs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

from nova_pmt import exception
from nova_pmt.guest.disk import bitmap
from nova_pmt.guest.disk.discover import GuestDisk
from nova_pmt.guest.disk.log import DiskLog
from nova_pmt.guest.disk.writelog import LogParser
from nova_pmt.guest.monitor import Monitor


def keep_changes(logs: Sequence[DiskLog], monitor: Monitor) -> bool:
    """Note what the guest writes from now on, and what it has written that is not committed.

    Takes the logs' filters off, and leaves their files. The guest may be running: what it writes
    is in the bitmap, or in the log, or in both.

    :returns: false when nothing was committed, so that there is nothing to go on from.
    :raises nova_pmt.exception.GuestError: the changes are not known.
    """
    if not logs:
        return False
    if not min(log.committed_epoch for log in logs):
        return False
    # A worker that died while it released one log after the other: what the last epoch wrote is
    # not in all of them any more, so the standby's images must have it.
    epoch = max(log.committed_epoch for log in logs)
    for log in logs:
        bitmap.keep(log.disk, monitor)
    ranges = {}
    for log in logs:
        log.unplug()
        parser = LogParser(log.disk.spec.size)
        entries = (entry for part in log.unreleased() for entry in parser.feed(part))
        ranges[log.disk.spec.name] = bitmap.coalesce(
            ((entry.offset, entry.length) for entry in entries if entry.length),
            bitmap.MAX_RANGES,
            log.disk.spec.size,
        )
    try:
        bitmap.Note(logs[0].generation, epoch, ranges).write(os.path.dirname(logs[0].path))
    except OSError as error:
        raise exception.DiskLogError(f"what has changed cannot be noted: {error}") from error
    return True


def forget_changes(disks: Iterable[GuestDisk], monitor: Monitor, directory: str) -> None:
    """No bitmap and no note are left."""
    bitmap.Note.delete(directory)
    for disk in disks:
        if not disk.spec.readonly:
            with contextlib.suppress(exception.GuestError):
                bitmap.drop(disk, monitor)
