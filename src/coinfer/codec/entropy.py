"""Symbols to code bytes and back, under static tables: the lossless half of a feature codec.

    none    each symbol in `bits` bits (packing)
    zstd    packed symbols through zstd: for large tensors (packing)
    range   constriction's range coder ended on a byte; where constriction is missing, the same bytes by
            `arithmetic`, slower; tensors that cost less than 1/32 bit a symbol go "wide"
    rans    no compiled code: rANS lanes in numpy where the tensor is large enough to pay for them, else "wide"

NOTE the same bytes.  What `range` writes is defined by `arithmetic` alone; constriction is the fast path
to the same bytes, held to them by golden bytes and by a test against it.

NOTE the bound.  From 16 symbols up, code bytes <= 1.01 x cost + 1 B, where cost is the sum of
log2(2^16 / frequency) / 8 over the symbols.  The end of the code costs less than 1 B and the coder's
rounding 0.00013 bit a symbol; the latter is what "wide" is there for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from ..plan import CodecSpec
from . import arithmetic, lanes
from .packing import PackedCoder, Shape, Symbols, join_rows, split_rows
from .tables import PRIOR_BITS, PRIOR_SUM

try:
    import constriction
except ImportError:
    constriction = None

_WIDE_BELOW_BITS = 1 / 32
_MIN_ROW = 4


class SymbolCoder(Protocol):
    """Rows of symbols to code bytes and back.

    Symbols are one (C, n) array for each crossing tensor; all go into one code.
    """

    @property
    def coders(self) -> tuple[str, ...]:
        """What the payload may name."""
        ...

    @property
    def max_code_bytes(self) -> int:
        """No code is longer."""
        ...

    def encode(self, symbols: Symbols) -> tuple[str, bytes]:
        """Which of `coders` it went by, and the code."""
        ...

    def decode(self, coder: str, code: bytes) -> Symbols:
        """The symbols again.

        Raises:
            PayloadError: the code is not one that `encode` gives for these shapes.
        """
        ...


class Prior(NamedTuple):
    """One tensor's frequencies (R, K) out of 2^16, and the row of each channel (C,)."""

    frequencies: NDArray[np.uint16]
    groups: NDArray[np.uint8]


