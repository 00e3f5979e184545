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
page given back to the kernel and faulted in again, the interpreter's lock handed over quickly.
And what it does for the rounds: the threads that a guest waits for do not wait for a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MCL_CURRENT = 1
SWITCH_INTERVAL_S = 5e-5
#: Below every normal process: the guest stands still while this one is waited for.
NICE = -10
#: Above every normal thread, below every other one of real time.
REALTIME_PRIORITY = 1


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
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


def hurry(thread_names: tuple[str, ...] = ()) -> None:
    """Run the calling thread, and those of these names, as soon as they have something to do.

    On a busy host a pause otherwise lasts as long as somebody else's time slice, several
    milliseconds, each time that QEMU has answered. The threads sleep between rounds, and the
    kernel's throttle of real-time threads (``sched_rt_runtime_us``) stands above them. Without
    the right to do so (CAP_SYS_NICE) all stays as it was.
    """
    urgent = os.sched_param(REALTIME_PRIORITY)
    current = threading.current_thread()
    for thread in threading.enumerate():
        if thread.native_id and (thread is current or thread.name in thread_names):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(thread.native_id, os.SCHED_RR, urgent)
