"""What a codec is, and the check of the arrays that go into one.

Encoder and decoder are one object; `roundtrip` does both for a batch at once, with exactly the values that
`decode(encode(...))` gives for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from ..plan import CodecSpec, TensorSpec

Arrays = Sequence[NDArray[Any]]
BytesHow = Literal["measured", "estimated"]


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
