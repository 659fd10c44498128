"""make_codec and calibrate: what they refuse, and int8 codes."""

from __future__ import annotations

import numpy as np
import pytest

from coinfer.codec import Tables, calibrate, make_codec
from coinfer.errors import CodecError
from coinfer.plan import CodecSpec, TensorSpec

MAP = TensorSpec(name="map", shape=(4, 3, 3))
PICTURE = TensorSpec(name="input", shape=(8, 8, 3), dtype="uint8")
RANGE4 = CodecSpec(transform="uniform", bits=4, per_channel=True, coder="range")


def features(tensor: TensorSpec = MAP) -> np.ndarray:
    return np.random.default_rng(0).random((9, *tensor.shape), dtype=np.float32)


@pytest.mark.parametrize(
    ("spec", "crossing", "message"),
    [
        (CodecSpec(transform="uniform", bits=12), (MAP,), r'bits must be 1 to 8, got 12 \(codec "uniform12-none"\)'),
        (CodecSpec(transform="uniform", bits=0), (MAP,), "bits must be 1 to 8, got 0"),
        (CodecSpec(transform="picture", bits=4, coder="png"), (MAP,), "bits must be 8, got 4"),
        (CodecSpec(transform="uniform", coder="zstd", quality=50), (MAP,), "quality must be left out, got 50"),
        (CodecSpec(transform="uniform", coder="range", quality=0), (MAP,), "quality must be 1 to 100, got 0"),
        (CodecSpec(transform="float32", coder="range"), (MAP,), 'none or zstd, got "range"'),
        (CodecSpec(transform="image", coder="png"), (MAP,), r"takes one uint8 \(H, W, 3\)"),
        (CodecSpec(transform="image", coder="png"), (PICTURE, PICTURE), "takes one uint8"),
        (CodecSpec(transform="image", coder="zstd"), (PICTURE,), 'got "zstd"'),
        (CodecSpec(transform="float32"), (), "at least one tensor"),
        (CodecSpec(transform="float32"), (TensorSpec(name="x", shape=(0, 3)),), "at least one element"),
        (RANGE4, (MAP,), "needs tables of 1 tensors, got 0"),
    ],
)
def test_specs_that_make_no_codec_are_refused(spec: CodecSpec, crossing: tuple[TensorSpec, ...], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        make_codec(spec, crossing)


@pytest.mark.parametrize(
    ("other", "crossing", "message"),
    [
        (CodecSpec(transform="uniform", bits=3, per_channel=True, coder="range"), (MAP,), "must have levels"),
        (CodecSpec(transform="uniform", bits=4, coder="range"), (MAP,), "must have levels"),
        (
            CodecSpec(transform="uniform", bits=4, per_channel=True),
            (MAP,),
            r"must have frequencies \(channels, symbols\) \(4, 256\), got None",
        ),
        (RANGE4, (TensorSpec(name="map", shape=(5, 2, 2)),), "must have levels"),
    ],
)
def test_tables_of_another_codec_are_refused(other: CodecSpec, crossing: tuple[TensorSpec, ...], message: str) -> None:
    tables = calibrate(other, crossing, [features(tensor) for tensor in crossing])
    with pytest.raises(CodecError, match=message):
        make_codec(RANGE4, (MAP,), tables)


def test_float_levels_are_refused_for_int8_codes() -> None:
    codes = TensorSpec(name="codes", shape=(4, 3, 3), dtype="uint8")
    with pytest.raises(CodecError, match="must have uint8 levels, got float32"):
        make_codec(RANGE4, (codes,), calibrate(RANGE4, (MAP,), [features()]))


def test_calibration_features_of_another_shape_are_refused() -> None:
    with pytest.raises(CodecError, match='tensor "map" must be float32'):
        calibrate(RANGE4, (MAP,), [features()[:, :2]])


def test_only_float32_and_codes_can_be_quantised() -> None:
    tokens = TensorSpec(name="ids", shape=(4,), dtype="int64")
    with pytest.raises(CodecError, match='tensor "ids" is int64'):
        calibrate(RANGE4, (tokens,), [np.zeros((2, 4), np.int64)])


def test_floats_and_images_need_no_tables() -> None:
    assert calibrate(CodecSpec(transform="float16"), (MAP,), [features()]).tensors == Tables().tensors
    assert calibrate(CodecSpec(transform="image", coder="png"), (PICTURE,), []).tensors == ()


@pytest.mark.parametrize("coder", ["none", "zstd", "range", "rans"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_of_an_int8_network_cross_losslessly_at_8_bits(coder: str, per_channel: bool) -> None:
    tensor = TensorSpec(name="codes", shape=(3, 6, 6), dtype="uint8")
    codes = np.random.default_rng(0).integers(0, 256, (20, 3, 6, 6), dtype=np.uint8)
    spec = CodecSpec(transform="uniform", bits=8, per_channel=per_channel, coder=coder)
    codec = make_codec(spec, (tensor,), calibrate(spec, (tensor,), [codes[:2]]))
    for index in range(20):
        one = codes[index : index + 1]
        np.testing.assert_array_equal(codec.decode(codec.encode([one]))[0], one)


def test_codes_at_fewer_bits_are_a_table_that_keeps_the_zero_point() -> None:
    tensor = TensorSpec(name="codes", shape=(2, 8, 8), dtype="uint8")
    rng = np.random.default_rng(0)
    codes = np.clip(np.maximum(rng.normal(0, 40, (30, 2, 8, 8)), 0) + 5, 0, 255).astype(np.uint8)
    spec = CodecSpec(transform="uniform", bits=2, per_channel=True, coder="range")
    codec = make_codec(spec, (tensor,), calibrate(spec, (tensor,), [codes]))
    (restored,), _ = codec.roundtrip([codes])
    assert restored.dtype == np.uint8
    assert (restored[codes == 5] == 5).all()
    assert all(len(np.unique(restored[:, channel])) == 4 for channel in range(2))


def test_half_precision_is_clipped_to_its_range() -> None:
    codec = make_codec(CodecSpec(transform="float16"), (MAP,))
    x = features()[:1]
    x[0, 0, 0] = [1e6, -1e6, np.inf]
    (restored,) = codec.decode(codec.encode([x]))
    assert restored[0, 0, 0].tolist() == [65504, -65504, 65504]


def test_quality_is_a_rate_between_whole_bits() -> None:
    crossing = (TensorSpec(name="x", shape=(8, 16, 16)),)
    x = np.maximum(np.random.default_rng(0).normal(0, 1, (40, 8, 16, 16)), 0).astype(np.float32)
    sizes = []
    for bits, quality in ((2, None), (3, 57), (3, 71), (3, None)):
        spec = CodecSpec(transform="uniform", bits=bits, per_channel=True, coder="range", quality=quality)
        _, num_bytes = make_codec(spec, crossing, calibrate(spec, crossing, [x])).roundtrip([x])
        sizes.append(num_bytes.mean())
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[3]


def test_one_calibration_image_is_enough_for_every_value() -> None:
    x = np.zeros((1, 4, 3, 3), np.float32)
    codec = make_codec(RANGE4, (MAP,), calibrate(RANGE4, (MAP,), [x]))
    (restored,) = codec.decode(codec.encode([x + 3]))
    np.testing.assert_array_equal(restored, x + 3)
