"""Codecs for what crosses a cut: values as they are, or quantised with static ranges and coded.

    float32, float16   the tensors' own bytes, little endian, through none or zstd
    uniform            quantize -> symbols (C, n) -> a symbol coder -> code

Encoder and decoder are one object; `roundtrip` does both for a batch at once, with exactly the values that
`decode(encode(...))` gives for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from ..plan import CodecSpec, TensorSpec
from . import payload
from .entropy import make_coder
from .packing import zstd_compress, zstd_decompress
from .prior import cost_bits, frequencies, histogram
from .quantize import Lookup, from_channels, grid, num_channels, quantize, to_channels
from .tables import Tables, TensorTables

Arrays = Sequence[NDArray[Any]]
BytesHow = Literal["measured", "estimated"]

# Values that calibration looks at, for each tensor: enough for 256 levels in each of many channels.
_CALIBRATION_VALUES = 1 << 21
_VALUES_AT_A_TIME = 1 << 18


class Codec(Protocol):
    """Arrays <-> bytes, for one crossing.

    `bytes_how` says whether `roundtrip` codes every sample or adds up its cost under the static tables.
    """

    spec: CodecSpec
    crossing: tuple[TensorSpec, ...]
    bytes_how: BytesHow

    def encode(self, arrays: Arrays) -> bytes:
        """One sample's payload; `arrays` (1, *shape), one for each tensor of the crossing.

        Raises:
            CodecError: the arrays do not fit the crossing, or hold NaN or infinity where that cannot be coded.
        """
        ...

    def decode(self, payload: bytes) -> tuple[NDArray[Any], ...]:
        """One sample's arrays (1, *shape).

        Raises:
            PayloadError: the bytes are not a payload of this codec.
        """
        ...

    def roundtrip(self, arrays: Arrays) -> tuple[tuple[NDArray[Any], ...], NDArray[np.float64]]:
        """What a batch (N, *shape) is restored to, and the payload bytes (N,) of each sample.

        Raises:
            CodecError: as `encode`.
        """
        ...


def check_arrays(crossing: Sequence[TensorSpec], arrays: Arrays, *, one: bool) -> None:
    """Raise CodecError where `arrays` are not the crossing's, with a batch of one sample or of any number."""
    if len(arrays) != len(crossing):
        raise CodecError(f"{len(crossing)} tensors cross, got {len(arrays)} arrays")
    for spec, array in zip(crossing, arrays, strict=True):
        fits = array.ndim == len(spec.shape) + 1 and array.shape[1:] == spec.shape and array.dtype == spec.dtype
        if not fits or (one and len(array) != 1) or len(array) != len(arrays[0]):
            batch = "1" if one else "N"
            raise CodecError(
                f'tensor "{spec.name}" must be {spec.dtype} {(batch, *spec.shape)}, got {array.dtype} {array.shape}'
            )


class FloatCodec:
    """float32: every tensor's own bytes; float16: float32 tensors at half precision, clipped to its range."""

    bytes_how: BytesHow = "measured"

    def __init__(self, spec: CodecSpec, crossing: tuple[TensorSpec, ...], fingerprint: int) -> None:
        if spec.coder not in ("none", "zstd"):
            raise CodecError(f'coder must be none or zstd, got "{spec.coder}" (codec "{spec.name}")')
        self.spec, self.crossing, self._fingerprint = spec, crossing, fingerprint
        halves = [spec.transform == "float16" and tensor.dtype == "float32" for tensor in crossing]
        self._dtypes = [np.dtype("<f2" if half else t.dtype) for half, t in zip(halves, crossing, strict=True)]
        self._sizes = [t.num_elements * d.itemsize for t, d in zip(crossing, self._dtypes, strict=True)]
        self._num_bytes = sum(self._sizes)
        self._max_code_bytes = self._num_bytes if spec.coder == "none" else 2 * self._num_bytes + 1024

    def encode(self, arrays: Arrays) -> bytes:
        """See Codec."""
        check_arrays(self.crossing, arrays, one=True)
        wires = self._to_wire(arrays)
        return payload.pack(self.spec.coder, self._fingerprint, self._code(wires))

    def decode(self, data: bytes) -> tuple[NDArray[Any], ...]:
        """See Codec."""
        _, code = payload.unpack(
            data, fingerprint=self._fingerprint, coders=(self.spec.coder,), max_code_bytes=self._max_code_bytes
        )
        raw = (
            code
            if self.spec.coder == "none"
            else unshuffle(zstd_decompress(code, self._num_bytes), self._dtypes, self._sizes)
        )
        if len(raw) != self._num_bytes:
            raise PayloadError(f"a code must have {self._num_bytes} B, got {len(raw)} B (codec {self.spec.name})")
        arrays, start = [], 0
        for spec, dtype, size in zip(self.crossing, self._dtypes, self._sizes, strict=True):
            wire = np.frombuffer(raw[start : start + size], dtype)
            arrays.append(wire.astype(spec.dtype).reshape(1, *spec.shape))
            start += size
        return tuple(arrays)

    def roundtrip(self, arrays: Arrays) -> tuple[tuple[NDArray[Any], ...], NDArray[np.float64]]:
        """See Codec."""
        check_arrays(self.crossing, arrays, one=False)
        wires = self._to_wire(arrays)
        num_bytes = np.full(len(arrays[0]), float(payload.HEADER_BYTES + self._num_bytes))
        if self.spec.coder == "zstd":
            for n in range(len(num_bytes)):
                num_bytes[n] = payload.HEADER_BYTES + len(self._code([wire[n : n + 1] for wire in wires]))
        restored = tuple(wire.astype(spec.dtype) for wire, spec in zip(wires, self.crossing, strict=True))
        return restored, num_bytes

    def _to_wire(self, arrays: Arrays) -> list[NDArray[Any]]:
        wires = []
        for array, dtype in zip(arrays, self._dtypes, strict=True):
            if dtype == np.float16:
                limit = float(np.finfo(np.float16).max)
                wires.append(np.clip(array, -limit, limit).astype(dtype))
            else:
                wires.append(array.astype(dtype, copy=False))
        return wires

    def _code(self, wires: list[NDArray[Any]]) -> bytes:
        if self.spec.coder == "none":
            return b"".join(wire.tobytes() for wire in wires)
        return zstd_compress(b"".join(shuffle(wire) for wire in wires))


