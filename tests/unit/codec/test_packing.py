"""Packing into bits and zstd, by exact bytes and against bombs."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from coinfer.codec import packing
from coinfer.codec.packing import PackedCoder, pack_bits, unpack_bits
from coinfer.errors import PayloadError


@given(st.data())
def test_pack_bits_round_trip(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 8))
    symbols = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), np.uint8)
    raw = pack_bits(symbols, bits)
    assert len(raw) == -(-len(symbols) * bits // 8)
    assert unpack_bits(raw, bits, len(symbols)).tolist() == symbols.tolist()
    number = 0
    for symbol in symbols.tolist():
        number = number << bits | symbol
    assert int.from_bytes(raw, "big") == number << (-len(symbols) * bits % 8)


@pytest.mark.parametrize("coder", ["none", "zstd"])
def test_packed_code_of_the_wrong_length_is_refused(coder: str) -> None:
    one = PackedCoder(coder, [(2, 8, 4)])
    _, code = one.encode([np.arange(16, dtype=np.uint8).reshape(2, 8)])
    with pytest.raises(PayloadError):
        one.decode(coder, code + b"\0")
    with pytest.raises(PayloadError):
        one.decode(coder, code[:-1])


@pytest.mark.parametrize("coder", ["none", "zstd"])
def test_tensors_of_several_widths_come_back(coder: str) -> None:
    one = PackedCoder(coder, [(2, 3, 6), (1, 5, 4), (3, 1, 1)])
    symbols = [
        np.arange(58, 64, dtype=np.uint8).reshape(2, 3),
        np.arange(5, 10, dtype=np.uint8)[None],
        np.array([[1], [0], [1]], np.uint8),
    ]
    name, code = one.encode(symbols)
    assert name == coder and (coder == "zstd" or len(code) == 5 + 3 + 1)
    for expected, got in zip(symbols, one.decode(name, code), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_packed_symbol_beyond_the_levels_is_refused() -> None:
    one = PackedCoder("zstd", [(1, 40, 3)])
    code = packing.zstd_compress(bytes([7] * 39 + [8]))
    with pytest.raises(PayloadError, match="symbols must be below 8, got 8"):
        one.decode("zstd", code)


def test_a_zstd_bomb_is_refused_before_it_unfolds() -> None:
    bomb = packing.zstd_compress(bytes(50_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(PayloadError, match="zstd"):
        packing.zstd_decompress(bomb, 1000)
    announced = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(
            3, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True, source_size=50_000_000
        )
    ).compress(bytes(50_000_000))
    with pytest.raises(PayloadError, match="1000 B are expected, the frame has 50000000 B"):
        packing.zstd_decompress(announced, 1000)
