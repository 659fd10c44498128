"""The arithmetic coder itself, in integers of any size: what the bytes of "range" and "wide" mean.

A code is a number in [0, 1), written in base 256, that lies in the interval which the symbols leave over;
each step cuts the interval [low, low + width) to its share, and `width` has `state_bits` bits:

    scale = width >> precision;   low += scale * left;   width = scale * share
    while width < 2^(state_bits - word_bits):  width <<= word_bits, low <<= word_bits     (one more word)

range   One symbol a step: precision 24, state 64, words of 32 bits.  This is constriction's range coder
        (Bamler, 2022, arXiv:2201.01741; stream.queue) step by step, with its own rounding of the table from
        2^16 to 2^24.  `scale` drops up to 24 bits of `width`, which costs 0.00013 bit a symbol on average.
wide    Four symbols a step, their shares multiplied out exactly: precision 64, state 192, words of 64
        bits.  It loses nothing that could be measured, and takes a quarter of Python's steps.

Both end alike, and not on a word as constriction does: the code is the shortest byte string that,
continued by zero bytes for ever, lies in the interval (of these the smallest number).  It has at most
ceil(-log2(width) / 8) bytes, never ends in a zero byte, and needs neither length nor end mark, since the
number of symbols is known.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from .tables import PRIOR_BITS


class Form(NamedTuple):
    """Sizes in bits of one of the two coders; `group` symbols a step."""

    precision: int
    state_bits: int
    word_bits: int
    group: int


RANGE = Form(precision=24, state_bits=64, word_bits=32, group=1)
WIDE = Form(precision=64, state_bits=192, word_bits=64, group=4)


def range_table(frequencies: NDArray[np.uint16]) -> NDArray[np.int64]:
    """(C, L + 1) cumulative shares out of 2^24, for frequencies (C, L) out of 2^16.

    constriction's rule for `Categorical(frequencies / 2^16, perfect=False)`, in integers: the cumulative share
    of 2^24 - L, rounded down, and one more for every symbol.
    """
    num_levels = frequencies.shape[1]
    sums = cumulative(frequencies)
    return np.asarray((sums * ((1 << RANGE.precision) - num_levels) >> PRIOR_BITS) + np.arange(num_levels + 1))


def cumulative(frequencies: NDArray[np.uint16]) -> NDArray[np.int64]:
    """(C, L + 1) sums of the frequencies before each symbol, and of all."""
    sums = np.zeros((len(frequencies), frequencies.shape[1] + 1), dtype=np.int64)
    np.cumsum(frequencies, axis=1, out=sums[:, 1:])
    return sums


def shortest(low: int, width: int, num_bits: int) -> bytes:
    """The shortest code in [low, low + width) / 2^num_bits, of these the smallest number; 8 divides num_bits.

    >>> shortest(0x123456, 0x10000, 24).hex()
    '13'
    """
    # While 2^drop > width, a multiple of it may be inside; from 2^drop <= width on, one always is.
    drop = min(-(-width.bit_length() // 8) * 8, num_bits)
    while -(-low >> drop) << drop >= low + width:
        drop -= 8
    return (-(-low >> drop)).to_bytes((num_bits - drop) // 8, "big").rstrip(b"\0")


def encode(lefts: Sequence[int], shares: Sequence[int], form: Form) -> bytes:
    """The code of steps with these cumulative and own shares out of 2^precision."""
    precision, state_bits, word_bits, _ = form
    top = state_bits - word_bits
    mask, least = (1 << state_bits) - 1, 1 << top
    low, width = 0, mask
    words: list[int] = []
    for left, share in zip(lefts, shares, strict=True):
        scale = width >> precision
        low += scale * left
        width = scale * share
        if width < least:
            words.append(low >> top)
            low = (low << word_bits) & mask
            width <<= word_bits
    return shortest(_join(words, low, form), width, word_bits * len(words) + state_bits)


def _join(words: list[int], low: int, form: Form) -> int:
    """One integer out of words and state; what a word has above its bits is carried to the one before."""
    word_mask = (1 << form.word_bits) - 1
    carry = low >> form.state_bits
    for index in range(len(words) - 1, -1, -1):
        carried = words[index] + carry
        words[index], carry = carried & word_mask, carried >> form.word_bits
    head = int.from_bytes(np.array(words, dtype=f">u{form.word_bits // 8}").tobytes(), "big")
    return head << form.state_bits | low & ((1 << form.state_bits) - 1)


def grouped(lefts: NDArray[np.uint64], shares: NDArray[np.uint64]) -> tuple[list[int], list[int]]:
    """The steps of the wide coder: cumulative and own shares out of 2^64 for four symbols each out of 2^16.

    What is missing from the last group counts as certain: it takes the whole of what is left.
    """
    missing = -len(lefts) % WIDE.group
    left = np.pad(lefts, (0, missing)).reshape(-1, WIDE.group)
    share = np.pad(shares, (0, missing), constant_values=1 << PRIOR_BITS).reshape(-1, WIDE.group)
    group_left, group_share = left[:, 0], share[:, 0]
    for column in range(1, WIDE.group):
        group_left = (group_left << np.uint64(PRIOR_BITS)) + group_share * left[:, column]
        group_share = group_share * share[:, column]
    return group_left.tolist(), group_share.tolist()


def decode_range(code: bytes, tables: NDArray[np.int64], lengths: Sequence[int]) -> list[int]:
    """The symbols, `lengths[c]` of them under row c of `range_table` (C, L + 1).

    Raises:
        PayloadError: no symbols have this code.
    """
    precision, state_bits, word_bits, _ = RANGE
    least, width = 1 << (state_bits - word_bits), (1 << state_bits) - 1
    offset, words = _words(code, RANGE)
    symbols: list[int] = []
    for table, length in zip(tables.tolist(), lengths, strict=True):
        for _ in range(length):
            scale = width >> precision
            symbol = bisect_right(table, offset // scale) - 1
            if symbol > len(table) - 2:
                raise PayloadError(f"{len(code)} B that are the code of no symbols (range)")
            left = table[symbol]
            offset -= scale * left
            width = scale * (table[symbol + 1] - left)
            if width < least:
                offset, width = offset << word_bits | next(words), width << word_bits
            symbols.append(symbol)
    return symbols


def decode_wide(code: bytes, tables: NDArray[np.int64], lengths: Sequence[int]) -> list[int]:
    """The symbols, `lengths[c]` of them under row c of `cumulative` (C, L + 1).

    Raises:
        PayloadError: no symbols have this code.
    """
    precision, state_bits, word_bits, group = WIDE
    least, width = 1 << (state_bits - word_bits), (1 << state_bits) - 1
    offset, words = _words(code, WIDE)
    rows = chain.from_iterable(repeat(row, length) for row, length in zip(tables.tolist(), lengths, strict=True))
    symbols: list[int] = []
    total = sum(lengths)
    for first in range(0, total, group):
        scale = width >> precision
        rest = point = offset // scale
        if point >> precision:
            raise PayloadError(f"{len(code)} B that are the code of no symbols (wide)")
        share, shift = 1, precision
        for _ in range(min(group, total - first)):
            row = next(rows)
            shift -= PRIOR_BITS
            symbol = bisect_right(row, (rest >> shift) // share) - 1
            left = row[symbol]
            rest -= share * left << shift
            share *= row[symbol + 1] - left
            symbols.append(symbol)
        offset -= scale * (point - rest)
        width = scale * (share << shift)
        if width < least:
            offset, width = offset << word_bits | next(words), width << word_bits
    return symbols


def _words(code: bytes, form: Form) -> tuple[int, Iterator[int]]:
    """The first state's worth of the code, and an endless row of the words behind it."""
    state, size = form.state_bits // 8, form.word_bits // 8
    tail = code[state:] + bytes(-len(code[state:]) % size)
    words = (int.from_bytes(tail[start : start + size], "big") for start in range(0, len(tail), size))
    return int.from_bytes(code[:state].ljust(state, b"\0"), "big"), chain(words, repeat(0))
