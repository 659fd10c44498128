"""Symbols to code bytes and back, under static tables: the lossless half of a feature codec.

    none    each symbol in `bits` bits, packed
    zstd    symbols packed (1, 2, 4 bits) or a byte each, through zstd: for large tensors
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
from typing import Any, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from ..plan import CodecSpec
from . import arithmetic, lanes
from .prior import cost_bits
from .tables import PRIOR_BITS, PRIOR_SUM

try:
    import constriction
except ImportError:
    constriction = None

Symbols = list[NDArray[np.uint8]]

_ZSTD_LEVEL = 3
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


class PackedCoder:
    """Coders "none" and "zstd": no tables."""

    def __init__(self, coder: str, shapes: Sequence[tuple[int, int]], bits: int) -> None:
        self.coders = (coder,)
        self._shapes, self._bits = shapes, bits
        self._packed_bits = bits if coder == "none" or 8 % bits == 0 else 8
        num_symbols = sum(rows * row for rows, row in shapes)
        self._num_symbols = num_symbols
        self._num_bytes = -(-num_symbols * self._packed_bits // 8)
        self.max_code_bytes = self._num_bytes if coder == "none" else 2 * self._num_bytes + 1024

    def encode(self, symbols: Symbols) -> tuple[str, bytes]:
        """Pack, then compress."""
        raw = pack_bits(join_rows(symbols), self._packed_bits)
        return self.coders[0], raw if self.coders[0] == "none" else zstd_compress(raw)

    def decode(self, coder: str, code: bytes) -> Symbols:
        """Decompress, then unpack."""
        raw = code if coder == "none" else zstd_decompress(code, self._num_bytes)
        if len(raw) != self._num_bytes:
            raise PayloadError(f"{self._num_symbols} symbols take {self._num_bytes} B, got {len(raw)} B ({coder})")
        flat = unpack_bits(raw, self._packed_bits, self._num_symbols)
        if flat.max(initial=0) >> self._bits:
            raise PayloadError(f"symbols must be below {1 << self._bits}, got {flat.max()} ({coder})")
        return split_rows(flat, self._shapes)


class PriorCoder:
    """Coders "range" and "rans": static integer tables, one row for each channel of each tensor."""

    def __init__(self, coder: str, shapes: Sequence[tuple[int, int]], frequencies: NDArray[np.uint16]) -> None:
        self.coders = ("range", "wide") if coder == "range" else ("wide", "lanes")
        self._shapes = shapes
        self._lengths = [row for rows, row in shapes for _ in range(rows)]
        self._stops = np.cumsum(self._lengths).tolist()
        self._channels = np.repeat(np.arange(len(self._lengths)), self._lengths)
        num_symbols = len(self._channels)
        self.max_code_bytes = num_symbols * PRIOR_BITS // 8 + 16 + lanes.MAX_LANES * 8
        self._levels = frequencies.shape[1]
        self._frequencies = frequencies
        self._sums = arithmetic.cumulative(frequencies)
        self._table = arithmetic.range_table(frequencies)
        self._bits = cost_bits(frequencies)
        self._models: list[Any] = []
        # One call of constriction costs as much as a few symbols in Python.
        if coder == "range" and constriction is not None and num_symbols >= _MIN_ROW * len(self._lengths):
            categorical = constriction.stream.model.Categorical
            self._models = [categorical(row / PRIOR_SUM, perfect=False) for row in frequencies]

    def encode(self, symbols: Symbols) -> tuple[str, bytes]:
        """By the first coder that does, or by the shorter where rounding could matter."""
        flat = join_rows(symbols)
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
        return split_rows(flat, self._shapes)

    def _index(self, flat: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Where each symbol lies in a flattened (C, L) table."""
        return np.asarray(self._channels * self._levels + flat)

    def _encode_range(self, flat: NDArray[np.uint8]) -> bytes:
        index = self._index(flat)
        lefts, shares = (np.take(table, index).tolist() for table in (self._table[:, :-1], np.diff(self._table)))
        return arithmetic.encode(lefts, shares, arithmetic.RANGE)

    def _encode_wide(self, index: NDArray[np.int64]) -> bytes:
        lefts, shares = (np.take(table, index).astype(np.uint64) for table in (self._sums[:, :-1], self._frequencies))
        return arithmetic.encode(*arithmetic.grouped(lefts, shares), arithmetic.WIDE)

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
        flat = np.empty(len(self._channels), np.uint8)
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
        if len(flat) >= 2 * lanes.HEAD_SYMBOLS:
            head, rest = self._encode_wide(index[: lanes.HEAD_SYMBOLS]), index[lanes.HEAD_SYMBOLS :]
            num_lanes = lanes.num_lanes(len(head), float(np.take(self._bits, rest).sum()) / 8)
            if num_lanes > 0:
                tables = (self._sums[:, :-1], self._frequencies)
                lefts, shares = (np.take(table, rest).astype(np.uint64) for table in tables)
                return "lanes", lanes.encode(head, lefts, shares, num_lanes)
        return "wide", self._encode_wide(index)

    def _decode_lanes(self, code: bytes) -> NDArray[np.uint8]:
        if len(self._channels) < 2 * lanes.HEAD_SYMBOLS:
            raise PayloadError(f"{len(self._channels)} symbols are too few for lanes")
        rest, head = lanes.decode(code, self._sums[:, :-1], self._channels[lanes.HEAD_SYMBOLS :])
        lengths = np.diff(np.minimum(self._stops, lanes.HEAD_SYMBOLS), prepend=0).tolist()
        first = arithmetic.decode_wide(head, self._sums, lengths)
        return np.concatenate([np.array(first, np.uint8), rest])


