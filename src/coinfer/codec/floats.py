"""Tensors as they are, or at half precision: their own bytes, little endian, through none or zstd.

zstd sees all first bytes of the elements, then all second bytes, and so on: exponents beside exponents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from ..plan import CodecSpec, TensorSpec
from . import payload
from .contract import Arrays, BytesHow, check_arrays
from .packing import zstd_compress, zstd_decompress


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
