"""Image formats: what is left out of their files, and what is checked before decoding."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from coinfer.codec import image
from coinfer.codec.image import PictureFormat
from coinfer.errors import CodecError, PayloadError

FORMATS = [("none", None), ("png", None), ("webp-lossless", None), ("webp", 80), ("jpeg", 80), ("jpeg-bare", 80)]


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    light = np.add.outer(np.linspace(0, 90, shape[0]), np.linspace(0, 60, shape[1]))
    light = light if len(shape) == 2 else light[..., None] + np.array([0.0, 30.0, 60.0])
    return np.clip(light + rng.normal(20, 4, shape), 0, 255).astype(np.uint8)


def pillow(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("shape", [(8, 8, 3), (33, 17, 3), (40, 24)])
def test_jpeg_bare_and_its_constant_header_are_the_very_file(shape: tuple[int, ...], quality: int) -> None:
    one = PictureFormat("jpeg-bare", quality, shape)
    for seed in range(3):
        pixels = picture(shape, seed)
        code = one.encode(pixels)
        file = pillow(pixels, format="JPEG", quality=quality)
        assert one._known + code + b"\xff\xd9" == file
        assert len(file) - len(code) == (625 if len(shape) == 3 else 330)
        np.testing.assert_array_equal(one.decode(code), np.array(Image.open(io.BytesIO(file))))


def test_jpeg_with_another_header_than_the_constant_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = PictureFormat("jpeg-bare", 80, (16, 16, 3))
    monkeypatch.setitem(one._options, "optimize", True)
    with pytest.raises(CodecError, match=r"another header than for an empty picture \(16, 16, 3\)"):
        one.encode(picture((16, 16, 3)))


@pytest.mark.parametrize(("coder", "quality"), [("webp-lossless", None), ("webp", 70)])
@pytest.mark.parametrize("shape", [(16, 24, 3), (5, 7, 3), (16, 24)])
def test_webp_is_the_file_without_its_riff_header(coder: str, quality: int | None, shape: tuple[int, ...]) -> None:
    one = PictureFormat(coder, quality, shape)
    pixels = picture(shape)
    code = one.encode(pixels)
    file = one._save(pixels)
    assert one._file(code) == file
    assert 20 <= len(file) - len(code) <= 21
    np.testing.assert_array_equal(
        one.decode(code), np.array(Image.open(io.BytesIO(file)).convert("L" if len(shape) == 2 else "RGB"))
    )


def test_webp_with_another_chunk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = PictureFormat("webp", 70, (8, 8, 3))
    monkeypatch.setitem(one._options, "lossless", True)
    with pytest.raises(CodecError, match="VP8L"):
        one.encode(picture((8, 8, 3)))


@pytest.mark.parametrize(("coder", "quality"), FORMATS)
@pytest.mark.parametrize("shape", [(16, 24, 3), (16, 24)])
def test_a_picture_comes_back(coder: str, quality: int | None, shape: tuple[int, ...]) -> None:
    one = PictureFormat(coder, quality, shape)
    pixels = picture(shape)
    restored = one.decode(one.encode(pixels))
    assert restored.shape == shape and restored.dtype == np.uint8
    if quality is None:
        np.testing.assert_array_equal(restored, pixels)
    else:
        assert 0 < np.abs(restored.astype(int) - pixels).mean() < 6


@pytest.mark.parametrize(("coder", "quality"), FORMATS[1:])
def test_a_picture_of_another_size_is_refused(coder: str, quality: int | None) -> None:
    one = PictureFormat(coder, quality, (16, 24, 3))
    for shape in ((24, 16, 3), (160, 24, 3), (16, 24)):
        code = PictureFormat(coder, quality, shape).encode(picture(shape))
        if coder == "jpeg-bare" or (coder.startswith("webp") and len(shape) == 2):
            continue  # the size is the receiver's own; WebP has no grey
        with pytest.raises(PayloadError):
            one.decode(code)


@pytest.mark.parametrize(("coder", "quality"), [("webp-lossless", None), ("webp", 80)])
def test_a_webp_frame_that_claims_a_huge_size_is_refused_before_it_is_opened(
    coder: str, quality: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = PictureFormat(coder, quality, (16, 24, 3))
    code = bytearray(one.encode(picture((16, 24, 3))))
    if coder == "webp":
        code[6:10] = struct.pack("<HH", 16383, 16383)
    else:
        code[1:5] = (16382 | 16382 << 14).to_bytes(4, "little")
    monkeypatch.setattr(image.Image, "open", None)
    with pytest.raises(PayloadError, match=r"the frame must be \(16, 24\), got \(16383, 16383\)"):
        one.decode(bytes(code))


@pytest.mark.parametrize("side", [25, 60_000])
def test_a_png_that_claims_another_size_is_refused_before_it_is_loaded(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 x 60,000 is Pillow's own decompression bomb as well."""
    one = PictureFormat("png", None, (16, 24, 3))
    code = bytearray(one.encode(picture((16, 24, 3))))
    code[16:24] = struct.pack(">II", side, side)
    code[29:33] = struct.pack(">I", zlib.crc32(code[12:29]))
    monkeypatch.setattr(image.Image.Image, "load", None)
    with pytest.raises(PayloadError, match="png"):
        one.decode(bytes(code))


def test_another_format_is_not_opened() -> None:
    gif = pillow(picture((16, 24)), format="GIF")
    with pytest.raises(PayloadError, match="no PNG picture"):
        PictureFormat("png", None, (16, 24)).decode(gif)


@pytest.mark.parametrize(
    ("coder", "quality", "shape", "message"),
    [
        ("png", 80, (8, 8, 3), "quality must be left out, got 80"),
        ("jpeg", None, (8, 8, 3), "quality must be 1 to 100, got None"),
        ("webp", 0, (8, 8, 3), "quality must be 1 to 100, got 0"),
        ("jpeg", 101, (8, 8, 3), "quality must be 1 to 100, got 101"),
        ("png", None, (8, 8, 4), r"got \(8, 8, 4\)"),
        ("webp", 80, (20_000, 8), "sides up to 16383"),
        ("range", None, (8, 8), 'got "range"'),
    ],
)
def test_what_a_format_cannot_do_is_refused(
    coder: str, quality: int | None, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CodecError, match=message):
        PictureFormat(coder, quality, shape)


def test_a_machine_without_webp_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image.features, "check", lambda name: False)
    assert image.available_formats() == ("none", "png", "jpeg", "jpeg-bare")
    with pytest.raises(CodecError, match='one of none, png, jpeg, jpeg-bare, got "webp"'):
        PictureFormat("webp", 80, (8, 8))