class PriorCoder:
    """Coders "range" and "rans": static integer tables; channels that share a row lie together in the code."""

    def __init__(self, coder: str, shapes: Sequence[Shape], priors: Sequence[Prior]) -> None:
        self.coders = ("range", "wide") if coder == "range" else ("wide", "lanes")
        self._shapes = shapes
        self._orders = [np.argsort(prior.groups, kind="stable") for prior in priors]
        self._lengths = [
            int(channels) * row
            for prior, (_, row, _) in zip(priors, shapes, strict=True)
            for channels in np.bincount(prior.groups, minlength=len(prior.frequencies))
        ]
        self._stops = np.cumsum(self._lengths).tolist()
        self._rows = np.repeat(np.arange(len(self._lengths)), self._lengths)
        num_symbols = len(self._rows)
        self.max_code_bytes = num_symbols * PRIOR_BITS // 8 + 16 + lanes.MAX_LANES * 8
        self._sums = stack([arithmetic.cumulative(prior.frequencies) for prior in priors])
        self._table = stack([arithmetic.range_table(prior.frequencies) for prior in priors])
        self._offsets = self._rows * (self._sums.shape[1] - 1)
        self._lefts = self._sums[:, :-1].astype(np.uint64).ravel()
        self._shares = np.diff(self._sums).astype(np.uint64).ravel()
        self._bits = PRIOR_BITS - np.log2(np.maximum(self._shares, 1).astype(np.float64))
        # Lanes are seeded by symbols from all over the tensor: some channels hold no information at all.
        self._is_head = np.zeros(num_symbols, np.bool_)
        if coder == "rans" and num_symbols >= 2 * lanes.HEAD_SYMBOLS:
            self._is_head[:: num_symbols // lanes.HEAD_SYMBOLS] = True
        self._models: list[Any] = []
        # One call of constriction costs as much as a few symbols in Python.
        if coder == "range" and constriction is not None and num_symbols >= _MIN_ROW * len(self._lengths):
            categorical = constriction.stream.model.Categorical
            self._models = [
                categorical(row / PRIOR_SUM, perfect=False) for prior in priors for row in prior.frequencies
            ]

    def encode(self, symbols: Symbols) -> tuple[str, bytes]:
        """By the first coder that does, or by the shorter where rounding could matter."""
        flat = join_rows([rows[order] for rows, order in zip(symbols, self._orders, strict=True)])
        if "lanes" in self.coders:
            return self._encode_rans(flat)
        code = self._encode_compiled(flat) if self._models else self._encode_range(flat)
        if len(code) * 8 < len(flat) * _WIDE_BELOW_BITS:
            wide = self._encode_wide(self._index(flat))
            if len(wide) < len(code):
                return "wide", wide
        return "range", code

    def decode(self, coder: str, code: bytes) -> Symbols:
        """By the coder that the payload names."""
        if coder == "lanes":
            flat = self._decode_lanes(code)
        elif coder == "wide":
            flat = np.array(arithmetic.decode_wide(code, self._sums, self._lengths), np.uint8)
        elif self._models:
            flat = self._decode_compiled(code)
        else:
            flat = np.array(arithmetic.decode_range(code, self._table, self._lengths), np.uint8)
        symbols = [np.empty(shape[:2], np.uint8) for shape in self._shapes]
        for rows, order, part in zip(symbols, self._orders, split_rows(flat, self._shapes), strict=True):
            rows[order] = part
        return symbols

    def _index(self, flat: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Where each symbol lies in a (C, L) table made flat."""
        return np.asarray(self._offsets + flat)

    def _encode_range(self, flat: NDArray[np.uint8]) -> bytes:
        index = self._index(flat)
        lefts, shares = (np.take(table, index).tolist() for table in (self._table[:, :-1], np.diff(self._table)))
        return arithmetic.encode(lefts, shares, arithmetic.RANGE)

    def _encode_wide(self, index: NDArray[np.int64]) -> bytes:
        steps = arithmetic.grouped(np.take(self._lefts, index), np.take(self._shares, index))
        return arithmetic.encode(*steps, arithmetic.WIDE)

    def _encode_compiled(self, flat: NDArray[np.uint8]) -> bytes:
        encoder = constriction.stream.queue.RangeEncoder()
        wide = flat.astype(np.int32)
        start = 0
        for stop, model in zip(self._stops, self._models, strict=True):
            encoder.encode(wide[start:stop], model)
            start = stop
        num_words, (low, width) = encoder.pos()
        words = encoder.get_compressed()
        # constriction gives some point of the interval; its lower end is the next below that ends in `low`.
        num_bits = arithmetic.RANGE.state_bits + arithmetic.RANGE.word_bits * num_words
        point = int.from_bytes(words.astype(">u4").tobytes(), "big") << (num_bits - 32 * len(words))
        lowest = point - (point - low) % (1 << arithmetic.RANGE.state_bits)
        return arithmetic.shortest(lowest, width, num_bits)

    def _decode_compiled(self, code: bytes) -> NDArray[np.uint8]:
        words = np.frombuffer(code + bytes(-len(code) % 4), ">u4").astype(np.uint32)
        decoder = constriction.stream.queue.RangeDecoder(words)
        flat = np.empty(len(self._rows), np.uint8)
        start = 0
        for stop, model in zip(self._stops, self._models, strict=True):
            try:
                flat[start:stop] = decoder.decode(model, stop - start)
            except AssertionError as error:
                raise PayloadError(f"{len(code)} B that no row of symbols has as its code (range coder)") from error
            start = stop
        return flat

    def _encode_rans(self, flat: NDArray[np.uint8]) -> tuple[str, bytes]:
        index = self._index(flat)
        if self._is_head.any():
            head, rest = self._encode_wide(index[self._is_head]), index[~self._is_head]
            num_lanes = lanes.num_lanes(len(head), float(np.take(self._bits, rest).sum()) / 8)
            if num_lanes > 0:
                lefts, shares = np.take(self._lefts, rest), np.take(self._shares, rest)
                return "lanes", lanes.encode(head, lefts, shares, num_lanes)
        return "wide", self._encode_wide(index)

    def _decode_lanes(self, code: bytes) -> NDArray[np.uint8]:
        if not self._is_head.any():
            raise PayloadError(f"{len(self._rows)} symbols are too few for lanes")
        flat = np.empty(len(self._rows), np.uint8)
        rest = ~self._is_head
        flat[rest], head = lanes.decode(code, self._sums[:, :-1], self._rows[rest])
        lengths = np.bincount(self._rows[self._is_head], minlength=len(self._lengths)).tolist()
        flat[self._is_head] = arithmetic.decode_wide(head, self._sums, lengths)
        return flat


def stack(tables: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Cumulative tables (C, K + 1) of several tensors in one (sum of C, most of K + 1).

    Shorter rows go on with their total: symbols without a share, which no code leads to.
    """
    most = max(table.shape[1] for table in tables)
    return np.concatenate([np.pad(table, ((0, 0), (0, most - table.shape[1])), mode="edge") for table in tables])


def make_coder(spec: CodecSpec, shapes: Sequence[Shape], priors: Sequence[Prior]) -> SymbolCoder:
    """The coder of `spec` for symbols of `shapes` (C, n, bits of a symbol).

    Raises:
        CodecError: the coder does not code symbols.
    """
    if spec.coder in ("none", "zstd"):
        return PackedCoder(spec.coder, shapes)
    if spec.coder in ("range", "rans"):
        return PriorCoder(spec.coder, shapes, priors)
    raise CodecError(f'a uniform codec\'s coder must be none, zstd, range or rans, got "{spec.coder}"')
