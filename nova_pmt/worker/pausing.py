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

"""What a process does once so that its pauses are short: no garbage collection by chance, no
page given back to the kernel and faulted in again, the interpreter's lock handed over quickly."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading

from nova_pmt.guest.tracker import SCAN_THREAD

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SWITCH_INTERVAL_S = 5e-5
#: Below every normal process: the guest stands still while this one is waited for.
NICE = -10


def prepare() -> None:
    """Set the process up; call after everything was imported and made."""
    libc = ctypes.CDLL(None, use_errno=True)
    # numpy's temporaries come from the heap, and the heap stays: neither mmap nor brk in a pause
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    # another thread that holds the interpreter's lock lets go of it within this time
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.disable()
    # Linux has it by thread: the caller's, and those that scan for it. Not real time: that takes
    # the CPU from QEMU itself, which saves its devices meanwhile (measured: a longer pause).
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.name == SCAN_THREAD:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread.native_id or 0, NICE)