def shuffle(wire: NDArray[Any]) -> bytes:
    """All first bytes of the elements, then all second bytes, and so on: alike bytes lie together."""
    return np.ascontiguousarray(wire).view(np.uint8).reshape(-1, wire.itemsize).T.tobytes()


def unshuffle(raw: bytes, dtypes: Sequence[np.dtype[Any]], sizes: Sequence[int]) -> bytes:
    """The inverse of `shuffle` for tensors one after the other."""
    if len(raw) != sum(sizes):
        return raw
    parts, start = [], 0
    for dtype, size in zip(dtypes, sizes, strict=True):
        plane = np.frombuffer(raw, np.uint8, size, start).reshape(dtype.itemsize, -1)
        parts.append(plane.T.tobytes())
        start += size
    return b"".join(parts)


class Quantiser:
    """One crossing tensor's values to symbols (N, C, n) and back, by its static tables."""

    def __init__(self, spec: TensorSpec, tables: TensorTables) -> None:
        self.spec = spec
        self.num_levels = tables.levels.shape[1]
        self.shape = (num_channels(spec), spec.num_elements // num_channels(spec))
        self._levels = Lookup(tables.levels, self.shape[0])
        self._low = tables.low[:, None] if tables.low.any() else None
        self._per_step = np.float32(1) / tables.step[:, None]
        self._codes: Lookup | None = None
        if spec.dtype == "uint8":
            codes = np.arange(256, dtype=np.float32)[None, None]
            codes = codes.repeat(len(tables.low), axis=1)
            self._codes = Lookup(quantize(codes, self._low, self._per_step, self.num_levels)[0], self.shape[0])

    def symbols(self, array: NDArray[Any]) -> NDArray[np.uint8]:
        """(N, C, n) symbols of `array` (N, *shape)."""
        channels = to_channels(self.spec, array)
        if self._codes is not None:
            return self._codes(channels)
        return quantize(channels, self._low, self._per_step, self.num_levels)

    def pixels(self, array: NDArray[Any]) -> NDArray[np.uint8]:
        """(N, *shape) symbols of `array` (N, *shape)."""
        return from_channels(self.spec, self.symbols(array))

    def restored(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """(N, *shape) values of symbols (N, *shape)."""
        return self.values(to_channels(self.spec, pixels))

    def values(self, symbols: NDArray[np.uint8]) -> NDArray[Any]:
        """(N, *shape) values of `symbols` (N, C, n)."""
        return from_channels(self.spec, self._levels(symbols))


class UniformCodec:
    """Quantise with static ranges, then code the symbols."""

    def __init__(self, spec: CodecSpec, crossing: tuple[TensorSpec, ...], tables: Tables, fingerprint: int) -> None:
        check_tables(spec, crossing, tables)
        self.spec, self.crossing, self.tables, self._fingerprint = spec, crossing, tables, fingerprint
        self._quantisers = [Quantiser(t, table) for t, table in zip(crossing, tables.tensors, strict=True)]
        rows = [table.frequencies for table in tables.tensors if table.frequencies is not None]
        self._bits = [Lookup(cost_bits(row), len(row)) for row in rows]
        self._coder = make_coder(spec, [quantiser.shape for quantiser in self._quantisers], rows)
        self.bytes_how: BytesHow = "estimated" if rows else "measured"

    def encode(self, arrays: Arrays) -> bytes:
        """See Codec."""
        check_arrays(self.crossing, arrays, one=True)
        coder, code = self._coder.encode([symbols[0] for symbols in self._symbols(arrays)])
        return payload.pack(coder, self._fingerprint, code)

    def decode(self, data: bytes) -> tuple[NDArray[Any], ...]:
        """See Codec."""
        coder, code = payload.unpack(
            data,
            fingerprint=self._fingerprint,
            coders=self._coder.coders,
            max_code_bytes=self._coder.max_code_bytes,
        )
        symbols = self._coder.decode(coder, code)
        return tuple(q.values(rows[None]) for q, rows in zip(self._quantisers, symbols, strict=True))

    def roundtrip(self, arrays: Arrays) -> tuple[tuple[NDArray[Any], ...], NDArray[np.float64]]:
        """See Codec; with tables, a payload's bytes are its cost, rounded up, and the header."""
        check_arrays(self.crossing, arrays, one=False)
        count = len(arrays[0])
        restored = tuple(np.empty_like(array, order="C") for array in arrays)
        num_bytes = np.empty(count)
        # Some samples at a time, so that what is computed in between stays in the cache.
        step = max(1, _VALUES_AT_A_TIME // sum(tensor.num_elements for tensor in self.crossing))
        for start in range(0, count, step):
            part = slice(start, start + step)
            symbols = self._symbols([array[part] for array in arrays])
            for whole, quantiser, rows in zip(restored, self._quantisers, symbols, strict=True):
                whole[part] = quantiser.values(rows)
            num_bytes[part] = payload.HEADER_BYTES + self._code_bytes(symbols)
        return restored, num_bytes

    def _code_bytes(self, symbols: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """(N,) bytes of the code of each sample: estimated with tables, else coded."""
        if self._bits:
            costs = [bits(rows).sum(axis=(1, 2)) for bits, rows in zip(self._bits, symbols, strict=True)]
            return np.asarray(np.ceil(np.sum(costs, axis=0) / 8))
        codes = [self._coder.encode([rows[n] for rows in symbols])[1] for n in range(len(symbols[0]))]
        return np.array([len(code) for code in codes], dtype=np.float64)

    def _symbols(self, arrays: Arrays) -> list[NDArray[np.uint8]]:
        return [q.symbols(array) for q, array in zip(self._quantisers, arrays, strict=True)]


def check_tables(spec: CodecSpec, crossing: tuple[TensorSpec, ...], tables: Tables) -> None:
    """Raise CodecError where `tables` are not for `spec` and `crossing`."""
    if len(tables.tensors) != len(crossing):
        raise CodecError(f'codec "{spec.name}" needs tables of {len(crossing)} tensors, got {len(tables.tensors)}')
    for tensor, table in zip(crossing, tables.tensors, strict=True):
        channels, groups = num_channels(tensor), num_channels(tensor) if spec.per_channel else 1
        wants = f'tables for tensor "{tensor.name}" {tensor.shape} of codec "{spec.name}"'
        if table.levels.shape != (groups, 2**spec.bits):
            raise CodecError(f"{wants} must have levels {(groups, 2**spec.bits)}, got {table.levels.shape}")
        if table.levels.dtype != tensor.dtype:
            raise CodecError(f"{wants} must have {tensor.dtype} levels, got {table.levels.dtype}")
        needs = spec.coder in ("range", "rans")
        rows = None if table.frequencies is None else len(table.frequencies)
        if rows != (channels if needs else None):
            raise CodecError(f"{wants} must have frequencies of {channels if needs else None} channels, got {rows}")


def calibrate_tensor(spec: CodecSpec, tensor: TensorSpec, features: NDArray[Any]) -> TensorTables:
    """Grid and frequencies of one tensor from `features` (N, *shape), at most about two million values of them.

    Raises:
        CodecError: no features, or not finite, or not of a type that can be quantised.
    """
    if tensor.dtype not in ("float32", "uint8"):
        raise CodecError(f'only float32 and uint8 can be quantised, tensor "{tensor.name}" is {tensor.dtype}')
    stride = max(1, features.size // _CALIBRATION_VALUES)
    channels = np.ascontiguousarray(to_channels(tensor, features[::stride]))
    num_levels = 2**spec.bits
    fill = 1.0 if spec.transform == "picture" or spec.quality is None else spec.quality / 100
    low, step = grid(channels, spec.bits, per_channel=spec.per_channel, fill=fill)
    levels = low[:, None] + step[:, None] * np.arange(num_levels, dtype=np.float32)
    if tensor.dtype == "uint8":
        levels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    if spec.coder not in ("range", "rans"):
        return TensorTables(low, step, levels)
    quantiser = Quantiser(tensor, TensorTables(low, step, levels))
    counts = histogram(quantiser.symbols(features[::stride]), num_levels)
    return TensorTables(low, step, levels, frequencies(counts))