def make_coder(
    spec: CodecSpec, shapes: Sequence[tuple[int, int]], frequencies: Sequence[NDArray[np.uint16]]
) -> SymbolCoder:
    """The coder of `spec` for crossing tensors of `shapes` (C, n).

    Raises:
        CodecError: the coder does not code symbols.
    """
    if spec.coder in ("none", "zstd"):
        return PackedCoder(spec.coder, shapes, spec.bits)
    if spec.coder in ("range", "rans"):
        return PriorCoder(spec.coder, shapes, np.concatenate(frequencies))
    raise CodecError(f'a uniform codec\'s coder must be none, zstd, range or rans, got "{spec.coder}"')


def join_rows(symbols: Symbols) -> NDArray[np.uint8]:
    """All symbols in one row, in the order of the crossing."""
    return symbols[0].ravel() if len(symbols) == 1 else np.concatenate([rows.ravel() for rows in symbols])


def split_rows(flat: NDArray[np.uint8], shapes: Sequence[tuple[int, int]]) -> Symbols:
    """The inverse of `join_rows`."""
    stops = np.cumsum([rows * row for rows, row in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, stops), shapes, strict=True)]


def pack_bits(symbols: NDArray[np.uint8], bits: int) -> bytes:
    """`symbols` in `bits` bits each, most significant first; the last byte is filled up with zeros.

    >>> pack_bits(np.array([1, 2, 3], np.uint8), 4).hex()
    '1230'
    """
    if bits in (2, 4):
        filled = np.zeros(-(-len(symbols) * bits // 8) * (8 // bits), np.uint8)
        filled[: len(symbols)] = symbols
        columns = filled.reshape(-1, 8 // bits)
        packed = columns[:, 0]
        for column in columns.T[1:]:
            packed = packed << bits | column
        return packed.tobytes()
    if bits == 8:
        return symbols.tobytes()
    each = symbols if bits == 1 else np.unpackbits(symbols[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(each).tobytes()


def unpack_bits(raw: bytes, bits: int, count: int) -> NDArray[np.uint8]:
    """The inverse of `pack_bits`: `count` symbols."""
    packed = np.frombuffer(raw, np.uint8)
    if bits == 8:
        return packed
    if bits == 1:
        return np.unpackbits(packed, count=count)
    if bits in (2, 4):
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        return np.asarray(packed[:, None] >> shifts & np.uint8(2**bits - 1)).ravel()[:count]
    each = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.asarray(np.packbits(each, axis=1)[:, 0] >> (8 - bits))


def zstd_compress(raw: bytes) -> bytes:
    """A zstd frame without what both ends know: magic number, content size, checksum."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _ZSTD_LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(raw)


def zstd_decompress(code: bytes, num_bytes: int) -> bytes:
    """The `num_bytes` B in a frame; never holds more than that.

    Raises:
        PayloadError: not such a frame, or one of more bytes.
    """
    decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        size = zstandard.get_frame_parameters(code, format=zstandard.FORMAT_ZSTD1_MAGICLESS).content_size
        if size not in (0, zstandard.CONTENTSIZE_UNKNOWN, num_bytes):
            raise PayloadError(f"{num_bytes} B are expected, the frame has {size} B (zstd)")
        return decompressor.decompress(code, max_output_size=num_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"{len(code)} B that are not the expected frame: {error} (zstd)") from error
