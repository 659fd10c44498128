"""The six bytes in front of every code, and the check of a payload before anything is done with it.

    0   u8   version (high 4 bits) and coder (low 4 bits)
    1   u8   fingerprint of codec, crossing tensors and tables: both ends must hold the same
    2   u32  CRC-32 of the two bytes above and the code, little endian
    6        the code

A CRC-32 finds every single bit flip and every burst of up to 32 bits; it is no protection against
somebody who means it (the link's TLS and token are), so that a code is never trusted in its sizes: how
long it may be follows from the codec alone.
"""

from __future__ import annotations

import struct
import zlib

from ..errors import PayloadError

HEADER_BYTES = 6
VERSION = 1
_HEAD = struct.Struct("<BB")
_CRC = struct.Struct("<I")

# How the code was made.  `range` in a CodecSpec may become "range" or "wide", `rans` "wide" or "lanes".
CODER_NUMBERS = {
    "none": 0,
    "zstd": 1,
    "range": 2,
    "wide": 3,
    "lanes": 4,
    "png": 5,
    "webp-lossless": 6,
    "webp": 7,
    "jpeg": 8,
    "jpeg-bare": 9,
}
_CODER_NAMES = {number: name for name, number in CODER_NUMBERS.items()}


def pack(coder: str, fingerprint: int, code: bytes) -> bytes:
    """A payload: header and code."""
    head = _HEAD.pack(VERSION << 4 | CODER_NUMBERS[coder], fingerprint)
    return head + _CRC.pack(zlib.crc32(code, zlib.crc32(head))) + code


def unpack(payload: bytes, *, fingerprint: int, coders: tuple[str, ...], max_code_bytes: int) -> tuple[str, bytes]:
    """The coder's name and the code of a checked payload.

    Raises:
        PayloadError: too short or too long, another version, another codec's or coder's, or altered.
    """
    if not HEADER_BYTES <= len(payload) <= HEADER_BYTES + max_code_bytes:
        raise PayloadError(
            f"a payload must have {HEADER_BYTES} to {HEADER_BYTES + max_code_bytes} B, got {len(payload)} B"
        )
    first, mark = _HEAD.unpack_from(payload)
    (crc,) = _CRC.unpack_from(payload, _HEAD.size)
    code = bytes(payload[HEADER_BYTES:])
    if zlib.crc32(code, zlib.crc32(payload[: _HEAD.size])) != crc:
        raise PayloadError(f"the payload of {len(payload)} B was altered on the way: its CRC does not match")
    if first >> 4 != VERSION:
        raise PayloadError(f"payload version must be {VERSION}, got {first >> 4}")
    coder = _CODER_NAMES.get(first & 15, str(first & 15))
    if coder not in coders:
        raise PayloadError(f'coder must be {" or ".join(coders)}, got "{coder}"')
    if mark != fingerprint:
        raise PayloadError(f"the payload is for another codec, cut or tables: mark {mark}, this has {fingerprint}")
    return coder, code
