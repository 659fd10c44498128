"""The static tables of one codec: quantiser grids and integer frequencies, made once at build time.

Both machines read the same file and never recompute a table from data, so what one encodes is what the
other decodes, on any processor.  A restored value is looked up in `levels`, never computed.

    NAME.safetensors   for tensor k of the crossing: "k.low" "k.step" (G,), "k.levels" (G, L), and, where
                       the coder needs them, "k.frequencies" (R, K) uint16 with rows that sum to 2^16 and
                       "k.groups" (C,) uint8, the row of each channel

G is 1 (one range for the tensor) or C (one a channel); L = 2^bits levels; C the number of channels;
K the number of values that a block of symbols can have.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from ..errors import CodecError
from ..files import write_atomically

PRIOR_BITS = 16
PRIOR_SUM = 1 << PRIOR_BITS
_SIZES = tuple(2**bits for bits in range(1, 9))
_FIELDS = ("low", "step", "levels", "frequencies", "groups")
_OPTIONAL = ("frequencies", "groups")


@dataclass(frozen=True, eq=False)
class TensorTables:
    """One crossing tensor's grid and frequencies.

    low, step: (G,) float32, value of symbol 0 and distance of neighbours.
    levels: (G, L) float32 or uint8, the value that each symbol is restored to.
    frequencies: (R, K) uint16, each at least 1, rows sum to 2^16; groups: (C,) uint8, the row of each
        channel; both None where the coder needs none.
    """

    low: NDArray[np.float32]
    step: NDArray[np.float32]
    levels: NDArray[Any]
    frequencies: NDArray[np.uint16] | None = None
    groups: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS:
            array = getattr(self, name)
            if array is not None:
                array.setflags(write=False)
        _check(self)


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of every tensor that crosses; none for a codec that needs no tables."""

    tensors: tuple[TensorTables, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Hex sha256 over names, shapes, dtypes and bytes of all arrays."""
        digest = hashlib.sha256()
        for name, array in _arrays(self).items():
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def save_tables(tables: Tables, path: Path) -> None:
    """Write `tables` to `path` (safetensors), whole or not at all."""
    write_atomically(path, save_safetensors(_arrays(tables)))


def load_tables(path: Path) -> Tables:
    """The tables in `path`, checked.

    Raises:
        CodecError: the file is missing, is not safetensors, or holds arrays that are not tables.
    """
    try:
        arrays = load_safetensors(path.read_bytes())
    except OSError as error:
        raise CodecError(f"the file cannot be read: {error.strerror} (tables {path})") from error
    except SafetensorError as error:
        raise CodecError(f"the file is not safetensors: {error} (tables {path})") from error
    try:
        return _tables(arrays)
    except CodecError as error:
        raise CodecError(f"{error} (tables {path})") from error


def _arrays(tables: Tables) -> dict[str, NDArray[Any]]:
    return {
        f"{index}.{name}": np.ascontiguousarray(getattr(tensor, name))
        for index, tensor in enumerate(tables.tensors)
        for name in _FIELDS
        if getattr(tensor, name) is not None
    }


def _tables(arrays: dict[str, NDArray[Any]]) -> Tables:
    """Sort the arrays of a file to their tensors.

    Raises:
        CodecError: an array is missing or not known, or is no table.
    """
    count = len({name.partition(".")[0] for name in arrays})
    known = {f"{index}.{name}" for index in range(count) for name in _FIELDS}
    unknown = sorted(set(arrays) - known)
    missing = sorted(known - set(arrays) - {f"{index}.{name}" for index in range(count) for name in _OPTIONAL})
    if unknown or missing:
        raise CodecError(f"a tables file holds {', '.join(_FIELDS)}, got {sorted(arrays)}")
    return Tables(
        tuple(
            TensorTables(
                low=arrays[f"{index}.low"],
                step=arrays[f"{index}.step"],
                levels=arrays[f"{index}.levels"],
                frequencies=arrays.get(f"{index}.frequencies"),
                groups=arrays.get(f"{index}.groups"),
            )
            for index in range(count)
        )
    )


def _check(tensor: TensorTables) -> None:
    """Raise CodecError where the arrays of one tensor do not fit each other."""
    low, step, levels, frequencies = tensor.low, tensor.step, tensor.levels, tensor.frequencies
    if low.ndim != 1 or step.shape != low.shape or low.dtype != np.float32 or step.dtype != np.float32:
        raise CodecError(f"low and step must be float32 (G,), got {low.dtype} {low.shape}, {step.dtype} {step.shape}")
    if levels.ndim != 2 or len(levels) != len(low) or levels.dtype not in (np.float32, np.uint8):
        raise CodecError(f"levels must be ({len(low)}, L) float32 or uint8, got {levels.shape} {levels.dtype}")
    if levels.shape[1] not in _SIZES:
        raise CodecError(f"the number of levels must be 2 to 256 and a power of two, got {levels.shape[1]}")
    if not (np.isfinite(low).all() and np.isfinite(step).all() and np.isfinite(levels).all() and (step > 0).all()):
        raise CodecError("low, step and levels must be finite and steps above 0")
    if frequencies is not None or tensor.groups is not None:
        _check_prior(frequencies, tensor.groups, len(low))


def _check_prior(frequencies: NDArray[Any] | None, groups: NDArray[Any] | None, num_ranges: int) -> None:
    if frequencies is None or groups is None:
        raise CodecError("frequencies and groups belong together, got one without the other")
    if frequencies.ndim != 2 or frequencies.shape[1] not in _SIZES or frequencies.dtype != np.uint16:
        raise CodecError(f"frequencies must be (R, K) uint16, K 2 to 256 and a power of two, got {frequencies.shape}")
    if groups.ndim != 1 or groups.dtype != np.uint8 or len(groups) == 0 or groups.max() >= len(frequencies):
        raise CodecError(f"groups must be (C,) uint8 below {len(frequencies)}, got {groups.dtype} {groups.shape}")
    if num_ranges not in (1, len(groups)):
        raise CodecError(f"ranges must be for 1 or {len(groups)} channels, got {num_ranges}")
    if frequencies.min() < 1 or (frequencies.sum(axis=1, dtype=np.int64) != PRIOR_SUM).any():
        raise CodecError(f"frequencies must be at least 1 with rows that sum to {PRIOR_SUM}")
