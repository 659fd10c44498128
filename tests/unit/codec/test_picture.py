"""Features tiled to one grey picture."""

from __future__ import annotations

import numpy as np
import pytest

from coinfer.codec.picture import Tiling, join_codes, split_codes
from coinfer.errors import PayloadError
from coinfer.plan import TensorSpec


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 8, 8), (64, 64)),
        ((32, 16, 16), (64, 128)),
        ((16, 2, 3), (8, 12)),
        ((2, 4, 5), (4, 10)),
        ((1, 4, 5), (4, 5)),
        ((24, 5, 6), (15, 48)),
        ((3, 1, 1), (2, 2)),
        ((20,), (3, 8)),
        ((7, 12), (7, 12)),
        ((2, 3, 4, 5), (12, 10)),
        ((), (1, 1)),
    ],
)
def test_tiles_are_2_to_the_half_of_log2_c_wide(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    tiling = Tiling(TensorSpec(name="x", shape=shape))
    assert tiling.shape == expected
    symbols = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture = tiling.picture(np.asarray(symbols))
    assert picture.shape == expected
    np.testing.assert_array_equal(tiling.symbols(picture), symbols)


def test_channels_lie_row_by_row() -> None:
    symbols = np.arange(6, dtype=np.uint8)[:, None, None].repeat(2, axis=1)
    picture = Tiling(TensorSpec(name="x", shape=(6, 2, 1))).picture(symbols)
    assert picture.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 0, 0], [4, 5, 0, 0]]


def test_joined_codes_come_apart() -> None:
    codes = [b"one", b"", b"three"]
    joined = join_codes(codes)
    assert joined == b"\x03\0\0\0one\0\0\0\0three"
    assert split_codes(joined, 3) == codes
    assert join_codes([b"alone"]) == b"alone"


@pytest.mark.parametrize("code", [b"", b"\x05\0\0\0four", b"\xff\xff\xff\xff"])
def test_a_length_beyond_the_end_is_refused(code: bytes) -> None:
    with pytest.raises(PayloadError, match="does not fit"):
        split_codes(code, 2)
