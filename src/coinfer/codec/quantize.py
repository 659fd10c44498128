"""Values to symbols and back: the uniform quantiser with static ranges.

    symbol = clip(round((x - low) / step), 0, L - 1)        x_hat = levels[symbol] = low + step * symbol

`low` and `step` are chosen once, on calibration features, for the whole tensor or for each channel, so
that the mean squared error is least: at few bits it pays to clip the tail, at 8 it hardly does.  Where
the smallest value holds a mass of its own (ReLU: exact zeros), it stays symbol 0 exactly.

Codes of an int8 network (uint8) go the same way, by a table of 256 entries; at 8 bits they are their own
symbols and nothing is lost.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from ..plan import TensorSpec

_ZERO = np.float32(0)
_NUM_BINS = 1024
_FLOOR_SHARE = 0.05
_SHRINKS = np.geomspace(1.0, 0.04, 40)
_REFINES = np.linspace(0.7, 1.3, 13)


def num_channels(spec: TensorSpec) -> int:
    """Channels of one crossing tensor: the last axis of (T, C), the first of any other shape."""
    return 1 if not spec.shape else spec.shape[-1] if len(spec.shape) == 2 else spec.shape[0]


def to_channels(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    """`array` (N, *shape) as (N, C, n); a view where the layout allows it."""
    if len(spec.shape) == 2:
        return array.transpose(0, 2, 1)
    return array.reshape(len(array), num_channels(spec), -1)


def from_channels(spec: TensorSpec, channels: NDArray[Any]) -> NDArray[Any]:
    """(N, C, n) back to a C-contiguous (N, *shape)."""
    if len(spec.shape) == 2:
        return np.ascontiguousarray(channels.transpose(0, 2, 1))
    return channels.reshape(len(channels), *spec.shape)


def quantize(
    x: NDArray[np.float32], low: NDArray[np.float32] | None, per_step: NDArray[np.float32], num_levels: int
) -> NDArray[np.uint8]:
    """Symbols (N, C, n) of values `x` (N, C, n); low and per_step = 1 / step (G, 1), G of 1 or C; low None is 0.

    Raises:
        CodecError: `x` holds NaN or infinity.

    `low + step * symbols` is within `step / 2` of every `x` that is not clipped, up to rounding.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = x * per_step if low is None else (x - low) * per_step
        total = float(np.add.reduce(scaled, axis=None))
    # A sum is finite only if every term is; where it is not, a term may just be large.
    if not math.isfinite(total) and not np.isfinite(x).all():
        raise CodecError("a feature must be finite, got NaN or infinity")
    np.rint(scaled, out=scaled)
    np.maximum(scaled, _ZERO, out=scaled)
    np.minimum(scaled, np.float32(num_levels - 1), out=scaled)
    symbols: NDArray[np.uint8] = scaled.astype(np.uint8)
    return symbols


def take_channels(table: NDArray[Any], symbols: NDArray[np.uint8]) -> NDArray[Any]:
    """(N, C, n) entries of `table` (G, L) at `symbols` (N, C, n)."""
    if len(table) == 1:
        return np.asarray(np.take(table[0], symbols))
    flat = symbols + (np.arange(len(table), dtype=np.int32) * table.shape[1])[:, None]
    return np.asarray(np.take(table.reshape(-1), flat))


