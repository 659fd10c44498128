"""The arithmetic coder itself, in integers of any size: what the bytes of "range" and "wide" mean.

The code is a number in [0, 1), written in base 256, that lies in the interval which the symbols leave
over; each symbol cuts the interval to its share.  Interval [low, low + width) is kept in words of 32
bits, with `width` of `state_bits` bits (64 for "range", 128 for "wide"):

    scale = width >> 24;  low += scale * cumulative[s];  width = scale * (cumulative[s + 1] - cumulative[s])
    while width < 2^(state_bits - 32):  width <<= 32, low <<= 32    (one more word)

This is constriction's range coder (Bamler, 2022, arXiv:2201.01741, stream.queue, 24-bit precision), step by
step; only the end differs.  constriction ends on a 32-bit word; here the code is the shortest byte string
that, continued by zero bytes for ever, lies in the interval (and of these the smallest number).  It has
at most ceil(-log2(width) / 8) bytes, needs no length or end mark, never ends in a zero byte, and its
decoder reads zeros behind it.

`scale` drops up to 24 bits of `width`.  With 64 bits that costs 0.00013 bit a symbol on average, which is much
for symbols that cost 0.001 bit themselves; with 128 bits it costs nothing that could be measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from .tables import PRIOR_BITS

PRECISION = 24
WORD_BITS = 32


def cumulative(frequencies: NDArray[np.uint16]) -> NDArray[np.int64]:
    """(C, L + 1) cumulative frequencies out of 2^24, for rows (C, L) out of 2^16.

    constriction's own rule for exact probabilities with `perfect=False`, in integers: the cumulative
    share of 2^24 - L rounded down, and one more for every symbol.
    """
    num_levels = frequencies.shape[1]
    sums = np.zeros((len(frequencies), num_levels + 1), dtype=np.int64)
    np.cumsum(frequencies, axis=1, out=sums[:, 1:])
    return np.asarray((sums * ((1 << PRECISION) - num_levels) >> PRIOR_BITS) + np.arange(num_levels + 1))


def shortest(low: int, width: int, num_bits: int) -> bytes:
    """The shortest code in [low, low + width) / 2^num_bits, of these the smallest number; 8 divides num_bits.

    >>> shortest(0x123456, 0x10000, 24).hex()
    '13'
    """
    # No multiple of 2^drop need be inside while 2^drop > width; once 2^drop <= width, one always is.
    drop = min(-(-width.bit_length() // 8) * 8, num_bits)
    while -(-low >> drop) << drop >= low + width:
        drop -= 8
    return (-(-low >> drop)).to_bytes((num_bits - drop) // 8, "big").rstrip(b"\0")


def encode(lefts: Sequence[int], shares: Sequence[int], *, state_bits: int) -> bytes:
    """The code of a row of symbols, given each one's cumulative frequency and own share out of 2^24."""
    mask, least, top = (1 << state_bits) - 1, 1 << (state_bits - WORD_BITS), state_bits - WORD_BITS
    low, width = 0, mask
    words: list[int] = []
    for left, share in zip(lefts, shares, strict=True):
        scale = width >> PRECISION
        low += scale * left
        width = scale * share
        if width < least:
            words.append(low >> top)
            low = (low << WORD_BITS) & mask
            width <<= WORD_BITS
    return shortest(_join(words, low, state_bits), width, WORD_BITS * len(words) + state_bits)


def _join(words: list[int], low: int, state_bits: int) -> int:
    """One integer out of the words and the state; what a word has above 32 bits is carried to the one before."""
    carry = low >> state_bits
    for index in range(len(words) - 1, -1, -1):
        carried = words[index] + carry
        words[index], carry = carried & 0xFFFFFFFF, carried >> WORD_BITS
    head = int.from_bytes(np.array(words, dtype=">u4").tobytes(), "big")
    return head << state_bits | low & ((1 << state_bits) - 1)


def decode(code: bytes, tables: NDArray[np.int64], lengths: Sequence[int], *, state_bits: int) -> list[list[int]]:
    """The symbols of each row: `lengths[c]` of them under row c of cumulative `tables` (C, L + 1).

    Raises:
        PayloadError: the code lies outside of every symbol's interval.
    """
    least, state_bytes, position = 1 << (state_bits - WORD_BITS), state_bits // 8, state_bits // 8
    offset = int.from_bytes(code[:state_bytes].ljust(state_bytes, b"\0"), "big")
    width = (1 << state_bits) - 1
    rows: list[list[int]] = []
    for table, length in zip(tables.tolist(), lengths, strict=True):
        symbols: list[int] = []
        for _ in range(length):
            scale = width >> PRECISION
            symbol = bisect_right(table, offset // scale) - 1
            if symbol >= len(table) - 1:
                raise PayloadError(f"{len(code)} B that no row of symbols has as its code (arithmetic coder)")
            left = table[symbol]
            offset -= scale * left
            width = scale * (table[symbol + 1] - left)
            if width < least:
                word = int.from_bytes(code[position : position + 4].ljust(4, b"\0"), "big")
                offset, width, position = offset << WORD_BITS | word, width << WORD_BITS, position + 4
            symbols.append(symbol)
        rows.append(symbols)
    return rows
