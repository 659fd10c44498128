"""What a picture's file may hold before a decoder sees it: just what this project's encoders write.

Both formats allow a small file that costs its reader much.  A PNG's text and profile chunks are unpacked, up to 64 MB
of them, whatever the picture's size; a progressive JPEG may come in thousands of scans of a few bytes, each of which
walks the whole picture.  Neither is ever sent, so neither is read.

    PNG    signature | IHDR | IDAT ... | IEND
    JPEG   SOI | tables, APPn, comments, one SOF0 (baseline) | one SOS with all components | data that are not looked at

Lengths are followed, nothing is searched, nothing is allocated.
"""

from __future__ import annotations

import struct

from ..errors import PayloadError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"IDAT", b"IEND")
_CRC_BYTES = 4
_CHUNK = struct.Struct(">I4s")
_SOI, _SOF0, _SOS = 0xFFD8, 0xFFC0, 0xFFDA
_SEGMENT = struct.Struct(">HH")
# Tables, restart intervals, applications' data and comments.
_TABLES = (0xFFDB, 0xFFC4, 0xFFDD, *range(0xFFE0, 0xFFF0), 0xFFFE)
# Of SOF0, behind marker and length: precision u8, height u16, width u16; then the number of components.
_SOF_COMPONENTS, _SOS_COMPONENTS = 9, 4


def check_png(file: bytes) -> None:
    """Raise PayloadError where a PNG has chunks other than its picture's."""
    position = len(_PNG_SIGNATURE)
    if not file.startswith(_PNG_SIGNATURE):
        raise PayloadError(f"{len(file)} B that are no PNG picture: another signature")
    while position + _CHUNK.size <= len(file):
        size, name = _CHUNK.unpack_from(file, position)
        if name not in _PNG_CHUNKS:
            raise PayloadError(f"a PNG picture has chunks IHDR, IDAT, IEND, got {name!r}")
        position += _CHUNK.size + size + _CRC_BYTES


def check_jpeg(file: bytes) -> None:
    """Raise PayloadError where a JPEG is not baseline with all of its components in one scan."""
    position, components = 2, 0
    while position + _SEGMENT.size < len(file):
        marker, size = _SEGMENT.unpack_from(file, position)
        if marker == _SOF0 and components == 0 and size > _SOF_COMPONENTS - 2:
            components = file[position + _SOF_COMPONENTS] if position + _SOF_COMPONENTS < len(file) else 0
        elif marker == _SOS:
            if components == 0 or file[position + _SOS_COMPONENTS] != components:
                break
            return
        elif marker not in _TABLES:
            raise PayloadError(f"a JPEG picture is baseline, got marker {marker:04x} at byte {position}")
        position += 2 + size
    raise PayloadError(f"{len(file)} B that are no JPEG picture of one scan")


def bare_png(file: bytes) -> bytes:
    """A PNG without the chunks that are not its picture's: other programs add texts, profiles, sizes in print.

    What is cut short, or no PNG, is left as it is: `check_png` or the decoder says so.
    """
    if not file.startswith(_PNG_SIGNATURE):
        return file
    position = len(_PNG_SIGNATURE)
    kept = [_PNG_SIGNATURE]
    while position + _CHUNK.size <= len(file):
        size, name = _CHUNK.unpack_from(file, position)
        end = position + _CHUNK.size + size + _CRC_BYTES
        if name in _PNG_CHUNKS or end > len(file):
            kept.append(file[position:end])
        position = end
    return b"".join(kept)
