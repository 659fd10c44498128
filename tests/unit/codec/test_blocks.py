"""Blocks of neighbouring symbols."""

from __future__ import annotations

import numpy as np
import pytest

from coinfer.codec import calibrate, make_codec
from coinfer.codec.blocks import Blocks, block_shape
from coinfer.plan import CodecSpec, TensorSpec

SHAPES = [(3, 8, 8), (2, 7, 7), (2, 5, 6), (1, 1, 1), (4, 1, 9), (20,), (13, 3), (), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_symbols_come_back_and_blocks_stay_below_256_values(shape: tuple[int, ...], bits: int) -> None:
    tensor = TensorSpec(name="x", shape=shape)
    channels = 1 if not shape else shape[-1] if len(shape) == 2 else shape[0]
    symbols = np.random.default_rng(bits).integers(0, 2**bits, (5, channels, tensor.num_elements // channels))
    blocks = Blocks(tensor, bits)
    joined = blocks.join(symbols.astype(np.uint8))
    assert joined.shape == (5, *blocks.shape) and blocks.block_bits <= 8
    assert joined.max() < 2**blocks.block_bits
    assert blocks.shape[1] * blocks.block_bits >= symbols.shape[2] * bits
    np.testing.assert_array_equal(blocks.split(joined), symbols)


def test_a_block_reads_row_by_row_first_element_highest() -> None:
    plane = np.arange(16, dtype=np.uint8).reshape(1, 1, 16) % 4
    blocks = Blocks(TensorSpec(name="x", shape=(1, 4, 4)), 2)
    assert blocks.shape == (1, 4)
    # Rows of the plane are 0 1 2 3: the left blocks are 0 1 / 0 1, the right ones 2 3 / 2 3.
    assert blocks.join(plane)[0, 0].tolist() == [0b00010001, 0b10111011] * 2


@pytest.mark.parametrize(
    ("height", "width", "bits", "expected"),
    [
        (8, 8, 1, (2, 4)),
        (8, 8, 2, (2, 2)),
        (8, 8, 3, (1, 2)),
        (8, 8, 4, (1, 2)),
        (8, 8, 5, (1, 1)),
        (56, 56, 1, (2, 4)),
        (7, 7, 1, (1, 7)),
        (7, 7, 2, (1, 1)),
        (1, 49, 1, (1, 7)),
        (9, 1, 1, (3, 1)),
    ],
)
def test_the_largest_and_squarest_block_that_divides(
    height: int, width: int, bits: int, expected: tuple[int, int]
) -> None:
    assert block_shape(height, width, bits) == expected


def test_where_none_divides_runs_are_taken_and_filled_up_with_zeros() -> None:
    blocks = Blocks(TensorSpec(name="x", shape=(1, 7, 7)), 2)
    assert (blocks.shape, blocks.block_bits) == ((1, 13), 8)
    joined = blocks.join(np.full((1, 1, 49), 3, np.uint8))
    assert joined[0, 0].tolist() == [255] * 12 + [0b11000000]


def test_blocks_of_a_smooth_feature_cost_less_than_its_single_elements() -> None:
    """Pairs of equal neighbours: the second of a pair says nothing new."""
    rng = np.random.default_rng(0)
    columns = np.maximum(rng.normal(-0.3, 1, (200, 4, 8, 4)), 0).astype(np.float32)
    crossing = (TensorSpec(name="x", shape=(4, 8, 8)),)
    spec = CodecSpec(transform="uniform", bits=3, per_channel=True, coder="range")
    costs = []
    for x in (columns.repeat(2, axis=3), np.concatenate([columns, columns[:, :, ::-1, ::-1]], axis=3)):
        codec = make_codec(spec, crossing, calibrate(spec, crossing, [x]))
        costs.append(codec.roundtrip([x])[1].mean() - 6)
    assert costs[0] < 0.6 * costs[1]
