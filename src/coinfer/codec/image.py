"""Pictures (H, W) or (H, W, 3) uint8 through PNG, WebP and JPEG, as shorter or safer byte strings.

Two things are left out of a file where both ends know them:

    webp        the 20 B of RIFF around the frame: they say its length, and that it is WebP
    jpeg-bare   everything up to and with the scan header, and the end mark: quantisation tables follow from
                the quality, Huffman tables are the standard's (optimising is off), the frame header from the
                shape: 623 B in colour, 328 B in grey, often more than the picture itself

A picture's size is read from the code's own header and checked before anything is decoded.

NOTE the settings.  Chosen for least latency: time to encode against bytes, on 200 CIFAR-10 test images (32 x 32)
and 30 photographs (224 x 224); one busy core of a 2.5 GHz Xeon, Pillow 13, medians, so the ratios count:

    png            level 1 / 4 / 9         CIFAR 2,287 / 2,267 / 2,262 B at 0.37 ms each;
                                           photo 93.5 / 88.6 / 87.8 kB at 6.8 / 11 / 29 ms       -> 4
    webp-lossless  method 0 / 1 / 4        CIFAR 1,826 / 1,744 / 1,745 B, 0.35 / 0.76 / 1.5 ms
                   (quality 0)             photo 73.4 / 68.3 / 65.5 kB, 4.2 / 22 / 66 ms         -> 0;
                                           64 features of 8 x 8, grey: 2,489 / 2,238 / 2,238 B,
                                           0.9 / 0.8 / 0.7 ms                                    -> 4 in grey
    webp           method 2 / 4 / 6        CIFAR, quality 95: 753 / 740 / 729 B, 0.43 / 0.49 / 0.92 ms
                                           photo, quality 80: 8.8 / 8.5 / 8.0 kB, 4.9 / 10 / 22 ms
                   ResNet-20's top-1 on 2,000 CIFAR images at 560 B: 88.9 % (method 2), 89.8 % (method 4)
                   -> 4 up to 128 x 128 pixels, 2 above
    jpeg           optimised tables save 320 B of a CIFAR image and 4 % of a photo, for 0.02 and 0.5 ms  -> on
                   4:2:0 / 4:4:4 at 530 B, bare: top-1 88.2 / 87.0 %; photos alike        -> 4:2:0
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from ..errors import CodecError, PayloadError
from ..plan import CodecSpec, TensorSpec
from . import payload
from .container import bare_png, check_jpeg, check_png
from .contract import Arrays, BytesHow, check_arrays

Pixels = NDArray[np.uint8]

LOSSLESS = ("none", "png", "webp-lossless")
LOSSY = ("webp", "jpeg", "jpeg-bare")

_SETTINGS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 4},
    "webp-lossless": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
    "webp": {"format": "WEBP"},
    "jpeg": {"format": "JPEG", "optimize": True},
    "jpeg-bare": {"format": "JPEG", "optimize": False},
}
_MAX_SIDE = {"none": 1 << 20, "png": 1 << 20, "webp-lossless": 16383, "webp": 16383, "jpeg": 65500, "jpeg-bare": 65500}
_SMALL_PICTURE = 128 * 128
_END_OF_JPEG = b"\xff\xd9"
_RIFF_BYTES = 20
_WEBP_CHUNKS = 12
_DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def available_formats() -> tuple[str, ...]:
    """The image coders that this machine's Pillow has."""
    has_webp = bool(features.check("webp"))
    return tuple(name for name in ("none", *_SETTINGS) if has_webp or not name.startswith("webp"))


