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

"""Activation: the waiting QEMU gets a short incoming migration and runs.

Main memory lies in place already. The stream brings the machine's configuration, the ROMs,
tracked blocks other than main memory, and the device state of the last commit; QEMU leaves main
memory as it is since no page of it is in the stream.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

from nova_pmt import exception
from nova_pmt.guest.monitor import Monitor
from nova_pmt.guest.vmstate import activation_tail

POLL_S = 0.001


def load(
    monitor: Monitor,
    directory: str,
    head: bytes,
    side_blocks: Mapping[str, bytes | bytearray],
    device_state: bytes,
    timeout_s: float = 10.0,
) -> None:
    """Load the state into a QEMU that was started with ``-incoming defer``. It stays paused.

    :param directory: where QEMU can make a socket.
    :param head: :func:`nova_pmt.guest.vmstate.activation_head`, as the primary sent it.
    :raises nova_pmt.exception.GuestError: QEMU did not take it; it is of no use any more.
    """
    path = os.path.join(directory, "incoming.sock")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    tail = activation_tail(side_blocks, device_state)
    monitor.execute("migrate-incoming", uri="unix:" + path)
    deadline = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout_s)
            sock.connect(path)
            sock.sendall(head)
            sock.sendall(tail)
            while True:
                status = monitor.execute("query-migrate").get("status")
                if status == "completed":
                    return
                if status == "failed" or time.monotonic() > deadline:
                    raise exception.GuestError(
                        f"QEMU did not take the state over (status '{status}')",
                        code="ACTIVATION_FAILED",
                    )
                time.sleep(POLL_S)
    except OSError as error:
        raise exception.GuestError(
            f"QEMU's socket for the state failed: {error}", code="ACTIVATION_FAILED"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
