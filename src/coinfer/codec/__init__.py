"""Arrays <-> bytes: everything that can cross the link, behind one contract.

    crossing arrays --transform--> symbols or a picture --coder--> code --payload--> 6-byte header + code

    make_codec(spec, crossing, tables)   the Codec: encode, decode, roundtrip
    calibrate(spec, crossing, features)  its static tables, from features, at build time

`spec` names transform and coder (plan.CodecSpec).  Its `quality` is JPEG's and WebP's own; with a range or
rans coder it is the percentage of the levels that the calibrated range spans: 3 bits at quality 71 are 6
levels, a rate between 2 and 3 bits.  A codec holds no state between calls and may be used from
several threads.  No torch in here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from numpy.typing import NDArray

from ..errors import CodecError
from ..plan import CodecSpec, TensorSpec
from .contract import Codec, check_arrays
from .floats import FloatCodec
from .image import ImageCodec, available_formats
from .payload import HEADER_BYTES
from .picture import PictureCodec
from .tables import Tables, TensorTables, load_tables, save_tables
from .uniform import UniformCodec, calibrate_tensor, learned_tensor

__all__ = [
    "HEADER_BYTES",
    "Codec",
    "Tables",
    "TensorTables",
    "available_coders",
    "calibrate",
    "learned_tensor",
    "load_tables",
    "make_codec",
    "save_tables",
]


def make_codec(spec: CodecSpec, crossing: tuple[TensorSpec, ...], tables: Tables | None = None) -> Codec:
    """The codec of `spec` for the tensors that cross; uniform and picture codecs need `tables`.

    Raises:
        CodecError: transform, coder, bits or quality are not allowed together, or do not fit the crossing or tables.
    """
    check_spec(spec, crossing)
    tables = tables or Tables()
    mark = fingerprint(spec, crossing, tables)
    if spec.transform in ("float32", "float16"):
        return FloatCodec(spec, crossing, mark)
    if spec.transform == "image":
        return ImageCodec(spec, crossing, mark)
    if spec.transform == "picture":
        return PictureCodec(spec, crossing, tables, mark)
    return UniformCodec(spec, crossing, tables, mark)


def calibrate(spec: CodecSpec, crossing: tuple[TensorSpec, ...], features: Sequence[NDArray[Any]]) -> Tables:
    """Static tables from calibration features (N, *shape), one array for each tensor of the crossing.

    Raises:
        CodecError: as `make_codec`, or there are no features, or they hold NaN or infinity.
    """
    check_spec(spec, crossing)
    if spec.transform not in ("uniform", "picture"):
        return Tables()
    check_arrays(crossing, features, one=False)
    return Tables(
        tuple(calibrate_tensor(spec, tensor, array) for tensor, array in zip(crossing, features, strict=True))
    )


def available_coders() -> tuple[str, ...]:
    """The coders that this machine has: all, but WebP where Pillow was built without it."""
    return (*available_formats(), "zstd", "range", "rans")


def check_spec(spec: CodecSpec, crossing: tuple[TensorSpec, ...]) -> None:
    """Raise CodecError where the parts of `spec` are not allowed together."""
    if not 1 <= spec.bits <= 8:
        raise CodecError(f'bits must be 1 to 8, got {spec.bits} (codec "{spec.name}")')
    if spec.transform == "picture" and spec.bits != 8:
        raise CodecError(f'bits must be 8, got {spec.bits} (codec "{spec.name}")')
    is_coded = spec.transform == "uniform" and spec.coder in ("range", "rans")
    if spec.quality is not None and not (is_coded or spec.transform in ("picture", "image")):
        raise CodecError(f'quality must be left out, got {spec.quality} (codec "{spec.name}")')
    if spec.quality is not None and not 1 <= spec.quality <= 100:
        raise CodecError(f'quality must be 1 to 100, got {spec.quality} (codec "{spec.name}")')
    if not crossing or any(size < 1 for tensor in crossing for size in tensor.shape):
        raise CodecError(f'at least one tensor with at least one element must cross (codec "{spec.name}")')


def fingerprint(spec: CodecSpec, crossing: tuple[TensorSpec, ...], tables: Tables) -> int:
    """One byte that both ends must agree on: the first of the sha256 of spec, crossing and tables."""
    text = msgspec.json.encode((spec, crossing, tables.digest))
    return hashlib.sha256(text).digest()[0]
