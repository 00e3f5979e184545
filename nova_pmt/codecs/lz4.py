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

"""LZ4: little effort, for processors that are the slower half."""

from __future__ import annotations

import lz4.block

from nova_pmt.codecs.base import Codec


class Lz4Codec(Codec):
    """See the module's text. A level -n is the library's acceleration n."""

    levels = (-8, -1)

    def compress(self, data: memoryview, level: int) -> bytes:
        """See the interface."""
        packed: bytes = lz4.block.compress(data, "fast", acceleration=-level, store_size=False)
        return packed

    def decompress(self, packed: memoryview, out: memoryview) -> None:
        """See the interface."""
        try:
            found = lz4.block.decompress(packed, uncompressed_size=len(out))
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from error
        if len(found) != len(out):
            raise ValueError(f"{len(found)} bytes packed where {len(out)} belong")
        out[:] = found
