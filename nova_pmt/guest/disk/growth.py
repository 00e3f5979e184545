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

"""Hears of the next write to a file, by inotify(7); for strategies that wait for output.

One event for each time a file is armed, not one for each write: a guest that writes much costs no
more than one that writes once. The kernel has few inotify instances for a user, so all files of a
worker share one, and one thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
from collections.abc import Callable

IN_MODIFY = 0x2
IN_IGNORED = 0x8000
IN_ONESHOT = 0x80000000
#: struct inotify_event without its name, which events of a file itself do not have.
_EVENT = struct.Struct("iIII")

# Python has no call for these.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]


class Watcher:
    """See the module's text.

    :raises OSError: the kernel has no inotify instance left for this user.
    """

    def __init__(self) -> None:
        self._inotify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._inotify < 0:
            raise _error("inotify_init1")
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # an event must not be read before its file is noted
        self._files: dict[int, Callable[[], None]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="disk-output", daemon=True)
        self._thread.start()

    def arm(self, descriptor: int, on_write: Callable[[], None]) -> None:
        """Have ``on_write`` called, by our thread, at the next write to an open file. Any thread.

        :raises OSError: the file cannot be watched, or all is closed.
        """
        path = os.fsencode(f"/proc/self/fd/{descriptor}")
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "nobody watches any more")
            watch = _libc.inotify_add_watch(self._inotify, path, IN_MODIFY | IN_ONESHOT)
            if watch < 0:
                raise _error("inotify_add_watch")
            self._files[watch] = on_write

    def close(self) -> None:
        """No more calls."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        self._thread.join(2.0)
        os.close(self._inotify)
        os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._inotify, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closed:
            poll.poll()
            for on_write in self._written():
                on_write()

    def _written(self) -> list[Callable[[], None]]:
        with self._lock:
            if self._closed:
                return []
            try:
                events = os.read(self._inotify, 4096)
            except BlockingIOError:
                return []
            found = []
            for at in range(0, len(events), _EVENT.size):
                watch, mask, _, _ = _EVENT.unpack_from(events, at)
                if mask & IN_MODIFY and watch in self._files:
                    found.append(self._files[watch])
                elif mask & IN_IGNORED:
                    self._files.pop(watch, None)
            return found


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
