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

"""Stands for QEMU in the tests of the tracker: memory, and a main thread that sleeps in read(2).

Told by JSON lines on stdin what to do; answers each on stdout. Run as a program of its own.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import sys
import threading
from typing import Any

PAGE = 4096


class Child:
    def __init__(self, blocks: list[dict[str, Any]]) -> None:
        self.blocks = []
        self.stop = threading.Event()
        self.writers: list[threading.Thread] = []
        self.signals = 0
        self.writes = 0
        signal.signal(signal.SIGUSR1, self._on_signal)
        for block in blocks:
            size = block["pages"] * PAGE
            if block["kind"] == "shared":
                fd = os.memfd_create("child-ram")
                os.ftruncate(fd, size)
                memory = mmap.mmap(fd, size)
                os.close(fd)
            else:
                memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                memory.madvise(
                    mmap.MADV_HUGEPAGE if block["kind"] == "huge" else mmap.MADV_NOHUGEPAGE
                )
            self.blocks.append(memory)

    def _on_signal(self, *_: Any) -> None:
        self.signals += 1

    def addresses(self) -> list[int]:
        return [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self.blocks]

    def write(self, block: int, pages: list[int], value: int) -> None:
        for page in pages:
            self.blocks[block][page * PAGE : page * PAGE + 8] = value.to_bytes(8, "little")

    def discard(self, block: int, page: int, count: int, how: str) -> None:
        self.blocks[block].madvise(getattr(mmap, how), page * PAGE, count * PAGE)

    def _scribble(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop.is_set():
            block = rng.choice(self.blocks)
            at = rng.randrange(len(block) // PAGE) * PAGE
            block[at : at + PAGE] = rng.randbytes(8) * (PAGE // 8)
            self.writes += 1

    def handle(self, command: dict[str, Any]) -> Any:
        name = command.pop("do")
        if name == "write":
            self.write(**command)
        elif name == "discard":
            self.discard(**command)
        elif name == "unmap":
            self.blocks[command["block"]].close()
        elif name == "scribble":
            self.writers = [
                threading.Thread(target=self._scribble, args=(n,), daemon=True) for n in range(2)
            ]
            for writer in self.writers:
                writer.start()
        elif name == "rest":
            self.stop.set()
            for writer in self.writers:
                writer.join()
            return self.writes
        elif name == "signals":
            return self.signals
        elif name == "spin":
            # No system call until a page that the test can write to says so.
            flag = self.blocks[command["block"]]
            print(json.dumps("spinning"), flush=True)
            while not flag[0]:
                pass
        return True


def main() -> None:
    child = Child(json.loads(sys.argv[1]))
    print(json.dumps(child.addresses()), flush=True)
    while line := sys.stdin.buffer.raw.readline():
        print(json.dumps(child.handle(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
