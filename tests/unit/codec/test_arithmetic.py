"""The arithmetic coder against constriction, exact fractions, and its own promises."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.codec import arithmetic
from coinfer.codec.arithmetic import RANGE, WIDE
from coinfer.codec.prior import frequencies
from coinfer.errors import PayloadError

needs_constriction = pytest.mark.skipif(
    importlib.util.find_spec("constriction") is None, reason="constriction has no wheel for this machine"
)


def random_rows(rng: np.random.Generator, channels: int, levels: int) -> np.ndarray:
    skew = rng.choice([0.01, 0.1, 1.0, 10.0])
    return frequencies((rng.dirichlet(np.full(levels, skew), size=channels) * 10**6).astype(np.int64))


def range_steps(table: np.ndarray, symbols: np.ndarray) -> tuple[list[int], list[int]]:
    return table[0, symbols].tolist(), np.diff(table)[0, symbols].tolist()


@needs_constriction
@pytest.mark.parametrize("seed", range(40))
def test_range_has_constrictions_interval_after_every_symbol(seed: int) -> None:
    import constriction

    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 1, 2 ** int(rng.integers(1, 9)))
    symbols = rng.choice(rows.shape[1], size=60, p=rows[0] / 65536)
    model = constriction.stream.model.Categorical(rows[0] / 65536, perfect=False)
    encoder = constriction.stream.queue.RangeEncoder()
    table = arithmetic.range_table(rows)
    low, width, words = 0, (1 << 64) - 1, 0
    for symbol in symbols.tolist():
        encoder.encode(symbol, model)
        scale = width >> 24
        low, width = low + scale * int(table[0, symbol]), scale * int(np.diff(table)[0, symbol])
        if width < 1 << 32:
            low, width, words = low << 32, width << 32, words + 1
        assert encoder.pos() == (words, (low % (1 << 64), width))


@needs_constriction
@pytest.mark.parametrize("seed", range(40))
def test_constriction_decodes_the_shortened_code(seed: int) -> None:
    import constriction

    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 1, 2 ** int(rng.integers(1, 9)))
    symbols = rng.choice(rows.shape[1], size=int(rng.integers(1, 200)), p=rows[0] / 65536)
    code = arithmetic.encode(*range_steps(arithmetic.range_table(rows), symbols), RANGE)
    model = constriction.stream.model.Categorical(rows[0] / 65536, perfect=False)
    words = np.frombuffer(code + bytes(-len(code) % 4), ">u4").astype(np.uint32)
    decoded = constriction.stream.queue.RangeDecoder(words).decode(model, len(symbols))
    assert decoded.tolist() == symbols.tolist()


def test_range_table_is_exact_and_leaves_no_symbol_without_a_share() -> None:
    rows = np.array([[1, 65533, 1, 1], [16384, 16384, 16384, 16384]], np.uint16)
    table = arithmetic.range_table(rows)
    assert table[:, 0].tolist() == [0, 0]
    assert table[:, -1].tolist() == [2**24, 2**24]
    shares = np.diff(table)
    assert (shares > 0).all()
    assert np.abs(shares - rows.astype(np.int64) * 256).max() <= 4


@given(
    low=st.integers(0, 2**48 - 1),
    width=st.integers(1, 2**48),
)
def test_shortest_is_inside_and_no_shorter_string_is(low: int, width: int) -> None:
    width = min(width, 2**48 - low)
    code = arithmetic.shortest(low, width, 48)
    assert low <= int.from_bytes(code.ljust(6, b"\0"), "big") < low + width
    assert not code.endswith(b"\0")
    for size in range(len(code)):
        step = 1 << (48 - 8 * size)
        assert -(-low // step) * step >= low + width
    assert 256 ** max(len(code) - 1, 0) * width <= 2**48


def test_shortest_over_every_interval_of_16_bits_at_the_edges() -> None:
    for low in (0, 1, 255, 256, 257, 65279, 65280, 65281, 65535):
        for width in range(1, 65536 - low + 1, 97):
            inside = [value for value in (low, -(-low // 256) * 256, 0) if low <= value < low + width]
            expected = min(inside, key=lambda value: (len(value.to_bytes(2, "big").rstrip(b"\0")), value))
            assert arithmetic.shortest(low, width, 16) == expected.to_bytes(2, "big").rstrip(b"\0")


@pytest.mark.parametrize("seed", range(20))
def test_wide_interval_is_the_exact_product_of_shares(seed: int) -> None:
    """Four symbols a step: the code lies in the interval that exact fractions give, but for 2^-100."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 1, 16)
    symbols = rng.choice(16, size=int(rng.integers(1, 40)), p=rows[0] / 65536)
    sums = arithmetic.cumulative(rows)
    steps = arithmetic.grouped(sums[0, symbols].astype(np.uint64), rows[0, symbols].astype(np.uint64))
    code = arithmetic.encode(*steps, WIDE)
    low, width = Fraction(0), Fraction(1)
    for symbol in symbols.tolist():
        low += width * Fraction(int(sums[0, symbol]), 65536)
        width *= Fraction(int(rows[0, symbol]), 65536)
    point = Fraction(int.from_bytes(code, "big"), 256 ** len(code))
    assert low - Fraction(1, 2**100) <= point < low + width
    assert len(code) <= math.ceil(-math.log2(width) / 8 + 1e-9)


@pytest.mark.parametrize("form", [RANGE, WIDE])
def test_carry_runs_through_full_words(form: arithmetic.Form) -> None:
    """The last symbol of a row of most likely last symbols pushes a carry through words of all ones."""
    rows = np.array([[1, 65535]], np.uint16)
    symbols = np.array([1] * 3 + [0, 1] * 400 + [1] * 2000, np.int64)
    if form is RANGE:
        table = arithmetic.range_table(rows)
        code = arithmetic.encode(*range_steps(table, symbols), form)
        decoded = arithmetic.decode_range(code, table, [len(symbols)])
    else:
        sums = arithmetic.cumulative(rows)
        steps = arithmetic.grouped(sums[0, symbols].astype(np.uint64), rows[0, symbols].astype(np.uint64))
        code = arithmetic.encode(*steps, form)
        decoded = arithmetic.decode_wide(code, sums, [len(symbols)])
    assert decoded == symbols.tolist()


def test_join_carries_into_words_of_all_ones() -> None:
    words = [5, 0xFFFFFFFF, 0xFFFFFFFF]
    assert arithmetic._join(words, (1 << 64) + 7, RANGE) == (6 << 128) + 7


@given(code=st.binary(max_size=40), seed=st.integers(0, 50))
def test_any_bytes_decode_to_symbols_or_raise_payload_error(code: bytes, seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 3, 8)
    for decode, table in (
        (arithmetic.decode_range, arithmetic.range_table(rows)),
        (arithmetic.decode_wide, arithmetic.cumulative(rows)),
    ):
        try:
            symbols = decode(code, table, [5, 0, 9])
        except PayloadError as error:
            assert str(len(code)) in str(error)
        else:
            assert len(symbols) == 14 and max(symbols) < 8
