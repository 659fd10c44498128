"""The symbol coders: the bound on bytes, the same bytes by both implementations, packing, zstd."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from coinfer.codec import entropy, lanes
from coinfer.codec.entropy import Prior, PriorCoder, make_coder
from coinfer.codec.prior import cost_bits, frequencies
from coinfer.errors import CodecError, PayloadError
from coinfer.plan import CodecSpec

SIZES = (16, 17, 31, 64, 100, 257, 1000, 4096, 10_000, 100_000)
SKEWS = ("even", "steep", "one", "nearly", "dead")


def rows_of(skew: str, channels: int, levels: int, rng: np.random.Generator) -> NDArray[np.uint16]:
    if skew == "even":
        counts = np.ones((channels, levels))
    elif skew == "steep":
        counts = np.tile(0.5 ** np.arange(levels), (channels, 1)) * 1e6
    elif skew == "one":
        counts = rng.dirichlet(np.full(levels, 0.05), size=channels) * 1e6
    elif skew == "nearly":
        counts = np.ones((channels, levels))
        counts[:, -1] = 2000 * levels
    else:
        counts = np.zeros((channels, levels))
        counts[:, 0] = 1e9
    return frequencies(counts.astype(np.int64))


def draw(rows: NDArray[np.uint16], length: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    return np.stack([rng.choice(rows.shape[1], size=length, p=row / 65536) for row in rows]).astype(np.uint8)


def coder_of(coder: str, symbols: list[NDArray[np.uint8]], tables: list[NDArray[np.uint16]]) -> PriorCoder:
    shapes = [(*s.shape, t.shape[1].bit_length() - 1) for s, t in zip(symbols, tables, strict=True)]
    priors = [Prior(t, np.arange(len(t), dtype=np.uint8)) for t in tables]
    return PriorCoder(coder, shapes, priors)


def cost_bytes(rows: NDArray[np.uint16], symbols: NDArray[np.uint8]) -> float:
    return float(np.take_along_axis(cost_bits(rows), symbols.astype(np.int64), axis=1).sum() / 8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("coder", ["range", "rans"])
def test_code_bytes_are_at_most_1_01_of_the_cost_and_1_from_16_symbols_up(coder: str, skew: str, size: int) -> None:
    rng = np.random.default_rng(size)
    for levels, channels in ((2, 1), (4, 4), (256, 1)):
        rows = rows_of(skew, channels, levels, rng)
        symbols = draw(rows, size // channels, rng)
        for unlikely in (False, True):
            if unlikely:
                symbols[:, :: max(1, symbols.shape[1] // 5)] = int(rows[0].argmin())
            name, code = coder_of(coder, [symbols], [rows]).encode([symbols])
            assert len(code) <= 1.01 * cost_bytes(rows, symbols) + 1, name


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 1000, 20_000])
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("coder", ["range", "rans"])
def test_symbols_come_back(coder: str, skew: str, size: int) -> None:
    rng = np.random.default_rng(size)
    rows = rows_of(skew, 3, 16, rng)
    tables = [rows[:1], rows_of(skew, 2, 4, rng)]
    symbols = [draw(tables[0], size, rng), draw(tables[1], 7, rng)]
    one = coder_of(coder, symbols, tables)
    name, code = one.encode(symbols)
    assert name in one.coders and len(code) <= one.max_code_bytes
    for expected, got in zip(symbols, one.decode(name, code), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("coder", ["range", "rans"])
@pytest.mark.parametrize("length", [1, 9, 4000])
def test_channels_that_share_a_row_come_back_in_their_places(coder: str, length: int) -> None:
    rng = np.random.default_rng(length)
    rows = rows_of("one", 4, 16, rng)
    groups = np.array([2, 0, 0, 2, 3, 0], np.uint8)  # and none in row 1
    symbols = draw(rows[groups], length, rng)
    one = PriorCoder(coder, [(6, length, 4)], [Prior(rows, groups)])
    name, code = one.encode([symbols])
    assert len(code) <= 1.01 * cost_bytes(rows[groups], symbols) + 1
    np.testing.assert_array_equal(one.decode(name, code)[0], symbols)


@pytest.mark.parametrize("size", [1, 3, 4, 50, 3000])
@pytest.mark.parametrize("skew", SKEWS)
def test_range_has_the_same_bytes_without_constriction(skew: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction", reason="constriction has no wheel for this machine")
    rng = np.random.default_rng(size)
    rows = rows_of(skew, 4, 8, rng)
    symbols = draw(rows, size, rng)
    compiled = coder_of("range", [symbols], [rows])
    with monkeypatch.context() as patch:
        patch.setattr(entropy, "constriction", None)
        python = coder_of("range", [symbols], [rows])
    assert bool(compiled._models) == (size >= 4) and not python._models
    name, code = compiled.encode([symbols])
    assert python.encode([symbols]) == (name, code)
    np.testing.assert_array_equal(python.decode(name, code)[0], symbols)
    np.testing.assert_array_equal(compiled.decode(name, code)[0], symbols)


def test_a_large_tensor_that_costs_next_to_nothing_goes_wide() -> None:
    """A row of 2^16 - 1 likely symbols: the 64-bit state would lose a few times what they cost."""
    rows = np.array([[65500, 36]], np.uint16)
    symbols = np.zeros((1, 100_000), np.uint8)
    symbols[0, ::2000] = 1
    name, code = coder_of("range", [symbols], [rows]).encode([symbols])
    assert name == "wide"
    assert len(code) <= cost_bytes(rows, symbols) + 1


def test_rans_takes_lanes_where_they_pay() -> None:
    rng = np.random.default_rng(0)
    rows = rows_of("one", 8, 16, rng)
    for length, expected in ((512, "wide"), (20_000, "lanes")):
        symbols = draw(rows, length, rng)
        assert coder_of("rans", [symbols], [rows]).encode([symbols])[0] == expected


def test_lanes_code_of_a_small_tensor_is_refused() -> None:
    rows = rows_of("even", 1, 4, np.random.default_rng(0))
    with pytest.raises(PayloadError, match="10 symbols are too few for lanes"):
        PriorCoder("rans", [(1, 10, 2)], [Prior(rows, np.zeros(1, np.uint8))]).decode("lanes", bytes(1000))


def test_an_image_coder_codes_no_symbols() -> None:
    spec = CodecSpec(transform="uniform", coder="png")
    with pytest.raises(CodecError, match='must be none, zstd, range or rans, got "png"'):
        make_coder(spec, [(1, 4, 8)], [])


class TestLanes:
    """rANS in lanes, by itself."""

    @staticmethod
    def coded(lanes_used: int, length: int) -> tuple[bytes, bytes, NDArray[np.int64], NDArray[np.int64], NDArray]:
        rng = np.random.default_rng(length)
        rows = rows_of("one", 5, 32, rng)
        channels = np.sort(rng.integers(0, 5, size=length))
        symbols = np.array([rng.choice(32, p=rows[c] / 65536) for c in channels], np.uint8)
        sums = np.cumsum(rows, axis=1, dtype=np.int64) - rows
        lefts, shares = (table[channels, symbols].astype(np.uint64) for table in (sums, rows))
        head = rng.bytes(4 * lanes_used + 3)
        return lanes.encode(head, lefts, shares, lanes_used), head, sums, channels, symbols

    @pytest.mark.parametrize("lanes_used", [32, 33, 1024])
    @pytest.mark.parametrize("length", [1, 31, 1000, 3333])
    def test_symbols_and_head_come_back(self, lanes_used: int, length: int) -> None:
        code, head, sums, channels, symbols = self.coded(lanes_used, length)
        decoded, head_again = lanes.decode(code, sums, channels)
        np.testing.assert_array_equal(decoded, symbols)
        assert head_again == head

    def test_a_lane_loses_about_a_byte(self) -> None:
        code, head, sums, channels, symbols = self.coded(64, 3333)
        rows = np.diff(sums, append=65536)
        cost = (16 - np.log2(rows[channels, symbols])).sum() / 8
        assert 0 < len(code) - cost - len(head) - 2 < 1.5 * 64

    def test_a_code_cut_short_is_refused(self) -> None:
        code, head, sums, channels, _ = self.coded(32, 1000)
        for size in (0, 1, 2, 100, len(code) - len(head) + 4 * 32 - 1):
            with pytest.raises(PayloadError, match="lanes|lane"):
                lanes.decode(code[:size], sums, channels)

    def test_a_code_that_does_not_end_where_it_began_is_refused(self) -> None:
        code, _, sums, channels, _ = self.coded(32, 1000)
        altered = bytes([code[0], code[1], code[2] ^ 1]) + code[3:]
        with pytest.raises(PayloadError):
            lanes.decode(altered, sums, channels)
