from __future__ import annotations

from coinfer.plan import TensorSpec
from coinfer.search import feature_codecs, input_codecs, space
from coinfer.search.space import INPUT_QUALITIES, PICTURE_QUALITIES

MAP = TensorSpec(name="x", shape=(16, 8, 8))
TOKENS = TensorSpec(name="t", shape=(65, 192))
VECTOR = TensorSpec(name="v", shape=(64,))
CODES = TensorSpec(name="q", shape=(16, 8, 8), dtype="uint8")


def names(*crossing):
    return [spec.name for spec in feature_codecs(crossing)]


def test_specs_are_unique():
    for crossing in ((MAP,), (TOKENS,), (VECTOR,), (CODES,), (MAP, TOKENS)):
        assert len(set(names(*crossing))) == len(names(*crossing))
    assert len({spec.name for spec in input_codecs()}) == len(input_codecs())


def test_every_bit_width_is_entropy_coded_both_ways():
    coded = [s for s in feature_codecs((MAP,)) if s.coder in ("range", "rans")]
    whole = [(s.bits, s.per_channel) for s in coded if s.quality is None]
    assert sorted(whole) == [(bits, c) for bits in range(1, 9) for c in (False, True)]
    assert [(s.bits, s.quality) for s in coded if s.quality is not None] == [(2, 67), (3, 57), (3, 71), (3, 85)]


def test_lossless_and_packed_forms_are_offered():
    expected = {"float32-none", "float32-zstd", "float16-none", "float16-zstd", "uniform8c-zstd", "uniform1c-zstd"}
    assert expected < set(names(MAP))


def test_only_one_map_is_tiled_to_a_picture():
    pictures = {spec.name for spec in feature_codecs((MAP,)) if spec.transform == "picture"}
    lossy = {f"picture-{coder}-q{quality}" for coder in ("webp", "jpeg") for quality in PICTURE_QUALITIES}
    assert pictures == {"picture-png", "picture-webp-lossless", *lossy}
    for crossing in ((TOKENS,), (VECTOR,), (MAP, MAP)):
        assert not any(name.startswith("picture") for name in names(*crossing))


def test_int8_codes_cross_as_they_are_or_with_fewer_bits():
    specs = feature_codecs((CODES,))
    assert {spec.transform for spec in specs} == {"uniform"}
    assert "uniform8-none" in names(CODES)
    # At 8 bits the codes' own scale is kept, so a range per channel is no candidate.
    assert not any(spec.per_channel for spec in specs if spec.bits == 8 and spec.coder != "zstd")
    assert {spec.bits for spec in specs} == set(range(1, 9))


def test_one_channel_needs_no_ranges_per_channel():
    assert not any(spec.per_channel for spec in feature_codecs((TensorSpec(name="m", shape=(1, 8, 8)),)))


def test_values_that_no_codec_carries_get_none():
    assert feature_codecs((TensorSpec(name="ids", shape=(4,), dtype="int64"),)) == []
    assert feature_codecs((MAP, CODES)) == []


def test_input_codecs_sweep_the_quality_of_each_lossy_format():
    specs = input_codecs()
    assert {spec.transform for spec in specs} == {"image"}
    for coder in ("webp", "jpeg", "jpeg-bare"):
        assert tuple(spec.quality for spec in specs if spec.coder == coder) == INPUT_QUALITIES
    assert [spec.name for spec in specs if spec.quality is None] == ["raw", "png", "webp-lossless"]


def test_what_this_machine_cannot_code_is_left_out(monkeypatch):
    monkeypatch.setattr(space, "available_coders", lambda: ("png", "jpeg", "zstd", "rans"))
    offered = [*feature_codecs((MAP,)), *input_codecs()]
    assert {spec.coder for spec in offered} == {"none", "png", "jpeg", "zstd", "rans"}
    assert {spec.coder for spec in feature_codecs((CODES,))} == {"none", "zstd", "rans"}
