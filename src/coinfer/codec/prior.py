"""Integer frequencies for the entropy coders, and what symbols cost under them.

A prior is a row of counts, one for each symbol, that sums to 2^16.  Every symbol has at least 1, so that
every symbol can be coded, at 16 bits at most.  Symbol s costs log2(2^16 / count[s]) bits.

A channel's row is its own histogram, drawn towards the histogram of the whole tensor, as if
`DRAWN_SYMBOLS` symbols of the tensor had been seen in the channel: a channel that was seen often keeps
its own, one that was seen seldom takes the tensor's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .tables import PRIOR_BITS, PRIOR_SUM

DRAWN_SYMBOLS = 64.0


def histogram(symbols: NDArray[np.uint8], num_levels: int) -> NDArray[np.int64]:
    """(C, L) counts of `symbols` (N, C, n) below `num_levels`."""
    num_channels = symbols.shape[1]
    offsets = (np.arange(num_channels, dtype=np.int64) * num_levels)[None, :, None]
    flat = (symbols + offsets).ravel()
    return np.bincount(flat, minlength=num_channels * num_levels).reshape(num_channels, num_levels)


def frequencies(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """(C, L) integer frequencies for `counts` (C, L), each at least 1, rows that sum to 2^16.

    Rounded by largest remainder: no count is more than one off its share of what the ones leave.
    """
    num_levels = counts.shape[1]
    pooled = counts.sum(axis=0) + 1.0 / num_levels
    drawn = counts + DRAWN_SYMBOLS * pooled / pooled.sum()
    share = drawn / drawn.sum(axis=1, keepdims=True) * (PRIOR_SUM - num_levels)
    whole = np.floor(share).astype(np.int64)
    missing = PRIOR_SUM - num_levels - whole.sum(axis=1, keepdims=True)
    rank = np.argsort(np.argsort(whole - share, axis=1, kind="stable"), axis=1, kind="stable")
    rows: NDArray[np.uint16] = (1 + whole + (rank < missing)).astype(np.uint16)
    return rows


def cost_bits(rows: NDArray[np.uint16]) -> NDArray[np.float64]:
    """(C, L) bits that each symbol costs."""
    return PRIOR_BITS - np.log2(rows.astype(np.float64))
