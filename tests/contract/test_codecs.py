"""What every codec promises, whatever it is made of: one suite for all of them."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coinfer.codec import HEADER_BYTES, Codec, Tables, available_coders, calibrate, load_tables, make_codec, save_tables
from coinfer.codec.quantize import to_channels
from coinfer.errors import CodecError, PayloadError
from coinfer.plan import CodecSpec, TensorSpec

BATCH = 12


def features(tensor: TensorSpec, seed: int) -> NDArray[np.float32]:
    """What a cut gives: exact zeros and a tail, another scale in each channel; codes for an int8 cut."""
    rng = np.random.default_rng(seed)
    values = (
        np.maximum(rng.normal(-0.3, 1, (BATCH, *tensor.shape)), 0)
        * rng.gamma(2, 1, tensor.shape[:1])[(None, slice(None), *[None] * (len(tensor.shape) - 1))]
    )
    if tensor.dtype == "uint8":
        return np.clip(values * 30 + 7, 0, 255).astype(np.uint8)
    return values.astype(np.float32)


def pictures(tensor: TensorSpec, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    height, width, _ = tensor.shape
    light = np.cumsum(rng.normal(0, 5, (BATCH, height, width, 1)), axis=1)
    light += np.cumsum(rng.normal(0, 5, (BATCH, height, width, 1)), axis=2)
    colour = rng.normal(0, 20, (BATCH, 1, 1, tensor.shape[2])) + rng.normal(0, 2, (BATCH, *tensor.shape))
    return np.clip(light + colour + 128, 0, 255).astype(np.uint8)


class Case(NamedTuple):
    spec: CodecSpec
    crossing: tuple[TensorSpec, ...]

    @property
    def label(self) -> str:
        shapes = "+".join("x".join(map(str, t.shape)) + ("u8" if t.dtype == "uint8" else "") for t in self.crossing)
        return f"{self.spec.name}@{shapes}"

    def arrays(self, seed: int = 0) -> list[NDArray]:
        make = pictures if self.spec.transform == "image" else features
        return [make(tensor, seed + index) for index, tensor in enumerate(self.crossing)]

    def tables(self) -> Tables:
        return calibrated(self)

    def codec(self) -> Codec:
        return make_codec(self.spec, self.crossing, self.tables())


@cache
def calibrated(case: Case) -> Tables:
    return calibrate(case.spec, case.crossing, case.arrays())


MAP = TensorSpec(name="map", shape=(5, 4, 6))
TOKENS = TensorSpec(name="tokens", shape=(7, 6))
VECTOR = TensorSpec(name="vector", shape=(20,))
CODES = TensorSpec(name="codes", shape=(3, 5, 5), dtype="uint8")
COLOUR = TensorSpec(name="input", shape=(16, 24, 3), dtype="uint8")
GREY = TensorSpec(name="input", shape=(9, 8, 1), dtype="uint8")


def specs_of_features() -> list[CodecSpec]:
    floats = [CodecSpec(transform=t, coder=c) for t in ("float32", "float16") for c in ("none", "zstd")]
    uniform = [
        CodecSpec(transform="uniform", bits=bits, per_channel=per_channel, coder=coder)
        for coder in ("none", "zstd", "range", "rans")
        for bits, per_channel in ((1, True), (2, False), (3, True), (4, True), (8, False))
    ]
    tiled = [
        CodecSpec(transform="picture", coder=coder, quality=quality, per_channel=True)
        for coder, quality in (("png", None), ("webp-lossless", None), ("webp", 80), ("jpeg", 80), ("jpeg-bare", 80))
    ]
    return [*floats, *uniform, *tiled]


INPUTS = [
    CodecSpec(transform="image", coder=coder, quality=quality)
    for coder, quality in (
        ("none", None),
        ("png", None),
        ("webp-lossless", None),
        ("webp", 70),
        ("jpeg", 70),
        ("jpeg-bare", 70),
        ("jpeg-bare", 100),
    )
]
CASES = [
    *[Case(spec, (MAP,)) for spec in specs_of_features()],
    *[Case(spec, (MAP, TOKENS, VECTOR)) for spec in specs_of_features()],
    *[Case(spec, (CODES,)) for spec in specs_of_features() if spec.transform in ("float32", "uniform", "picture")],
    *[Case(spec, (picture,)) for spec, picture in itertools.product(INPUTS, (COLOUR, GREY))],
]
every_codec = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
SINGLES = [case for case in CASES if case.crossing in ((MAP,), (COLOUR,))]
every_spec = pytest.mark.parametrize("case", SINGLES, ids=lambda case: case.label)


def first(arrays: list[NDArray], index: int = 0) -> list[NDArray]:
    return [array[index : index + 1] for array in arrays]


def is_lossless(case: Case) -> bool:
    spec = case.spec
    if spec.transform == "image":
        return spec.coder in ("none", "png", "webp-lossless")
    codes_as_they_are = case.crossing == (CODES,) and spec.bits == 8 and spec.coder not in ("webp", "jpeg", "jpeg-bare")
    return spec.transform == "float32" or codes_as_they_are


@every_codec
def test_a_batch_comes_back_exactly_as_its_samples_do(case: Case) -> None:
    codec, arrays = case.codec(), case.arrays(seed=100)
    restored, num_bytes = codec.roundtrip(arrays)
    assert num_bytes.shape == (BATCH,)
    for index in range(BATCH):
        payload = codec.encode(first(arrays, index))
        decoded = codec.decode(payload)
        for spec, one, many in zip(case.crossing, decoded, restored, strict=True):
            assert one.shape == (1, *spec.shape) and one.dtype == spec.dtype and many.dtype == spec.dtype
            np.testing.assert_array_equal(one, many[index : index + 1])
        if codec.bytes_how == "measured":
            assert len(payload) == num_bytes[index]
        else:
            cost = num_bytes[index] - HEADER_BYTES
            assert cost - 1 <= len(payload) - HEADER_BYTES <= 1.01 * cost + 1


@every_codec
def test_restored_is_what_the_transform_promises(case: Case) -> None:
    codec, arrays = case.codec(), case.arrays()
    restored, _ = codec.roundtrip(arrays)
    for index, (tensor, x, x_hat) in enumerate(zip(case.crossing, arrays, restored, strict=True)):
        if is_lossless(case):
            np.testing.assert_array_equal(x_hat, x)
        elif case.spec.transform == "float16":
            np.testing.assert_array_equal(x_hat, x.astype(np.float16).astype(np.float32))
        elif case.spec.coder not in ("webp", "jpeg", "jpeg-bare"):
            table = case.tables().tensors[index]
            y, y_hat = (to_channels(tensor, a).astype(np.float64) for a in (x, x_hat))
            top = table.levels.max(axis=1)[:, None].astype(np.float64)
            bottom = table.levels.min(axis=1)[:, None].astype(np.float64)
            half = table.step[:, None] / 2 + (0.5 if tensor.dtype == "uint8" else 1e-5)
            assert (np.abs(np.clip(y, bottom, top) - y_hat) <= half).all()
        else:
            assert np.abs(x_hat.astype(np.float64) - x).mean() < 0.25 * x.std()


@every_codec
def test_the_same_arrays_give_the_same_bytes_from_tables_read_back(case: Case, tmp_path: Path) -> None:
    arrays = case.arrays()
    tables = case.tables()
    save_tables(tables, tmp_path / "tables.safetensors")
    again = make_codec(case.spec, case.crossing, load_tables(tmp_path / "tables.safetensors"))
    codec = make_codec(case.spec, case.crossing, tables)
    payloads = {one.encode(first(arrays)) for one in (codec, again, codec)}
    assert len(payloads) == 1
    assert calibrate(case.spec, case.crossing, arrays).digest == tables.digest


@every_spec
def test_a_payload_cut_short_anywhere_is_refused(case: Case) -> None:
    codec = case.codec()
    payload = codec.encode(first(case.arrays()))
    for size in range(len(payload)):
        with pytest.raises(PayloadError):
            codec.decode(payload[:size])


@every_spec
def test_a_payload_with_any_bit_turned_is_refused(case: Case) -> None:
    codec = case.codec()
    payload = codec.encode(first(case.arrays()))
    for bit in range(8 * len(payload)):
        altered = bytearray(payload)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            codec.decode(bytes(altered))


@every_codec
def test_a_payload_with_bytes_behind_it_is_refused(case: Case) -> None:
    codec = case.codec()
    payload = codec.encode(first(case.arrays()))
    for tail in (b"\0", b"\xff", payload, bytes(100_000)):
        with pytest.raises(PayloadError):
            codec.decode(payload + tail)


@every_spec
def test_an_oversized_payload_is_refused_by_its_length(case: Case) -> None:
    with pytest.raises(PayloadError, match=r"must have 6 to \d+ B, got 4000000 B"):
        case.codec().decode(bytes(4_000_000))


@every_spec
def test_another_codecs_payload_is_refused(case: Case) -> None:
    """Another spec, tables or crossing: the fingerprint is one byte, so a chance of 1 in 256 each remains."""
    codec = case.codec()
    accepted = 0
    others = [other for other in SINGLES if other.label != case.label]
    for other in others:
        try:
            codec.decode(other.codec().encode(first(other.arrays())))
        except PayloadError:
            continue
        accepted += 1
    assert accepted <= len(others) / 16


def forged(codec: Codec, payload: bytes, code: bytes) -> bytes:
    """A payload with another code behind a right header."""
    return payload[:2] + struct.pack("<I", zlib.crc32(code, zlib.crc32(payload[:2]))) + code


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=st.sampled_from(SINGLES), data=st.binary(max_size=300))
def test_random_bytes_are_refused(case: Case, data: bytes) -> None:
    with pytest.raises(PayloadError):
        case.codec().decode(data)


@every_codec
def test_a_forged_code_gives_arrays_or_payload_error(case: Case) -> None:
    """A right header and CRC before any code: nothing else may happen than a refusal, or arrays that fit."""
    codec = case.codec()
    payload = codec.encode(first(case.arrays()))
    code = payload[HEADER_BYTES:]
    rng = np.random.default_rng(zlib.crc32(case.label.encode()))
    outcomes = []
    for _ in range(60):
        start = int(rng.integers(0, len(code) + 1))
        stop = start + int(rng.integers(0, 9))
        near = code[:start] + rng.bytes(int(rng.integers(0, 9))) + code[stop:]
        for forgery in (near, rng.bytes(int(rng.integers(0, 2 * len(code) + 2)))):
            try:
                arrays = codec.decode(forged(codec, payload, forgery))
            except PayloadError as error:
                outcomes.append(str(error))
            else:
                assert [array.shape[1:] for array in arrays] == [tensor.shape for tensor in case.crossing]
                outcomes.append("arrays")
    assert len(outcomes) == 120


@every_codec
def test_arrays_that_do_not_fit_are_refused(case: Case) -> None:
    codec, arrays = case.codec(), case.arrays()
    wrong: list[list[NDArray]] = [
        [],
        [*first(arrays), arrays[0][:1]],
        [arrays[0][:1, :-1], *first(arrays)[1:]],
        [arrays[0][:1].astype(np.int16), *first(arrays)[1:]],
        [arrays[0][0], *first(arrays)[1:]],
    ]
    calls: list[Callable[[list[NDArray]], object]] = [codec.encode, codec.roundtrip]
    for call, given_arrays in itertools.product(calls, wrong):
        with pytest.raises(CodecError, match="cross|must be"):
            call(given_arrays)
    with pytest.raises(CodecError, match="must be"):
        codec.encode(arrays)


@every_codec
def test_not_a_number_is_refused_or_carried(case: Case) -> None:
    arrays = first(case.arrays())
    if case.crossing[0].dtype == "uint8":
        return
    for value in (math.nan, math.inf, -math.inf):
        arrays[0] = arrays[0].copy()
        arrays[0].flat[3] = value
        codec = case.codec()
        if case.spec.transform == "float32":
            np.testing.assert_array_equal(codec.decode(codec.encode(arrays))[0], arrays[0])
        elif case.spec.transform != "float16":
            with pytest.raises(CodecError, match="finite"):
                codec.encode(arrays)
            with pytest.raises(CodecError, match="finite"):
                codec.roundtrip(arrays)


@every_codec
def test_a_name_is_one_specs_alone_and_its_coder_is_here(case: Case) -> None:
    assert case.spec.coder in available_coders()
    alike = {other.spec for other in CASES if other.spec.name == case.spec.name}
    assert alike == {case.spec}


@pytest.mark.parametrize("bits", range(1, 9))
def test_what_is_restored_depends_on_the_quantiser_alone_not_on_the_coder(bits: int) -> None:
    specs = [CodecSpec(transform="uniform", bits=bits, coder=coder) for coder in ("none", "zstd", "range", "rans")]
    restored = [Case(spec, (MAP,)).codec().roundtrip(Case(spec, (MAP,)).arrays())[0][0] for spec in specs]
    for other in restored[1:]:
        np.testing.assert_array_equal(other, restored[0])


@every_spec
def test_values_beyond_calibration_are_clipped_not_wrapped(case: Case) -> None:
    if case.spec.transform not in ("uniform", "picture") or case.spec.quality is not None:
        return
    codec, arrays = case.codec(), case.arrays()
    huge = [np.full_like(array[:1], 3e38) for array in arrays]
    deep = [np.full_like(array[:1], -3e38) for array in arrays]
    for values, pick in ((huge, np.max), (deep, np.min)):
        (restored,) = codec.decode(codec.encode(values))
        table = case.tables().tensors[0]
        expected = np.broadcast_to(pick(table.levels, axis=1)[:, None, None], MAP.shape)
        np.testing.assert_array_equal(restored[0], expected)
