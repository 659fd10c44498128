"""rANS in many lanes at once: the fast coder for large tensors where no compiled one is at hand.

Symbol i goes to lane i mod K, so that one numpy step codes K symbols (Giesen, 2014, arXiv:1402.3392;
Duda, 2013, arXiv:1311.2540).  A lane's state x lies in [2^32, 2^48), words have 16 bits:

    encode s, backwards   if x >= f[s] << 32: write x's low word, x >>= 16
                          x = (x // f[s] << 16) + x % f[s] + c[s]
    decode s, forwards    slot = x mod 2^16, s = the symbol whose share holds slot
                          x = f[s] * (x >> 16) + slot - c[s];  if x < 2^32: x = x << 16 | next word

K lanes that start at 2^32 would throw away 4 bytes each.  So they start at 2^32 + u, where the u's are 4 bytes
each of a code already made, that of some `HEAD_SYMBOLS` of the symbols (the head, by the wide coder): the
decoder, done with the lanes, holds the u's, and decodes the head from them.  What is left to lose is about 1 B a lane.

    code = K (u16) | K final states, 6 B each | words as the decoder reads them | the head's bytes beyond 4 K
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from .tables import PRIOR_BITS

HEAD_SYMBOLS = 4096
MIN_LANES = 32
MAX_LANES = 1024
_COST_PER_LANE_BYTES = 256
_STATE_BYTES = 6
_SEED_BYTES = 4
_FLOOR_BITS = 32
_WORD_BITS = np.uint64(16)
_WORD_MASK = np.uint64(0xFFFF)


def num_lanes(head_bytes: int, rest_bytes: float) -> int:
    """How many lanes pay: as many as the head's code can seed, and 256 B of code for each; 0 for too few."""
    lanes = min(MAX_LANES, head_bytes // _SEED_BYTES, int(rest_bytes // _COST_PER_LANE_BYTES))
    return lanes if lanes >= MIN_LANES else 0


def encode(head: bytes, lefts: NDArray[np.uint64], shares: NDArray[np.uint64], lanes: int) -> bytes:
    """The code of symbols with cumulative `lefts` and own `shares` out of 2^16, seeded with the code `head`."""
    seeds = np.frombuffer(head, "<u4", count=lanes).astype(np.uint64)
    states = seeds + np.uint64(1 << _FLOOR_BITS)
    limits = shares << np.uint64(_FLOOR_BITS)
    words: list[NDArray[np.uint64]] = []
    last = (len(lefts) - 1) // lanes * lanes
    for start in range(last, -1, -lanes):
        left, share, limit = (row[start : start + lanes] for row in (lefts, shares, limits))
        x = states[: len(left)]
        full = x >= limit
        words.append((x & _WORD_MASK)[full])
        np.right_shift(x, _WORD_BITS, out=x, where=full)
        whole = x // share
        x -= whole * share
        x += left
        whole <<= _WORD_BITS
        x += whole
    stream = np.concatenate(words[::-1]).astype("<u2").tobytes()
    final = states.astype("<u8").view(np.uint8).reshape(lanes, 8)[:, :_STATE_BYTES].tobytes()
    return lanes.to_bytes(2, "little") + final + stream + head[lanes * _SEED_BYTES :]


def decode(code: bytes, cumulative: NDArray[np.int64], channels: NDArray[np.int64]) -> tuple[NDArray[np.uint8], bytes]:
    """The symbols behind the head, and the head's code.

    Args:
        code: what `encode` gave.
        cumulative: (C, L) sums of the frequencies before each symbol, out of 2^16.
        channels: (n,) the channel of each symbol.

    Raises:
        PayloadError: the code is cut short or was not made by `encode`.
    """
    lanes = int.from_bytes(code[:2], "little")
    begin = 2 + lanes * _STATE_BYTES
    if not MIN_LANES <= lanes <= MAX_LANES or len(code) < begin:
        raise PayloadError(
            f"lanes must be {MIN_LANES} to {MAX_LANES} and {begin} B long, got {lanes} and {len(code)} B"
        )
    raw = np.zeros((lanes, 8), np.uint8)
    raw[:, :_STATE_BYTES] = np.frombuffer(code, np.uint8, lanes * _STATE_BYTES, 2).reshape(lanes, _STATE_BYTES)
    states = raw.view("<u8")[:, 0].astype(np.uint64)
    stream = np.frombuffer(code, "<u2", (len(code) - begin) // 2, begin).astype(np.uint64)
    num_levels = cumulative.shape[1]
    # One sorted row for all channels, so that one search finds every lane's symbol.
    ladder = (cumulative + (np.arange(len(cumulative)) << PRIOR_BITS)[:, None]).ravel()
    shares = np.diff(ladder, append=len(cumulative) << PRIOR_BITS).astype(np.uint64)
    bases = channels << PRIOR_BITS
    symbols = np.empty(len(channels), np.uint8)
    used = 0
    for start in range(0, len(channels), lanes):
        base = bases[start : start + lanes]
        x = states[: len(base)]
        slot = (x & _WORD_MASK).astype(np.int64) + base
        found = np.searchsorted(ladder, slot, side="right") - 1
        symbols[start : start + len(base)] = found % num_levels
        x >>= _WORD_BITS
        x *= shares[found]
        x += (slot - ladder[found]).astype(np.uint64)
        empty = x < np.uint64(1 << _FLOOR_BITS)
        count = int(np.count_nonzero(empty))
        if used + count > len(stream):
            raise PayloadError(f"the code of {len(code)} B ends before its symbols do (rANS lanes)")
        x[empty] = x[empty] << _WORD_BITS | stream[used : used + count]
        used += count
    if (states >> np.uint64(_FLOOR_BITS) != 1).any():
        raise PayloadError(f"the code of {len(code)} B does not end where it began (rANS lanes)")
    seeds = (states & np.uint64(0xFFFFFFFF)).astype("<u4").tobytes()
    return symbols, seeds + code[begin + 2 * used :]
