"""Pinned bytes: one payload for each codec, in payloads.json.

What this version decodes, every later one must decode; what is ours alone (all but zstd and the image
formats, whose encoders belong to other libraries) must also be encoded to the very same bytes.

`python tests/golden/test_payloads.py` writes the file anew: only with a new payload version.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from coinfer.codec import Codec, Tables, TensorTables, make_codec
from coinfer.codec.blocks import Blocks
from coinfer.plan import CodecSpec, TensorSpec

FILE = Path(__file__).with_name("payloads.json")
OTHERS_ENCODE = ("zstd", "png", "webp-lossless", "webp", "jpeg", "jpeg-bare")

SMALL = (TensorSpec(name="map", shape=(3, 4, 4)), TensorSpec(name="vector", shape=(5,)))
LARGE = (TensorSpec(name="map", shape=(8, 64, 64)),)
QUIET = (TensorSpec(name="map", shape=(8, 64, 128)),)
INT8 = (TensorSpec(name="codes", shape=(2, 4, 4), dtype="uint8"),)
PICTURE = (TensorSpec(name="input", shape=(16, 16, 3), dtype="uint8"),)

FEATURES = [
    *[CodecSpec(transform=t, coder=c) for t in ("float32", "float16") for c in ("none", "zstd")],
    *[
        CodecSpec(transform="uniform", bits=bits, per_channel=per_channel, coder=coder)
        for coder in ("none", "zstd", "range", "rans")
        for bits, per_channel in ((1, True), (3, False), (4, True), (8, True))
    ],
    *[
        CodecSpec(transform="picture", per_channel=True, coder=coder, quality=quality)
        for coder, quality in (("png", None), ("webp-lossless", None), ("webp", 80), ("jpeg", 80), ("jpeg-bare", 80))
    ],
]
CASES: dict[str, tuple[CodecSpec, tuple[TensorSpec, ...]]] = {
    **{spec.name: (spec, SMALL) for spec in FEATURES},
    **{
        spec.name: (spec, PICTURE)
        for coder, quality in (
            ("none", None),
            ("png", None),
            ("webp-lossless", None),
            ("webp", 80),
            ("jpeg", 80),
            ("jpeg-bare", 80),
        )
        for spec in [CodecSpec(transform="image", coder=coder, quality=quality)]
    },
    **{
        f"{spec.name} {title}": (spec, crossing)
        for title, crossing in (("int8", INT8), ("large", LARGE))
        for coder in ("range", "rans")
        for spec in [CodecSpec(transform="uniform", bits=8, per_channel=True, coder=coder)]
    },
    "uniform5-range wide": (CodecSpec(transform="uniform", bits=5, coder="range"), QUIET),
}


def integers(count: int, below: int, seed: int) -> NDArray[np.int64]:
    """Knuth's 64-bit congruence, high bits: the same everywhere, and no library's."""
    state, numbers = seed, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers.append((state >> 33) % below)
    return np.array(numbers, dtype=np.int64)


def arrays_of(name: str, crossing: tuple[TensorSpec, ...]) -> list[NDArray]:
    arrays: list[NDArray] = []
    for tensor in crossing:
        draws = integers(tensor.num_elements, 1000, 7).reshape(1, *tensor.shape)
        if tensor.dtype == "uint8":
            rows = np.arange(tensor.shape[1])[:, None] * 9
            arrays.append((draws % 23 + rows).astype(np.uint8))
        elif name.endswith("wide"):
            quiet = np.zeros((1, *tensor.shape), np.float32)
            quiet.reshape(-1)[::2003] = 8.0
            arrays.append(quiet)
        else:
            arrays.append((np.maximum(draws - 500, 0) / 64).astype(np.float32))
    return arrays


def tables_of(name: str, spec: CodecSpec, crossing: tuple[TensorSpec, ...]) -> Tables:
    """Made-up tables, by integers and powers of two alone."""
    if spec.transform not in ("uniform", "picture"):
        return Tables()
    levels, has_prior = 2**spec.bits, spec.coder in ("range", "rans")
    tensors = []
    for tensor in crossing:
        channels = tensor.shape[0]
        groups = channels if spec.per_channel else 1
        step = np.full(groups, 1.0 if tensor.dtype == "uint8" else 8.0 / levels, np.float32)
        grid = np.arange(levels, dtype=np.float32) * step[:, None]
        values = 2 ** Blocks(tensor, spec.bits).block_bits
        rows = 1 + integers(channels * values, 65536 // (2 * values), 3).reshape(channels, values)
        if name.endswith("wide"):
            rows[:] = 1
            rows[:, -1] = 36
        rows[:, 0] += 65536 - rows.sum(axis=1)
        tensors.append(
            TensorTables(
                low=np.zeros(groups, np.float32),
                step=step,
                levels=grid.astype(tensor.dtype),
                frequencies=rows.astype(np.uint16) if has_prior else None,
                groups=np.arange(channels, dtype=np.uint8) if has_prior else None,
            )
        )
    return Tables(tuple(tensors))


def codec_of(name: str) -> Codec:
    spec, crossing = CASES[name]
    return make_codec(spec, crossing, tables_of(name, spec, crossing))


def brief(payload: bytes) -> str:
    """Short payloads in hex; of long ones, length and sha256."""
    return payload.hex() if len(payload) <= 1200 else f"{len(payload)} {hashlib.sha256(payload).hexdigest()}"


PINNED: dict[str, str] = json.loads(FILE.read_text()) if FILE.exists() else {}


def test_every_codec_is_pinned() -> None:
    assert sorted(PINNED) == sorted(CASES)


@pytest.mark.parametrize("name", [name for name, (spec, _) in CASES.items() if spec.coder not in OTHERS_ENCODE])
def test_encoded_bytes_are_the_pinned_ones(name: str) -> None:
    assert brief(codec_of(name).encode(arrays_of(name, CASES[name][1]))) == PINNED[name]


@pytest.mark.parametrize("name", [name for name in CASES if " " not in PINNED.get(name, "")])
def test_pinned_bytes_decode_to_what_was_encoded(name: str) -> None:
    spec, crossing = CASES[name]
    codec = codec_of(name)
    restored, _ = codec.roundtrip(arrays_of(name, crossing))
    decoded = codec.decode(bytes.fromhex(PINNED[name]))
    for one, expected in zip(decoded, restored, strict=True):
        if spec.coder in ("webp", "jpeg", "jpeg-bare"):
            # Decoders of lossy formats may round differently; encoders certainly do.
            assert np.abs(one.astype(float) - expected).mean() < 0.1 * expected.std()
        else:
            np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize(
    ("name", "first_byte"),
    [
        ("uniform8c-range", 0x12),
        ("uniform5-range wide", 0x13),
        ("uniform8c-rans", 0x13),
        ("uniform8c-rans large", 0x14),
    ],
)
def test_the_pinned_payloads_go_by_every_entropy_coder(name: str, first_byte: int) -> None:
    assert codec_of(name).encode(arrays_of(name, CASES[name][1]))[0] == first_byte


if __name__ == "__main__":
    pinned = {name: brief(codec_of(name).encode(arrays_of(name, CASES[name][1]))) for name in CASES}
    FILE.write_text(json.dumps(pinned, indent=0, sort_keys=True) + "\n")
