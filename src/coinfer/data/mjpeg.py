"""A stream of JPEG pictures one behind another, as cameras and `ffmpeg -f mjpeg` give it, cut into pictures.

A picture's end is found by following its markers and the lengths behind them (ITU-T T.81, B.1), as a decoder does:

    SOI | marker length parameters | ... | SOS length parameters | entropy-coded data | marker ... | EOI

Looking for the bytes of EOI alone would end a picture at the end of the thumbnail in its metadata.  In entropy-coded
data FF is followed by 00, or by a restart marker; anything else is the next marker.  What lies between pictures, such
as the headers of a multipart stream, is passed over.

    splitter = JpegSplitter()
    for picture in splitter.feed(data):     # bytes of a whole picture, or a Broken that says why there is none

A picture that is cut short, that leads nowhere or grows beyond `most_bytes` is one `Broken`; the search goes on for the
next start behind the broken one's, so that a wrong length costs no picture but its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MOST_BYTES = 16 << 20
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_START = b"\xff\xd8\xff"
_STANDALONE = {0x01, *range(0xD0, 0xD8)}


class Broken(NamedTuple):
    """Why `num_bytes` of a stream are no picture."""

    why: str
    num_bytes: int


class JpegSplitter:
    """Bytes in, pictures out; holds no more than one picture and what came behind it in the same call.

    Args:
        most_bytes: of one picture; a longer one is broken.
    """

    def __init__(self, *, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._data = bytearray()
        # Where to go on reading; 0 while no picture has begun.
        self._place = 0
        self._is_scan = False

    def feed(self, data: bytes) -> Iterator[bytes | Broken]:
        """The pictures that are whole with these bytes."""
        self._data += data
        while self._place or self._begin():
            found = self._scan() if self._is_scan else self._marker()
            if found is None and len(self._data) <= self._most_bytes:
                return
            if found is None or (isinstance(found, int) and found > self._most_bytes):
                found = Broken(f"a picture has at most {self._most_bytes} B", found or len(self._data))
            if isinstance(found, Broken):
                # The start itself is passed over, nothing behind it.
                self._drop(len(_START) - 1)
                yield found
            elif found:
                picture = bytes(self._data[:found])
                self._drop(found)
                yield picture

    def end(self) -> Iterator[bytes | Broken]:
        """What is left when the stream has ended in the middle of a picture, or of what a wrong length took for one."""
        while self._place:
            yield Broken("the stream ended in the middle of a picture", len(self._data))
            self._drop(len(_START) - 1)
            yield from self.feed(b"")

    def _begin(self) -> bool:
        """Whether a picture begins; what lies before it is let go."""
        start = self._data.find(_START)
        # The start may be cut in two.
        self._drop(start if start >= 0 else max(0, len(self._data) - len(_START) + 1))
        if start < 0:
            return False
        self._place = len(_START) - 1
        return True

    def _drop(self, count: int) -> None:
        del self._data[:count]
        self._place, self._is_scan = 0, False

    def _marker(self) -> int | Broken | None:
        """Go past one marker: 0 where more follow, the end where it was the last, None where bytes are missing."""
        data, place = self._data, self._place
        if place >= len(data):
            return None
        if data[place] != 0xFF:
            return Broken(f"there is no marker at byte {place}", place)
        while place < len(data) and data[place] == 0xFF:
            place += 1
        if place >= len(data):
            # Padding may go on; it is not read again.
            self._place = len(data) - 1
            return None
        code = data[place]
        if code == _EOI:
            return place + 1
        if code in _STANDALONE:
            self._place = place + 1
            return 0
        if code in (0x00, _SOI):
            return Broken(f"another picture begins at byte {place}, before its end", place)
        if place + 3 > len(data):
            return None
        size = int.from_bytes(data[place + 1 : place + 3], "big")
        if size < 2:
            return Broken(f"a length of {size} B at byte {place}", place)
        # Beyond what is there it waits until that has come.
        self._place = place + 1 + size
        self._is_scan = code == _SOS
        return 0

    def _scan(self) -> int | None:
        """Go past entropy-coded data: 0 where a marker follows, None where they go on."""
        data, place = self._data, self._place
        while (place := data.find(b"\xff", place)) >= 0 and place + 1 < len(data):
            code = data[place + 1]
            if code == 0xFF:
                place += 1
            elif code == 0x00 or 0xD0 <= code <= 0xD7:
                place += 2
            else:
                self._place, self._is_scan = place, False
                return 0
        self._place = max(self._place, len(data)) if place < 0 else place
        return None