class PictureFormat:
    """One format at one quality for pictures of one shape.

    Raises:
        CodecError: the format has no such quality, cannot hold the shape, or is missing from this machine.
    """

    def __init__(self, coder: str, quality: int | None, shape: tuple[int, ...]) -> None:
        self.coder, self.shape = coder, shape
        if coder not in available_formats():
            raise CodecError(f'coder must be one of {", ".join(available_formats())}, got "{coder}" (image)')
        if (coder in LOSSY) != (quality is not None) or (quality is not None and not 1 <= quality <= 100):
            allowed = "1 to 100" if coder in LOSSY else "left out"
            raise CodecError(f'quality must be {allowed}, got {quality} (coder "{coder}")')
        if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or max(shape) > _MAX_SIDE[coder]:
            raise CodecError(
                f"a picture must be (H, W) or (H, W, 3) with sides up to {_MAX_SIDE[coder]}, got {shape} "
                f'(coder "{coder}")'
            )
        self._options = dict(_SETTINGS.get(coder, {})) | ({} if quality is None else {"quality": quality})
        if coder == "webp-lossless" and len(shape) == 2:
            self._options["method"] = 4
        if coder == "webp":
            self._options["method"] = 4 if int(np.prod(shape[:2])) <= _SMALL_PICTURE else 2
        self._mode = "L" if len(shape) == 2 else "RGB"
        self.num_bytes = int(np.prod(shape))
        self.max_code_bytes = self.num_bytes if coder == "none" else 2 * self.num_bytes + 4096
        self._known = b""
        # Both ends make the header that is left out; an encoder of another build, with another header, must be noticed.
        self.header_mark = 0
        if coder == "jpeg-bare":
            self._known = _scan_prefix(self._save(np.zeros(shape, np.uint8)))
            self.header_mark = hashlib.sha256(self._known).digest()[0]

    def encode(self, pixels: Pixels) -> bytes:
        """The code of one picture.

        Raises:
            CodecError: the encoder wrote a header that the other end would not know.
        """
        if self.coder == "none":
            return pixels.tobytes()
        file = self._save(pixels)
        if self.coder == "jpeg-bare":
            if not (file.startswith(self._known) and file.endswith(_END_OF_JPEG)):
                raise CodecError(f"the JPEG encoder wrote another header than for an empty picture {self.shape}")
            return file[len(self._known) : -len(_END_OF_JPEG)]
        if self.coder.startswith("webp"):
            return self._unwrap_webp(file)
        return file

    def decode(self, code: bytes) -> Pixels:
        """The picture of a code.

        Raises:
            PayloadError: the code is not one of this format and shape.
        """
        if self.coder == "none":
            if len(code) != self.num_bytes:
                raise PayloadError(f"a raw picture {self.shape} has {self.num_bytes} B, got {len(code)} B")
            return np.frombuffer(code, np.uint8).reshape(self.shape)
        return self.load(self._file(code))

    def code_of(self, file: bytes) -> bytes:
        """What of a whole file, as other programs write them, is its code; of a bare JPEG all of it.

        Raises:
            PayloadError: it is no file of this format, as far as its beginning says, or there are no such files.
        """
        if self.coder == "none":
            raise PayloadError("raw pictures have no files")
        if self.coder == "png":
            return bare_png(file)
        if not self.coder.startswith("webp"):
            return file
        place = _WEBP_CHUNKS
        while file[:4] == b"RIFF" and file[8:12] == b"WEBP" and place + 8 <= len(file):
            (size,) = struct.unpack_from("<I", file, place + 4)
            if file[place : place + 4] == self._fourcc():
                return file[place + 8 : place + 8 + size]
            place += 8 + size + size % 2
        raise PayloadError(f"{len(file)} B that are no still WebP picture (coder {self.coder})")

    def _save(self, pixels: Pixels) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, **self._options)
        return file.getvalue()

    def _file(self, code: bytes) -> bytes:
        """The whole file, what was left out put back."""
        if self.coder == "jpeg-bare":
            return self._known + code + _END_OF_JPEG
        if self.coder.startswith("webp"):
            self._check_webp_size(code)
            chunk = self._fourcc() + struct.pack("<I", len(code)) + code + bytes(len(code) % 2)
            return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk
        return code

    def load(self, file: bytes) -> Pixels:
        """The picture of a whole file, of the shape that this format is for.

        Raises:
            PayloadError: it is no such file.
        """
        name = self._options["format"]
        if name == "PNG":
            check_png(file)
        if name == "JPEG":
            check_jpeg(file)
        try:
            with Image.open(io.BytesIO(file), formats=[name]) as image:
                mode = "RGB" if name == "WEBP" else self._mode
                if (image.height, image.width) != self.shape[:2] or image.mode != mode:
                    raise PayloadError(
                        f"the picture must be {self._mode} {self.shape[:2]}, got {image.mode} "
                        f"{(image.height, image.width)} (coder {self.coder})"
                    )
                image.load()
                return np.array(image if image.mode == self._mode else image.convert(self._mode))
        except _DECODE_ERRORS as error:
            # What Pillow does not know it names by an address in memory.
            why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
            raise PayloadError(f"{len(file)} B that are no {name} picture{why} (coder {self.coder})") from error

    def _fourcc(self) -> bytes:
        return b"VP8L" if self.coder == "webp-lossless" else b"VP8 "

    def _unwrap_webp(self, file: bytes) -> bytes:
        size = struct.unpack_from("<I", file, 16)[0]
        if file[12:16] != self._fourcc() or _RIFF_BYTES + size + size % 2 != len(file):
            raise CodecError(f'the WebP encoder wrote a chunk {file[12:16]!r} (coder "{self.coder}")')
        return file[_RIFF_BYTES : _RIFF_BYTES + size]

    def _check_webp_size(self, code: bytes) -> None:
        """The frame's own width and height: libwebp allocates them as soon as it opens a file."""
        if self.coder == "webp-lossless":
            bits = int.from_bytes(code[1:5], "little")
            size = ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
            has_mark = code[:1] == b"\x2f"
        else:
            width, height = struct.unpack("<HH", code[6:10].ljust(4, b"\0"))
            size = (height & 0x3FFF, width & 0x3FFF)
            has_mark = code[3:6] == b"\x9d\x01\x2a"
        if not has_mark or size != self.shape[:2]:
            raise PayloadError(f"the frame must be {self.shape[:2]}, got {size} (coder {self.coder})")


