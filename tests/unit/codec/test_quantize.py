"""The uniform quantiser and its static ranges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coinfer.codec.quantize import CLIPPED_RECTIFIED, Lookup, from_channels, grid, num_channels, quantize, to_channels
from coinfer.errors import CodecError
from coinfer.plan import TensorSpec


@given(
    x=arrays(np.float32, (2, 3, 7), elements=st.floats(-50, 50, width=32)),
    low=st.floats(-60, 60, width=32),
    step=st.floats(np.float32(0.01), 10, width=32),
    bits=st.integers(1, 8),
)
def test_restored_is_within_half_a_step_of_what_is_not_clipped(
    x: np.ndarray, low: float, step: float, bits: int
) -> None:
    symbols = quantize(x, np.float32([[low]]), 1 / np.float32([[step]]), 2**bits)
    x_hat = low + step * symbols.astype(np.float64)
    inside = np.clip(x.astype(np.float64), low, low + step * (2**bits - 1))
    assert np.abs(inside - x_hat).max() <= step / 2 + 1e-4


def test_exact_symbols_by_hand() -> None:
    x = np.float32([[[-1.0, 0.0, 0.49, 0.51, 2.9, 99.0]]])
    assert quantize(x, None, np.float32([[1.0]]), 4).tolist() == [[[0, 0, 0, 1, 3, 3]]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused(value: float) -> None:
    with pytest.raises(CodecError, match="finite"):
        quantize(np.float32([[[0, value]]]), None, np.float32([[1.0]]), 4)


def test_large_values_whose_sum_is_not_finite_are_clipped() -> None:
    x = np.full((1, 1, 3), 3e38, np.float32)
    assert quantize(x, None, np.float32([[1e10]]), 16).tolist() == [[[15, 15, 15]]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_rectified_feature_keeps_its_zero_exactly(bits: int) -> None:
    rng = np.random.default_rng(bits)
    x = np.maximum(rng.normal(-0.2, 1, (50, 4, 30)), 0).astype(np.float32)
    for per_channel in (True, False):
        low, step = grid(x, bits, per_channel=per_channel)
        assert low.tolist() == [0.0] * (4 if per_channel else 1)
        clipped = (x > (low + step * (2**bits - 1) * 1.000001)[:, None]).mean()
        assert clipped <= 1.5 * CLIPPED_RECTIFIED[bits - 1] + len(low) / x.size


@pytest.mark.parametrize(("bits", "best"), [(1, 1.596), (2, 0.996), (3, 0.586), (4, 0.335)])
def test_a_signed_feature_has_about_maxs_step(bits: int, best: float) -> None:
    """Max, 1960 (IRE Trans. Inf. Theory 6): steps of the best uniform quantiser of a unit normal."""
    x = np.random.default_rng(0).normal(0, 1, (200, 1, 500)).astype(np.float32)
    low, step = grid(x, bits, per_channel=False)
    assert step[0] == pytest.approx(best, rel=0.06)
    assert low[0] == pytest.approx(-best * (2**bits - 1) / 2, rel=0.06)


def test_a_constant_channel_keeps_its_value_and_takes_its_neighbours_step() -> None:
    x = np.zeros((4, 3, 5), np.float32)
    x[:, 1] = 2.5
    x[:, 2] = np.linspace(0, 3, 5)
    low, step = grid(x, 2, per_channel=True)
    assert low.tolist() == [0.0, 2.5, 0.0]
    assert step[0] == step[1] == step[2] > 0
    low, step = grid(x[:, :1], 2, per_channel=True)
    assert (low[0], step[0]) == (0.0, 1.0)


def test_a_seldom_active_channel_has_a_range() -> None:
    x = np.zeros((1000, 1, 10), np.float32)
    x[3, 0, 3] = 8.0
    low, step = grid(x, 1, per_channel=True)
    assert (low[0], step[0]) == (0.0, 2.0)


def test_fill_makes_the_steps_larger() -> None:
    x = np.linspace(0, 7, 80, dtype=np.float32).reshape(1, 1, 80).repeat(3, axis=0)
    _, full = grid(x, 8, per_channel=False)
    _, half = grid(x, 8, per_channel=False, fill=0.5)
    assert half[0] == pytest.approx(2 * full[0])


def test_codes_of_an_int8_network_are_their_own_symbols_at_8_bits() -> None:
    codes = np.arange(60, dtype=np.uint8).reshape(2, 3, 10)
    low, step = grid(codes, 8, per_channel=True)
    assert (low.tolist(), step.tolist()) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((0, 3, 4), np.float32), "at least one feature"),
        (np.full((1, 3, 4), np.nan, np.float32), "finite"),
    ],
)
def test_features_that_calibrate_nothing_are_refused(features: np.ndarray, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        grid(features, 4, per_channel=True)


@pytest.mark.parametrize(
    ("shape", "channels", "rows"),
    [((4, 2, 3), 4, (4, 6)), ((5,), 5, (5, 1)), ((7, 3), 3, (3, 7)), ((), 1, (1, 1)), ((2, 3, 4, 5), 2, (2, 60))],
)
def test_channels_there_and_back(shape: tuple[int, ...], channels: int, rows: tuple[int, int]) -> None:
    spec = TensorSpec(name="x", shape=shape)
    x = np.random.default_rng(0).normal(size=(3, *shape))
    rolled = to_channels(spec, x)
    assert num_channels(spec) == channels and rolled.shape == (3, *rows)
    np.testing.assert_array_equal(from_channels(spec, rolled), x)
    if len(shape) == 2:
        np.testing.assert_array_equal(rolled[1, 2], x[1, :, 2])


def test_lookup_takes_each_channels_row_or_the_one() -> None:
    symbols = np.array([[[0, 1], [1, 1]]], np.uint8)
    assert Lookup(np.array([[10, 11], [20, 21]]), 2)(symbols).tolist() == [[[10, 11], [21, 21]]]
    assert Lookup(np.array([[10, 11]]), 2)(symbols).tolist() == [[[10, 11], [11, 11]]]