def grid(
    features: NDArray[Any], num_levels: int, *, per_channel: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`low` and `step` (G,) with the least mean squared error on `features` (N, C, n).

    Raises:
        CodecError: there are no features, or they hold NaN or infinity.
    """
    if features.size == 0:
        raise CodecError("calibration needs at least one feature, got none")
    if not np.isfinite(features).all():
        raise CodecError("calibration features must be finite, got NaN or infinity")
    if features.dtype == np.uint8 and num_levels == 256:
        groups = features.shape[1] if per_channel else 1
        return np.zeros(groups, np.float32), np.ones(groups, np.float32)
    rows = features.transpose(1, 0, 2).reshape(features.shape[1], -1) if per_channel else features.reshape(1, -1)
    density = _Density(rows.astype(np.float32, copy=False))
    low, high = density.search(num_levels)
    # A constant channel has no range, and any positive step sends it exactly; its neighbours' is the best guess.
    step = (high - low) / (num_levels - 1)
    usual = np.median(step[step > 0]) if (step > 0).any() else 1.0
    step = np.where(step > 0, step, usual)
    return low.astype(np.float32), np.maximum(step, np.finfo(np.float32).tiny).astype(np.float32)


class _Density:
    """Histograms of G rows, and the search for the clipping range over them."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self.low = rows.min(axis=1).astype(np.float64)
        self.high = rows.max(axis=1).astype(np.float64)
        at_floor = np.count_nonzero(rows == self.low[:, None].astype(np.float32), axis=1) / rows.shape[1]
        # One floor for all channels keeps a seldom active channel from losing its exact zero.
        self.has_floor = (at_floor >= _FLOOR_SHARE) | ((self.low == 0) & (at_floor > 0))
        self.mean = np.where(self.has_floor, self.low, rows.mean(axis=1, dtype=np.float64))
        num_bins = int(np.clip(rows.shape[1] // 4, 32, max(64, min(_NUM_BINS, (1 << 16) // len(rows)))))
        width = np.where(self.high > self.low, (self.high - self.low) / num_bins, 1.0)
        index = ((rows - self.low[:, None].astype(np.float32)) * (1 / width).astype(np.float32)[:, None]).astype(
            np.int64
        )
        np.minimum(index, num_bins - 1, out=index)
        index += (np.arange(len(rows)) * num_bins)[:, None]
        flat, size = index.ravel(), len(rows) * num_bins
        count = np.bincount(flat, minlength=size)
        total = np.bincount(flat, weights=rows.ravel(), minlength=size)
        self.weight = count.reshape(len(rows), num_bins) / rows.shape[1]
        self.value = (total / np.maximum(count, 1)).reshape(len(rows), num_bins)
        self.width = width

    def error(self, low: NDArray[np.float64], high: NDArray[np.float64], num_levels: int) -> NDArray[np.float64]:
        """(G,) mean squared error with the range [low, high]; bins count as points at their mean.

        Where a step is not much wider than a bin, points say too little, and the error within the range
        is that of an even spread, step^2 / 12.
        """
        step = np.maximum((high - low) / (num_levels - 1), 1e-30)[:, None]
        position = (self.value - low[:, None]) / step
        nearest = np.clip(np.rint(position), 0, num_levels - 1)
        square = ((position - nearest) * step) ** 2
        inside = (position > -0.5) & (position < num_levels - 0.5)
        is_floor = self.has_floor[:, None] & (self.value <= self.low[:, None] + self.width[:, None] * 1e-6)
        fine = (step < 6 * self.width[:, None]) & inside & ~is_floor
        return np.asarray((self.weight * np.where(fine, step**2 / 12, square)).sum(axis=1))

    def search(self, num_levels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(G,) low and (G,) high: both drawn in together, then each by itself."""
        down, up = self.mean - self.low, self.high - self.mean
        best = np.full(len(self.low), np.inf)
        down_factor, up_factor = np.ones_like(best), np.ones_like(best)
        trials = [(shrink, shrink) for shrink in _SHRINKS]
        for first, second in trials:
            best, down_factor, up_factor = self._keep(
                best, down_factor, up_factor, np.full_like(best, first), np.full_like(best, second), num_levels
            )
        for factor in _REFINES:
            best, down_factor, up_factor = self._keep(
                best, down_factor, up_factor, down_factor, np.minimum(up_factor * factor, 1.0), num_levels
            )
        for factor in _REFINES:
            if self.has_floor.all():
                break
            best, down_factor, up_factor = self._keep(
                best, down_factor, up_factor, np.minimum(down_factor * factor, 1.0), up_factor, num_levels
            )
        return self.mean - down * down_factor, self.mean + up * up_factor

    def _keep(
        self,
        best: NDArray[np.float64],
        down_factor: NDArray[np.float64],
        up_factor: NDArray[np.float64],
        new_down: NDArray[np.float64],
        new_up: NDArray[np.float64],
        num_levels: int,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The better of the range so far and the new one, row by row."""
        low = self.mean - (self.mean - self.low) * new_down
        high = self.mean + (self.high - self.mean) * new_up
        error = self.error(low, high, num_levels)
        better = error < best
        return (
            np.where(better, error, best),
            np.where(better, new_down, down_factor),
            np.where(better, new_up, up_factor),
        )
