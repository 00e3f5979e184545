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

"""What a codec must do."""

from __future__ import annotations

import abc
from typing import ClassVar


class Codec(abc.ABC):
    """Compresses bytes, at one of its levels. Used by one thread, which others do not wait for:
    let go of the interpreter's lock.
    """

    #: Fastest first; at least one.
    levels: ClassVar[tuple[int, ...]]

    @abc.abstractmethod
    def compress(self, data: memoryview, level: int) -> bytes:
        """Something that :meth:`decompress` makes ``data`` of."""

    @abc.abstractmethod
    def decompress(self, packed: memoryview, out: memoryview) -> None:
        """Fill ``out``. Never uses more memory than a small multiple of its size, whatever
        ``packed`` is: that comes from the network.

        :raises ValueError: ``packed`` is not what :meth:`compress` made of so many bytes.
        """
