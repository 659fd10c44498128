"""Which codecs are worth trying: at a cut, and on the input picture.

Every combination listed here is a candidate of its own whose accuracy and bytes the build
measures, so the lists are wide where a choice matters (bits, quality) and narrow elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..codec import available_coders
from ..plan import CodecSpec, Coder, TensorSpec

INPUT_QUALITIES = (10, 30, 50, 70, 80, 85, 90, 93, 95, 98)
PICTURE_QUALITIES = (20, 50, 80)
PACKED_BITS = (1, 2, 4, 8)
# Shares of the levels, in percent, between the whole bits, where a step in rate costs accuracy most: 3, 5, 6, 7 levels.
FILLS = {2: (67,), 3: (57, 71, 85)}


def feature_codecs(crossing: tuple[TensorSpec, ...]) -> list[CodecSpec]:
    """Codecs to try at a cut whose values are `crossing`, each spec once, in a fixed order.

    All float32 values: the values themselves (float32, float16), uniform 1 to 8 bits, and, where one
    (C, H, W) tensor crosses, the tiled picture. All uint8 values (the codes of an int8 head):
    8 bits are the codes themselves, fewer are a table on the codes.
    Empty where a value of another dtype crosses: no codec carries it, so the cut is not offered.
    Image formats that this machine's Pillow lacks are left out.

    >>> names = [spec.name for spec in feature_codecs((TensorSpec(name="x", shape=(8, 4, 4)),))]
    >>> "uniform4c-zstd" in names, "picture-webp-q80" in names
    (True, True)
    """
    dtypes = {spec.dtype for spec in crossing}
    if dtypes == {"uint8"}:
        return _available(_uniform(crossing, per_channel_8=False))
    if dtypes != {"float32"}:
        return []
    plain = [
        CodecSpec(transform="float32", coder="none"),
        CodecSpec(transform="float32", coder="zstd"),
        CodecSpec(transform="float16", coder="none"),
        CodecSpec(transform="float16", coder="zstd"),
    ]
    is_picture = len(crossing) == 1 and len(crossing[0].shape) == 3
    return _available([*plain, *_uniform(crossing, per_channel_8=True), *(_pictures() if is_picture else ())])


def input_codecs(channels: int = 3) -> list[CodecSpec]:
    """Codecs to try on the input picture (uint8): raw, lossless, and lossy at swept quality.

    Image formats hold 1 or 3 channels; any other number has none.

    >>> [spec.name for spec in input_codecs()][:4]
    ['raw', 'png', 'webp-lossless', 'webp-q10']
    """
    if channels not in (1, 3):
        return []
    lossless: tuple[Coder, ...] = ("none", "png", "webp-lossless")
    lossy: tuple[Coder, ...] = ("webp", "jpeg", "jpeg-bare")
    return _available(
        [
            *(CodecSpec(transform="image", coder=coder) for coder in lossless),
            *(CodecSpec(transform="image", coder=coder, quality=q) for coder in lossy for q in INPUT_QUALITIES),
        ]
    )


def _uniform(crossing: tuple[TensorSpec, ...], *, per_channel_8: bool) -> Iterable[CodecSpec]:
    """Uniform codecs: entropy coded at all bits and some rates in between, bit-packed with zstd at a few.

    One range per channel differs from one for the tensor only where a tensor has several channels.
    """
    coder: Coder = "range" if "range" in available_coders() else "rans"
    has_channels = any(_num_channels(spec) > 1 for spec in crossing)
    for bits in range(1, 9):
        for per_channel in (False, True) if has_channels else (False,):
            if per_channel and bits == 8 and not per_channel_8:
                continue
            yield CodecSpec(transform="uniform", bits=bits, per_channel=per_channel, coder=coder)
            if bits in PACKED_BITS and per_channel == has_channels:
                yield CodecSpec(transform="uniform", bits=bits, per_channel=per_channel, coder="zstd")
        for fill in FILLS.get(bits, ()):
            yield CodecSpec(transform="uniform", bits=bits, coder=coder, quality=fill)
    if not per_channel_8:
        yield CodecSpec(transform="uniform", bits=8, coder="none")


def _pictures() -> Iterable[CodecSpec]:
    lossless: tuple[Coder, ...] = ("png", "webp-lossless")
    lossy: tuple[Coder, ...] = ("webp", "jpeg")
    for coder in lossless:
        yield CodecSpec(transform="picture", coder=coder)
    for coder in lossy:
        for quality in PICTURE_QUALITIES:
            yield CodecSpec(transform="picture", coder=coder, quality=quality)


def _available(specs: Iterable[CodecSpec]) -> list[CodecSpec]:
    have = {"none", *available_coders()}
    return [spec for spec in specs if spec.coder in have]


def _num_channels(spec: TensorSpec) -> int:
    """Channels of a crossing tensor: the first axis of (C, H, W) and (C,), the last of (T, C)."""
    if not spec.shape:
        return 1
    return spec.shape[-1] if len(spec.shape) == 2 else spec.shape[0]
