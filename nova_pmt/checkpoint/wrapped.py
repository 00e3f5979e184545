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

"""An output buffer in front of another one: everything is passed on, and some of it changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Wrapped:
    """Implements :class:`nova_pmt.checkpoint.interfaces.OutputBuffer` by another one.

    :param buffer: what all is passed on to.
    """

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def cut(self, epoch: int) -> None:
        self._buffer.cut(epoch)

    def release(self, epoch: int) -> float | None:
        held: float | None = self._buffer.release(epoch)
        return held

    def watch(self, on_output: Callable[[], None]) -> None:
        self._buffer.watch(on_output)

    @property
    def waiting_since(self) -> float:
        return float(self._buffer.waiting_since)

    @property
    def pressure(self) -> float:
        return float(self._buffer.pressure)

    @property
    def broken(self) -> str:
        return str(self._buffer.broken)
