"""Integer frequencies for the entropy coders, and what symbols cost under them.

A prior is a row of counts, one for each symbol, that sums to 2^16.  Every symbol has at least 1, so that
every symbol can be coded, at 16 bits at most.  Symbol s costs log2(2^16 / count[s]) bits.

Channels that look alike share a row, up to `MAX_GROUPS` rows for a tensor.  With ranges per channel that
costs 0.1 to 0.5 % more bytes than a row for each of ResNet-20's 32 or 64 channels (and less than nothing
where few features were seen), and saves most of the coder's calls: one for each row.

A row is its channels' histogram, drawn towards that of the whole tensor, as if `DRAWN_SYMBOLS` symbols of
the tensor had been seen in the group: a group that was seen often keeps its own, one that was seen seldom
takes the tensor's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .tables import PRIOR_BITS, PRIOR_SUM

DRAWN_SYMBOLS = 64.0
MAX_GROUPS = 16
_ROUNDS = 20
# Above, merging would take seconds.
_MERGED_CHANNELS = 256


def histogram(symbols: NDArray[np.uint8], num_levels: int) -> NDArray[np.int64]:
    """(C, L) counts of `symbols` (N, C, n) below `num_levels`."""
    num_channels = symbols.shape[1]
    offsets = (np.arange(num_channels, dtype=np.int64) * num_levels)[None, :, None]
    flat = (symbols + offsets).ravel()
    return np.bincount(flat, minlength=num_channels * num_levels).reshape(num_channels, num_levels)


def group_channels(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(C,) the group of each channel, given its histogram (C, K): which channels share a row.

    Few channels are merged two by two; many by Lloyd's iteration, begun with channels in the order of their entropy,
    which takes less time and loses more bits.  Groups are numbered in the order of their first channel.
    """
    num_channels = len(counts)
    if num_channels <= MAX_GROUPS:
        return np.arange(num_channels, dtype=np.uint8)
    groups = _merged(counts) if num_channels <= _MERGED_CHANNELS else _lloyd(counts)
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.uint8)


def _merged(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(C,) the group of each channel: the two histograms whose union costs the fewest bits more are merged, again."""
    pooled = counts.astype(np.float64)
    groups = np.arange(len(counts))
    own = _bits(pooled)
    more = np.full((len(counts), len(counts)), np.inf)
    for one in range(len(counts) - 1):
        more[one, one + 1 :] = _bits(pooled[one] + pooled[one + 1 :]) - own[one] - own[one + 1 :]
    for _ in range(len(counts) - MAX_GROUPS):
        one, other = divmod(int(more.argmin()), len(counts))
        groups[groups == other] = one
        pooled[one] += pooled[other]
        own[one] = _bits(pooled[one])
        more[other], more[:, other] = np.inf, np.inf
        alive = np.unique(groups)
        change = _bits(pooled[one] + pooled[alive]) - own[one] - own[alive]
        below = alive < one
        more[alive[below], one] = change[below]
        more[one, alive[alive > one]] = change[alive > one]
    return groups


def _bits(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits (...) that all symbols of histograms (..., K) cost under their own shares."""
    total = counts.sum(axis=-1, keepdims=True)
    shares = np.where(counts > 0, counts / np.maximum(total, 1e-300), 1.0)
    bits: NDArray[np.float64] = -(counts * np.log2(shares)).sum(axis=-1)
    return bits


def _lloyd(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(C,) the group of each channel, with the bits that it costs under a group's histogram as its distance."""
    num_channels = len(counts)
    share = (counts + 1e-3) / (counts + 1e-3).sum(axis=1, keepdims=True)
    by_entropy = np.argsort((share * np.log2(share)).sum(axis=1), kind="stable")
    groups = np.empty(num_channels, np.int64)
    groups[by_entropy] = np.arange(num_channels) * MAX_GROUPS // num_channels
    for _ in range(_ROUNDS):
        pooled = np.zeros((MAX_GROUPS, counts.shape[1]))
        np.add.at(pooled, groups, counts)
        # An empty group takes the whole tensor's histogram, and may win channels back.
        pooled[pooled.sum(axis=1) == 0] = counts.sum(axis=0)
        pooled += 0.5
        nearest = (counts @ np.log2(pooled / pooled.sum(axis=1, keepdims=True)).T).argmax(axis=1)
        if (nearest == groups).all():
            break
        groups = nearest
    return groups


def pool(counts: NDArray[np.int64], groups: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(G, K) sums of the histograms (C, K) of each group's channels."""
    pooled = np.zeros((int(groups.max()) + 1, counts.shape[1]), np.int64)
    np.add.at(pooled, groups, counts)
    return pooled


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
