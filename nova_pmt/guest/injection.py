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

"""System calls made as another process, by ptrace: the way a userfaultfd gets into QEMU.

The main thread of QEMU nearly always sleeps in ``ppoll``; the two bytes before
its instruction pointer are then ``syscall``. We stop it, point its registers at
that instruction with our own number and arguments, single-step it, read the
result, and put everything back. With ``orig_rax`` set to -1 for our calls the
kernel does not try to restart them, and with the original registers restored
it restarts the interrupted ``ppoll`` by itself.

Defensive by design: nothing is written before the architecture, the stop and
the instruction bytes are as expected, and whatever happens the thread is put
back and let go. The whole takes about 0.4 ms.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import time
from types import TracebackType

from nova_pmt import exception

PTRACE_SINGLESTEP, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_DETACH = 9, 12, 13, 17
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
PTRACE_GETSIGMASK, PTRACE_SETSIGMASK = 0x420A, 0x420B
WALL = 0x40000000
PTRACE_EVENT_STOP = 128
SYSCALL_INSTRUCTION = b"\x0f\x05"
#: Below the red zone of the interrupted frame (System V ABI: 128 bytes), and far enough.
SCRATCH_OFFSET = 4096
SCRATCH_BYTES = 256
#: Kept waiting while we are in there; not what the processor raises (and SIGTRAP ends each step).
BLOCKED = 2**64 - 1
for _signal in (signal.SIGTRAP, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
    BLOCKED &= ~(1 << (_signal - 1))
SIGSET_BYTES = 8
STOP_TIMEOUT_S = 0.5
ATTEMPTS = 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Registers(ctypes.Structure):
    """``struct user_regs_struct`` of x86-64 (sys/user.h)."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in [
            "r15",
            "r14",
            "r13",
            "r12",
            "rbp",
            "rbx",
            "r11",
            "r10",
            "r9",
            "r8",
            "rax",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "orig_rax",
            "rip",
            "cs",
            "eflags",
            "rsp",
            "ss",
            "fs_base",
            "gs_base",
            "ds",
            "es",
            "fs",
            "gs",
        ]
    ]


def _ptrace(request: int, pid: int, addr: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, addr, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")


class ForeignCalls:
    """Context manager: make system calls as process ``pid`` while its main thread is stopped.

    :raises nova_pmt.exception.InjectionRefused: the thread could not be
        brought into a state in which this is safe. The process is untouched.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __enter__(self) -> ForeignCalls:
        if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise exception.InjectionRefused(
                f"system calls can be injected on x86-64 only, not on {platform.machine()}"
            )
        last = "unknown"
        for attempt in range(ATTEMPTS):
            try:
                _ptrace(PTRACE_SEIZE, self.pid)
            except OSError as error:
                raise exception.InjectionRefused(
                    f"process {self.pid} cannot be traced: {error.strerror}"
                ) from error
            try:
                if self._stop_in_system_call():
                    return self
                last = "its main thread was not in a system call"
            except (OSError, exception.InjectionRefused) as error:
                last = str(error)
            self._detach()
            time.sleep(0.002 * (attempt + 1))
        raise exception.InjectionRefused(f"process {self.pid}: {last}, {ATTEMPTS} times in a row")

    def _wait_stop(self) -> int:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while True:
            pid, status = os.waitpid(self.pid, WALL | os.WNOHANG)
            if pid:
                if not os.WIFSTOPPED(status):
                    raise exception.InjectionRefused(f"process {self.pid} ended while traced")
                return status
            if time.monotonic() > deadline:
                raise exception.InjectionRefused(f"process {self.pid} did not stop")
            time.sleep(0.0001)

    def _stop_in_system_call(self) -> bool:
        _ptrace(PTRACE_INTERRUPT, self.pid)
        status = self._wait_stop()
        if status >> 16 != PTRACE_EVENT_STOP:
            # A real signal was on its way: hand it over and try again later.
            _ptrace(PTRACE_DETACH, self.pid, 0, os.WSTOPSIG(status))
            return False
        self._saved = Registers()
        _ptrace(PTRACE_GETREGS, self.pid, 0, ctypes.addressof(self._saved))
        if ctypes.c_longlong(self._saved.orig_rax).value < 0:
            return False
        self._mem = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(self._mem, 2, self._saved.rip - 2) != SYSCALL_INSTRUCTION:
                os.close(self._mem)
                return False
            self._scratch = (self._saved.rsp - SCRATCH_OFFSET) & ~0xFF
            self._scratch_saved = os.pread(self._mem, SCRATCH_BYTES, self._scratch)
            if len(self._scratch_saved) != SCRATCH_BYTES:
                raise exception.InjectionRefused("its stack is too small")
            # A signal that came during a step would be lost, and the step not be done.
            self._mask = ctypes.c_uint64()
            _ptrace(PTRACE_GETSIGMASK, self.pid, SIGSET_BYTES, ctypes.addressof(self._mask))
            self._set_mask(BLOCKED)
        except BaseException:
            os.close(self._mem)
            raise
        return True

    def _set_mask(self, signals: int) -> None:
        mask = ctypes.c_uint64(signals)
        _ptrace(PTRACE_SETSIGMASK, self.pid, SIGSET_BYTES, ctypes.addressof(mask))

    def call(self, number: int, *args: int | None, buffer: bytes = b"") -> tuple[int, bytes]:
        """Make one system call.

        :param args: up to six; None stands for the address of ``buffer``.
        :param buffer: bytes (at most 256) that the call may read and write.
        :returns: its result and the buffer as the call left it.
        :raises OSError: what the call itself failed with.
        """
        if len(buffer) > SCRATCH_BYTES:
            raise ValueError("buffer is longer than the scratch area")
        if buffer:
            os.pwrite(self._mem, buffer, self._scratch)
        regs = Registers.from_buffer_copy(self._saved)
        regs.rip, regs.rax, regs.orig_rax = self._saved.rip - 2, number, 2**64 - 1
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), args, strict=False):
            setattr(regs, name, self._scratch if value is None else value)
        _ptrace(PTRACE_SETREGS, self.pid, 0, ctypes.addressof(regs))
        _ptrace(PTRACE_SINGLESTEP, self.pid)
        status = self._wait_stop()
        if os.WSTOPSIG(status) != signal.SIGTRAP:
            raise exception.InjectionRefused(
                f"process {self.pid} stopped with signal {os.WSTOPSIG(status)} in an injected call"
            )
        _ptrace(PTRACE_GETREGS, self.pid, 0, ctypes.addressof(regs))
        result = ctypes.c_longlong(regs.rax).value
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result, os.pread(self._mem, len(buffer), self._scratch) if buffer else b""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            os.pwrite(self._mem, self._scratch_saved, self._scratch)
            _ptrace(PTRACE_SETREGS, self.pid, 0, ctypes.addressof(self._saved))
            self._set_mask(self._mask.value)
        finally:
            os.close(self._mem)
            self._detach()

    def _detach(self) -> None:
        try:
            _ptrace(PTRACE_DETACH, self.pid)
        except OSError:
            # It was detached with a signal already, or has ended: both are what we want.
            return
