"""The six bytes in front of every code."""

from __future__ import annotations

import pytest

from coinfer.codec.payload import CODER_NUMBERS, HEADER_BYTES, pack, unpack
from coinfer.errors import PayloadError


def test_header_is_six_bytes_and_pinned() -> None:
    assert HEADER_BYTES == 6
    assert pack("range", 0xAB, b"code").hex() == "12ab" + "30437aae" + "636f6465"


def test_a_payload_comes_back() -> None:
    for coder in CODER_NUMBERS:
        payload = pack(coder, 7, b"12345")
        assert unpack(payload, fingerprint=7, coders=("x", coder), max_code_bytes=5) == (coder, b"12345")


def test_every_coder_has_a_number_of_four_bits_of_its_own() -> None:
    assert sorted(CODER_NUMBERS.values()) == list(range(len(CODER_NUMBERS)))
    assert len(CODER_NUMBERS) <= 16


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "6 to 9 B, got 0 B"),
        (b"12345", "6 to 9 B, got 5 B"),
        (pack("none", 7, b"1234"), "6 to 9 B, got 10 B"),
        (pack("none", 7, b"123")[:-1] + b"4", "altered"),
        (pack("zstd", 7, b"123"), 'coder must be none or range, got "zstd"'),
        (pack("none", 8, b"123"), "mark 8, this has 7"),
    ],
)
def test_what_is_not_this_codecs_payload_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        unpack(payload, fingerprint=7, coders=("none", "range"), max_code_bytes=3)


def test_another_version_is_refused() -> None:
    import struct
    import zlib

    head = bytes([2 << 4, 7])
    payload = head + struct.pack("<I", zlib.crc32(head))
    with pytest.raises(PayloadError, match="version must be 1, got 2"):
        unpack(payload, fingerprint=7, coders=("none",), max_code_bytes=3)
