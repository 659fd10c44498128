"""Features quantised with static ranges and coded without further loss: what a split plan sends.

    values (1, C, H, W) --quantize--> symbols (C, n) --blocks--> symbols (C, m) --coder--> code

Decoding goes back the same way; what the other end restores is looked up in the static tables, never computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from ..plan import CodecSpec, TensorSpec
from . import payload
from .blocks import Blocks
from .contract import Arrays, BytesHow, check_arrays
from .entropy import Prior, make_coder
from .prior import cost_bits, frequencies, group_channels, histogram, pool
from .quantize import Lookup, from_channels, grid, num_channels, quantize, to_channels
from .tables import Tables, TensorTables

CODERS_WITH_PRIOR = ("range", "rans")

# Values that calibration looks at, for each tensor: enough for a table of 256 in each of many channels.
_CALIBRATION_VALUES = 1 << 21
_VALUES_AT_A_TIME = 1 << 18
# As if so many symbols of each channel had been seen.
_LEARNED_COUNTS = 1e9


class Quantiser:
    """One crossing tensor's values to symbols (N, C, n) and back, by its static tables."""

    def __init__(self, spec: TensorSpec, tables: TensorTables) -> None:
        self.spec = spec
        self.num_levels = tables.levels.shape[1]
        channels = num_channels(spec)
        self._levels = Lookup(tables.levels, channels)
        self._low = tables.low[:, None] if tables.low.any() else None
        self._per_step = np.float32(1) / tables.step[:, None]
        self._codes: Lookup | None = None
        if spec.dtype == "uint8":
            codes = np.arange(256, dtype=np.float32)[None, None].repeat(len(tables.low), axis=1)
            self._codes = Lookup(quantize(codes, self._low, self._per_step, self.num_levels)[0], channels)

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
        self._blocks = [Blocks(tensor, spec.bits) for tensor in crossing]
        priors = [
            Prior(table.frequencies, table.groups)
            for table in tables.tensors
            if table.frequencies is not None and table.groups is not None
        ]
        self._bits = [Lookup(cost_bits(prior.frequencies)[prior.groups], len(prior.groups)) for prior in priors]
        self._coder = make_coder(spec, [(*blocks.shape, blocks.block_bits) for blocks in self._blocks], priors)
        self.bytes_how: BytesHow = "estimated" if priors else "measured"

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
        return tuple(self._values([rows[None] for rows in self._coder.decode(coder, code)]))

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
            for whole, values in zip(restored, self._values(symbols), strict=True):
                whole[part] = values
            num_bytes[part] = payload.HEADER_BYTES + self._code_bytes(symbols)
        return restored, num_bytes

    def cost_bits(self, arrays: Arrays) -> NDArray[np.float64]:
        """(N,) bits that each sample of `arrays` (N, *shape) costs under the static tables.

        Raises:
            CodecError: as `encode`, or the coder has no tables.
        """
        check_arrays(self.crossing, arrays, one=False)
        if not self._bits:
            raise CodecError(f'cost is defined by static tables, and codec "{self.spec.name}" has none')
        return self._cost_bits(self._symbols(arrays))

    def _cost_bits(self, symbols: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        costs = [bits(rows).sum(axis=(1, 2)) for bits, rows in zip(self._bits, symbols, strict=True)]
        return np.asarray(np.sum(costs, axis=0))

    def _code_bytes(self, symbols: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """(N,) bytes of the code of each sample: estimated with tables, else coded."""
        if self._bits:
            return np.asarray(np.ceil(self._cost_bits(symbols) / 8))
        codes = [self._coder.encode([rows[n] for rows in symbols])[1] for n in range(len(symbols[0]))]
        return np.array([len(code) for code in codes], dtype=np.float64)

    def _symbols(self, arrays: Arrays) -> list[NDArray[np.uint8]]:
        """What is coded: blocks of symbols (N, C, m)."""
        parts = zip(self._quantisers, self._blocks, arrays, strict=True)
        return [blocks.join(quantiser.symbols(array)) for quantiser, blocks, array in parts]

    def _values(self, joined: list[NDArray[np.uint8]]) -> list[NDArray[Any]]:
        """(N, *shape) of each tensor: the inverse of `_symbols`, but for what quantising lost."""
        parts = zip(self._quantisers, self._blocks, joined, strict=True)
        return [quantiser.values(blocks.split(rows)) for quantiser, blocks, rows in parts]


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
        needs = (channels, 2 ** Blocks(tensor, spec.bits).block_bits) if spec.coder in CODERS_WITH_PRIOR else None
        has = None
        if table.frequencies is not None and table.groups is not None:
            has = (len(table.groups), table.frequencies.shape[1])
        if has != needs:
            raise CodecError(f"{wants} must have frequencies (channels, symbols) {needs}, got {has}")


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
    levels = _levels(tensor, low, step, num_levels)
    if spec.coder not in CODERS_WITH_PRIOR:
        return TensorTables(low, step, levels)
    quantiser, blocks = Quantiser(tensor, TensorTables(low, step, levels)), Blocks(tensor, spec.bits)
    counts = histogram(blocks.join(quantiser.symbols(features[::stride])), 2**blocks.block_bits)
    groups = group_channels(counts)
    return TensorTables(low, step, levels, frequencies(pool(counts, groups)), groups)


def learned_tensor(
    spec: CodecSpec,
    tensor: TensorSpec,
    low: NDArray[np.float32],
    step: NDArray[np.float32],
    shares: NDArray[np.float64] | None,
) -> TensorTables:
    """Grid and frequencies of one tensor from what a unit learned: `low` and `step` (C,), `shares` (C, L) of symbols.

    Where the coder takes several neighbours at once, their shares are multiplied, as the unit's prior does.
    `shares` is None for a coder with a model of its own.

    Raises:
        CodecError: ranges are not per channel, or shapes and coder do not fit the tensor.
    """
    channels, num_levels = num_channels(tensor), 2**spec.bits
    if (shares is not None) != (spec.coder in CODERS_WITH_PRIOR) or not spec.per_channel:
        raise CodecError(f'what was learned does not fit the codec "{spec.name}"')
    have = (low.shape, step.shape, (channels, num_levels) if shares is None else shares.shape)
    if have != ((channels,), (channels,), (channels, num_levels)):
        raise CodecError(f'tensor "{tensor.name}" has {channels} channels of {num_levels} levels, got tables {have}')
    levels = _levels(tensor, low, step, num_levels)
    if shares is None:
        return TensorTables(low, step, levels)
    joint = shares
    for _ in range(Blocks(tensor, spec.bits).block_bits // spec.bits - 1):
        joint = (joint[:, :, None] * shares[:, None, :]).reshape(channels, -1)
    counts = np.rint(joint * _LEARNED_COUNTS).astype(np.int64)
    groups = group_channels(counts)
    return TensorTables(low, step, levels, frequencies(pool(counts, groups)), groups)


def _levels(
    tensor: TensorSpec, low: NDArray[np.float32], step: NDArray[np.float32], num_levels: int
) -> NDArray[Any]:
    levels = low[:, None] + step[:, None] * np.arange(num_levels, dtype=np.float32)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8) if tensor.dtype == "uint8" else levels
