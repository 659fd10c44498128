"""Features as pictures: 8-bit symbols of all channels tiled to one grey picture, through an image format.

This is how the papers of this field send features (BottleNet and others: JPEG).  It is here to be compared
with: an image format's own model knows nothing of channels, and its headers cost more than many features.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from ..plan import CodecSpec, TensorSpec
from . import payload
from .contract import Arrays, BytesHow, check_arrays
from .image import LOSSY, PictureFormat, Pixels
from .tables import Tables
from .uniform import Quantiser, check_tables


class Tiling:
    """Channels laid out as one grey picture, and back.

    C channels make 2^ceil(log2(C) / 2) columns of tiles (Eshratifar et al., 2019, BottleNet, arXiv:1902.01000,
    section 3.2) and as many rows as it takes, the last filled up with zeros.  (T, C) is one picture as it is.
    """

    def __init__(self, tensor: TensorSpec) -> None:
        shape = tensor.shape
        channels = 1 if len(shape) in (0, 2) else shape[0]
        tile = shape if len(shape) == 2 else shape[1:]
        self._tile = (int(np.prod(tile[:-1])), tile[-1]) if tile else (1, 1)
        self._channels = channels
        self._columns = 1 << -(-(channels - 1).bit_length() // 2)
        self._rows = -(-channels // self._columns)
        self._tensor = tensor
        self.shape = (self._rows * self._tile[0], self._columns * self._tile[1])

    def picture(self, symbols: Pixels) -> Pixels:
        """(H, W) of symbols in the tensor's own shape."""
        height, width = self._tile
        tiles = np.zeros((self._rows * self._columns, height, width), np.uint8)
        tiles[: self._channels] = symbols.reshape(self._channels, height, width)
        grid = tiles.reshape(self._rows, self._columns, height, width).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(grid).reshape(self.shape)

    def symbols(self, picture: Pixels) -> Pixels:
        """The inverse of `picture`, in the tensor's own shape."""
        height, width = self._tile
        tiles = picture.reshape(self._rows, height, self._columns, width).transpose(0, 2, 1, 3)
        return tiles.reshape(-1, height, width)[: self._channels].reshape(self._tensor.shape)


class PictureCodec:
    """Features in 8 bits, tiled to one grey picture for each tensor, through an image format."""

    bytes_how: BytesHow = "measured"

    def __init__(self, spec: CodecSpec, crossing: tuple[TensorSpec, ...], tables: Tables, fingerprint: int) -> None:
        check_tables(spec, crossing, tables)
        if spec.coder == "none":
            raise CodecError(f'a picture codec\'s coder must be an image format, got "none" (codec "{spec.name}")')
        self.spec, self.crossing, self.tables, self._fingerprint = spec, crossing, tables, fingerprint
        self._quantisers = [Quantiser(t, table) for t, table in zip(crossing, tables.tensors, strict=True)]
        self._tilings = [Tiling(tensor) for tensor in crossing]
        self._formats = [PictureFormat(spec.coder, spec.quality, tiling.shape) for tiling in self._tilings]
        self._max_code_bytes = sum(4 + one.max_code_bytes for one in self._formats)

    def encode(self, arrays: Arrays) -> bytes:
        """See Codec."""
        check_arrays(self.crossing, arrays, one=True)
        code = join_codes(self._codes([q.pixels(array)[0] for q, array in zip(self._quantisers, arrays, strict=True)]))
        return payload.pack(self.spec.coder, self._fingerprint, code)

    def decode(self, data: bytes) -> tuple[NDArray[Any], ...]:
        """See Codec."""
        _, code = payload.unpack(
            data, fingerprint=self._fingerprint, coders=(self.spec.coder,), max_code_bytes=self._max_code_bytes
        )
        pixels = self._pixels(split_codes(code, len(self.crossing)))
        return tuple(q.restored(one[None]) for q, one in zip(self._quantisers, pixels, strict=True))

    def roundtrip(self, arrays: Arrays) -> tuple[tuple[NDArray[Any], ...], NDArray[np.float64]]:
        """See Codec; every sample is coded, and decoded where the format loses something."""
        check_arrays(self.crossing, arrays, one=False)
        batches = [q.pixels(array) for q, array in zip(self._quantisers, arrays, strict=True)]
        num_bytes = np.empty(len(arrays[0]))
        for n in range(len(num_bytes)):
            codes = self._codes([batch[n] for batch in batches])
            num_bytes[n] = payload.HEADER_BYTES + len(join_codes(codes))
            if self.spec.coder in LOSSY:
                for batch, pixels in zip(batches, self._pixels(codes), strict=True):
                    batch[n] = pixels
        return tuple(q.restored(batch) for q, batch in zip(self._quantisers, batches, strict=True)), num_bytes

    def _codes(self, pixels: Sequence[Pixels]) -> list[bytes]:
        parts = zip(self._formats, self._tilings, pixels, strict=True)
        return [one.encode(tiling.picture(array)) for one, tiling, array in parts]

    def _pixels(self, codes: Sequence[bytes]) -> list[Pixels]:
        parts = zip(self._formats, self._tilings, codes, strict=True)
        return [tiling.symbols(one.decode(code)) for one, tiling, code in parts]


def join_codes(codes: Sequence[bytes]) -> bytes:
    """Codes one after the other, each but the last with its length (u32, little endian) in front."""
    return b"".join(struct.pack("<I", len(code)) + code for code in codes[:-1]) + codes[-1]


def split_codes(code: bytes, count: int) -> list[bytes]:
    """The inverse of `join_codes`.

    Raises:
        PayloadError: a length leads beyond the end.
    """
    codes, start = [], 0
    for _ in range(count - 1):
        size = int.from_bytes(code[start : start + 4], "little")
        if start + 4 + size > len(code):
            raise PayloadError(f"a picture of {size} B does not fit into a code of {len(code)} B")
        codes.append(code[start + 4 : start + 4 + size])
        start += 4 + size
    return [*codes, code[start:]]
