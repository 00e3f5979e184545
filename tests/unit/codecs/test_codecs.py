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

"""Every codec gives back what it was given, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_pmt.codecs.base import Codec
from nova_pmt.codecs.lz4 import Lz4Codec
from nova_pmt.codecs.zstd import ZstdCodec

CODECS: list[Codec] = [ZstdCodec(), Lz4Codec()]
LEVELS = [(codec, level) for codec in CODECS for level in codec.levels]

codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda one: type(one).__name__)
pieces = st.one_of(
    st.binary(min_size=1, max_size=9000),
    st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 400)).map(
        lambda part: part[0] * part[1]
    ),
)


def unpacked(codec: Codec, packed: bytes, size: int) -> bytes:
    out = bytearray(size)
    codec.decompress(memoryview(packed), memoryview(out))
    return bytes(out)


@given(pieces, st.sampled_from(LEVELS))
def test_what_was_packed_comes_back(data: bytes, how: tuple[Codec, int]) -> None:
    codec, level = how
    assert unpacked(codec, codec.compress(memoryview(data), level), len(data)) == data


@codecs
def test_what_repeats_gets_smaller(codec: Codec) -> None:
    data = b"the same again. " * 4096
    for level in codec.levels:
        assert len(codec.compress(memoryview(data), level)) < len(data) / 10


@codecs
@pytest.mark.parametrize("more", [-1, 1, 4096])
def test_another_size_than_was_said_is_refused(codec: Codec, more: int) -> None:
    packed = codec.compress(memoryview(b"page" * 1024), codec.levels[0])
    with pytest.raises(ValueError):
        unpacked(codec, packed, 4096 + more)


@codecs
@settings(max_examples=200)
@given(data=st.binary(max_size=300), size=st.integers(1, 5000))
def test_nonsense_is_refused_or_fills_exactly_what_there_is(
    codec: Codec, data: bytes, size: int
) -> None:
    try:
        assert len(unpacked(codec, data, size)) == size
    except ValueError:
        return


@codecs
def test_what_is_cut_short_or_goes_on_is_refused(codec: Codec) -> None:
    packed = codec.compress(memoryview(bytes(range(256)) * 16), codec.levels[-1])
    for wrong in (packed[:-1], packed + b"x", b""):
        with pytest.raises(ValueError):
            unpacked(codec, wrong, 4096)


def test_a_bomb_is_found_out_before_memory_is_found_for_it() -> None:
    codec = ZstdCodec()
    bomb = codec.compress(memoryview(bytes(1 << 24)), 1)
    assert len(bomb) < 4096
    with pytest.raises(ValueError, match="16777216 bytes packed where 4096 belong"):
        unpacked(codec, bomb, 4096)
