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

"""Zstandard: from as fast as a fast network to as small as it gets."""

from __future__ import annotations

import zstandard

from nova_pmt.codecs.base import Codec


class ZstdCodec(Codec):
    """See the module's text."""

    levels = (-5, -1, 1, 3, 6)

    def __init__(self) -> None:
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}
        self._decompressor = zstandard.ZstdDecompressor()

    def compress(self, data: memoryview, level: int) -> bytes:
        """See the interface."""
        compressor = self._compressors.get(level)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level, write_content_size=True)
            self._compressors[level] = compressor
        packed: bytes = compressor.compress(data)
        return packed

    def decompress(self, packed: memoryview, out: memoryview) -> None:
        """See the interface."""
        try:
            # Before memory is found for it: the library believes what the frame says of its size.
            size = zstandard.get_frame_parameters(packed).content_size
            if size != len(out):
                raise ValueError(f"{size} bytes packed where {len(out)} belong")
            out[:] = self._decompressor.decompress(packed, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