def _scan_prefix(file: bytes) -> bytes:
    """A JPEG file up to where its entropy-coded data begin: ITU-T T.81, B.1.1.3: marker, length, parameters."""
    position = 2
    while True:
        marker, size = struct.unpack_from(">HH", file, position)
        position += 2 + size
        if marker == 0xFFDA:
            return file[:position]


class ImageCodec:
    """The input picture itself: one uint8 tensor (H, W, 3) or (H, W, 1)."""

    bytes_how: BytesHow = "measured"

    def __init__(self, spec: CodecSpec, crossing: tuple[TensorSpec, ...], fingerprint: int) -> None:
        tensor = crossing[0]
        if len(crossing) != 1 or tensor.dtype != "uint8" or len(tensor.shape) != 3 or tensor.shape[2] not in (1, 3):
            given = ", ".join(f"{t.dtype} {t.shape}" for t in crossing)
            raise CodecError(
                f'an image codec takes one uint8 (H, W, 3) or (H, W, 1), got {given} (codec "{spec.name}")'
            )
        self.spec = spec
        self.crossing: tuple[TensorSpec, ...] = crossing
        shape = tensor.shape if tensor.shape[2] == 3 else tensor.shape[:2]
        self._format = PictureFormat(spec.coder, spec.quality, shape)
        self._fingerprint = fingerprint ^ self._format.header_mark
        # A JPEG of another encoder has another header, so that it comes whole.
        self._coders = (spec.coder, "jpeg") if spec.coder == "jpeg-bare" else (spec.coder,)

    def encode(self, arrays: Arrays) -> bytes:
        """See Codec."""
        check_arrays(self.crossing, arrays, one=True)
        code = self._format.encode(arrays[0].reshape(self._format.shape))
        return payload.pack(self.spec.coder, self._fingerprint, code)

    def decode(self, data: bytes) -> tuple[NDArray[Any], ...]:
        """See Codec."""
        coder, code = payload.unpack(
            data,
            fingerprint=self._fingerprint,
            coders=self._coders,
            max_code_bytes=self._format.max_code_bytes,
        )
        pixels = self._format.decode(code) if coder == self.spec.coder else self._format.load(code)
        return (pixels.reshape(1, *self.crossing[0].shape),)

    def wrap(self, file: bytes) -> bytes:
        """The payload of a whole picture file, as other programs write them; `decode` says whether it is one.

        Raises:
            PayloadError: it is not of this codec's format, or longer than a picture of this size may be.
        """
        code = self._format.code_of(file)
        if len(code) > self._format.max_code_bytes:
            raise PayloadError(f"a picture file may have {self._format.max_code_bytes} B, got {len(file)} B")
        return payload.pack(self._coders[-1], self._fingerprint, code)

    def roundtrip(self, arrays: Arrays) -> tuple[tuple[NDArray[Any], ...], NDArray[np.float64]]:
        """See Codec; every picture is coded, and decoded where the format loses something."""
        check_arrays(self.crossing, arrays, one=False)
        pictures = arrays[0].reshape(-1, *self._format.shape)
        codes = [self._format.encode(pixels) for pixels in pictures]
        num_bytes = np.array([payload.HEADER_BYTES + len(code) for code in codes], dtype=np.float64)
        if self.spec.coder in LOSSLESS:
            return (arrays[0],), num_bytes
        restored = np.empty_like(pictures)
        for index, code in enumerate(codes):
            restored[index] = self._format.decode(code)
        return (restored.reshape(arrays[0].shape),), num_bytes
