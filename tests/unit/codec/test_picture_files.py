"""Whole picture files, as other programs write them, as payloads of an image codec."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from coinfer.codec import make_codec
from coinfer.codec.image import ImageCodec
from coinfer.errors import PayloadError
from coinfer.plan import CodecSpec, TensorSpec

SHAPE = (16, 24, 3)
CROSSING = (TensorSpec(name="input", shape=SHAPE, dtype="uint8"),)
PICTURE = np.random.default_rng(3).integers(0, 256, SHAPE, dtype=np.uint8)


def codec(coder: str) -> ImageCodec:
    quality = None if coder in ("none", "png", "webp-lossless") else 80
    made = make_codec(CodecSpec(transform="image", coder=coder, quality=quality), CROSSING)  # type: ignore[arg-type]
    assert isinstance(made, ImageCodec)
    return made


def saved(picture: np.ndarray = PICTURE, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **options)
    return file.getvalue()


def opened(file: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(file)).convert("RGB"))[None]


def with_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "another", zip=True)
    return info


@pytest.mark.parametrize(
    ("coder", "options"),
    [
        ("png", {"format": "PNG"}),
        ("png", {"format": "PNG", "dpi": (72, 72), "pnginfo": with_text(), "compress_level": 0}),
        ("webp", {"format": "WEBP", "quality": 30}),
        ("webp", {"format": "WEBP", "quality": 30, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0", "icc_profile": b"x" * 9}),
        ("webp-lossless", {"format": "WEBP", "lossless": True}),
        ("jpeg", {"format": "JPEG", "quality": 30}),
        ("jpeg", {"format": "JPEG", "quality": 99, "subsampling": 0, "optimize": True, "dpi": (72, 72)}),
        ("jpeg-bare", {"format": "JPEG", "quality": 80}),
        ("jpeg-bare", {"format": "JPEG", "quality": 50, "optimize": True, "comment": b"other tables"}),
    ],
)
def test_a_wrapped_file_holds_what_a_reader_sees_in_it(coder: str, options: dict[str, Any]) -> None:
    file = saved(**options)
    (found,) = codec(coder).decode(codec(coder).wrap(file))
    np.testing.assert_array_equal(found, opened(file), strict=True)


def test_a_wrapped_file_of_the_codecs_own_is_its_payload() -> None:
    for coder, options in (
        ("png", {"format": "PNG", "compress_level": 4}),
        ("webp-lossless", {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
        ("jpeg", {"format": "JPEG", "quality": 80, "optimize": True}),
    ):
        assert codec(coder).wrap(saved(**options)) == codec(coder).encode((PICTURE[None],))


def test_grey_pictures_have_files_too() -> None:
    grey = TensorSpec(name="input", shape=(16, 24, 1), dtype="uint8")
    made = make_codec(CodecSpec(transform="image", coder="png"), (grey,))
    assert isinstance(made, ImageCodec)
    (found,) = made.decode(made.wrap(saved(PICTURE[..., 0], format="PNG")))
    np.testing.assert_array_equal(found[0, ..., 0], PICTURE[..., 0])


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]
    frames[0].save(file, format="WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    ("coder", "file", "line"),
    [
        ("none", bytes(16 * 24 * 3), "raw pictures have no files"),
        ("webp", b"", "0 B that are no still WebP picture"),
        ("webp", b"RIFF\0\0\0\0WEBP", "12 B that are no still WebP picture"),
        ("webp", b"RIFF\0\0\0\0WEBPXXXX" + struct.pack("<I", 2**32 - 1), "no still WebP picture"),
        ("webp", saved(format="WEBP", lossless=True), "no still WebP picture"),
        ("webp-lossless", saved(format="WEBP"), "no still WebP picture"),
        ("webp", animated(), "no still WebP picture"),
        ("jpeg", bytes(10_000), "a picture file may have 6400 B, got 10000 B"),
    ],
)
def test_what_is_no_file_of_the_format_is_not_wrapped(coder: str, file: bytes, line: str) -> None:
    with pytest.raises(PayloadError, match=line):
        codec(coder).wrap(file)


@pytest.mark.parametrize(
    ("coder", "file", "line"),
    [
        ("png", b"", "0 B that are no PNG picture"),
        ("png", saved(format="PNG")[:50], "no PNG picture"),
        ("png", saved(format="JPEG"), "no PNG picture"),
        ("png", saved(PICTURE[1:], format="PNG"), "the picture must be RGB"),
        ("png", saved(PICTURE[..., 0], format="PNG"), "the picture must be RGB"),
        ("jpeg", saved(PICTURE[:, 1:], format="JPEG"), "the picture must be RGB"),
        ("jpeg-bare", saved(PICTURE[:, 1:], format="JPEG"), "the picture must be RGB"),
        ("jpeg-bare", saved(format="PNG"), "a JPEG picture is baseline"),
        ("jpeg-bare", saved(format="JPEG", progressive=True), "a JPEG picture is baseline"),
        ("webp", saved(PICTURE[1:], format="WEBP"), r"the frame must be \(16, 24\), got \(15, 24\)"),
        ("webp-lossless", saved(PICTURE[1:], format="WEBP", lossless=True), r"the frame must be \(16, 24\)"),
    ],
)
def test_a_wrapped_file_that_is_no_such_picture_is_a_payload_error(coder: str, file: bytes, line: str) -> None:
    payload = codec(coder).wrap(file)
    with pytest.raises(PayloadError, match=line) as raised:
        codec(coder).decode(payload)
    assert "0x" not in str(raised.value)


def test_whole_jpegs_are_of_bare_jpeg_codecs_alone() -> None:
    with pytest.raises(PayloadError, match='coder must be jpeg, got "jpeg-bare"'):
        codec("jpeg").decode(codec("jpeg-bare").encode((PICTURE[None],)))
