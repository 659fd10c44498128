"""Symbols packed into bits, with or without zstd behind it: coding without tables.

    none   each symbol in `bits` bits, most significant first
    zstd   a byte each, or packed where 1, 2 or 4 bits keep symbols within their byte, through zstd

A zstd frame is written without what both ends know (magic number, content size, checksum), and unpacked only
up to the size that the codec's shapes give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from ..errors import PayloadError

Symbols = list[NDArray[np.uint8]]
# Rows, symbols in a row, bits of a symbol: one for each crossing tensor.
Shape = tuple[int, int, int]

_ZSTD_LEVEL = 3
# A decoder allocates a frame's window before it has read a byte; the encoder's is as large as the content, or this.
_LEAST_WINDOW_BYTES = 1024


class PackedCoder:
    """Coders "none" and "zstd": no tables; each tensor fills whole bytes."""

    def __init__(self, coder: str, shapes: Sequence[Shape]) -> None:
        self.coders = (coder,)
        self._shapes = shapes
        self._packed_bits = [bits if coder == "none" or 8 % bits == 0 else 8 for _, _, bits in shapes]
        sizes = zip(shapes, self._packed_bits, strict=True)
        self._num_bytes = [-(-rows * row * bits // 8) for (rows, row, _), bits in sizes]
        total = sum(self._num_bytes)
        self.max_code_bytes = total if coder == "none" else 2 * total + 1024

    def encode(self, symbols: Symbols) -> tuple[str, bytes]:
        """Pack, then compress."""
        parts = zip(symbols, self._packed_bits, strict=True)
        raw = b"".join(pack_bits(rows.ravel(), bits) for rows, bits in parts)
        return self.coders[0], raw if self.coders[0] == "none" else zstd_compress(raw)

    def decode(self, coder: str, code: bytes) -> Symbols:
        """Decompress, then unpack."""
        total = sum(self._num_bytes)
        raw = code if coder == "none" else zstd_decompress(code, total)
        if len(raw) != total:
            raise PayloadError(f"symbols of shapes {self._shapes} take {total} B, got {len(raw)} B ({coder})")
        symbols, start = [], 0
        for (rows, row, bits), packed_bits, size in zip(self._shapes, self._packed_bits, self._num_bytes, strict=True):
            flat = unpack_bits(raw[start : start + size], packed_bits, rows * row)
            if flat.max(initial=0) >> bits:
                raise PayloadError(f"symbols must be below {1 << bits}, got {flat.max()} ({coder})")
            symbols.append(flat.reshape(rows, row))
            start += size
        return symbols


def join_rows(symbols: Symbols) -> NDArray[np.uint8]:
    """All symbols in one row, in the order of the crossing."""
    return symbols[0].ravel() if len(symbols) == 1 else np.concatenate([rows.ravel() for rows in symbols])


def split_rows(flat: NDArray[np.uint8], shapes: Sequence[Shape]) -> Symbols:
    """The inverse of `join_rows`."""
    stops = np.cumsum([rows * row for rows, row, _ in shapes])[:-1]
    return [part.reshape(shape[:2]) for part, shape in zip(np.split(flat, stops), shapes, strict=True)]


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
    """The `num_bytes` B in a frame; never holds more than a few times that.

    Raises:
        PayloadError: not such a frame, or one of more bytes, or one that wants a larger window.
    """
    decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        frame = zstandard.get_frame_parameters(code, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
        if frame.content_size not in (0, zstandard.CONTENTSIZE_UNKNOWN, num_bytes):
            raise PayloadError(f"{num_bytes} B are expected, the frame has {frame.content_size} B (zstd)")
        if frame.window_size > max(_LEAST_WINDOW_BYTES, 2 * num_bytes):
            raise PayloadError(f"{num_bytes} B are expected, the frame has a window of {frame.window_size} B (zstd)")
        return decompressor.decompress(code, max_output_size=num_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"{len(code)} B that are not the expected frame: {error} (zstd)") from error
