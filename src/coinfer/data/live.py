"""Pictures as they come: from a camera's stream, from raw frames, from names of files, from a folder that fills.

    mjpeg_frames     JPEG pictures one behind another
    raw_frames       arrays of one size, nothing between them
    path_frames      one path of a picture file a line
    watched_frames   what a folder holds, then each picture that appears in it, for ever

Each gives a `Frame` as soon as its last byte is there and waits for nothing behind it.  What is no picture is one line
in the log ("coinfer.live") and passed over; of a stream of JPEGs the log's last line has their number.  Where a stream
ends, its other end is gone, or a `Stop` says so, the frames end.  Streams are read by descriptor, never through
Python's buffer: a thread that waits in it would keep a process from ending.
"""

from __future__ import annotations

import io
import logging
import math
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from ..plan import TensorSpec
from .folder import SUFFIXES, fit_picture, read_picture
from .mjpeg import MOST_BYTES, Broken, JpegSplitter

STDIN = 0
READ_BYTES = 65536
MOST_PIXELS = 1 << 25
MOST_PATH_BYTES = 4096
POLL_S = 0.2
_STEP_S, _LONGEST_S = 0.001, 3600.0
_LOG = logging.getLogger("coinfer.live")


class Frame(NamedTuple):
    """One picture (H, W, C) or array, and what it is called."""

    name: str
    pixels: NDArray[Any]


class Size(NamedTuple):
    """What pictures are scaled and cropped to."""

    height: int
    width: int
    channels: int


class Stop:
    """Says, from a signal's handler too, that no more is wanted: who waits for bytes or for time waits no longer.

    `waker`: a descriptor; a byte written to it ends the waiting as well.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._hears, self.waker = os.pipe()
        os.set_blocking(self.waker, False)

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._hears)
        os.close(self.waker)

    def set(self) -> None:
        """Say so."""
        if not self.is_set:
            self.is_set = True
            os.write(self.waker, b"\0")

    def wait(self, wait_s: float) -> bool:
        """Let so many seconds pass; True, at once, where no more is wanted."""
        end_s = time.monotonic() + wait_s
        while (left_s := end_s - time.monotonic()) > _STEP_S:
            # In whole milliseconds, and not too many at once.
            if _readable((self._hears,), min(left_s - _STEP_S, _LONGEST_S)):
                return True
        time.sleep(max(0.0, left_s))
        return self.is_set

    def allows(self, file: int) -> bool:
        """Wait for a byte of `file` or its end; False where no more is wanted."""
        return self._hears not in _readable((self._hears, file))


def _readable(files: tuple[int, ...], wait_s: float | None = None) -> list[int]:
    """Which of these have a byte, or have ended; waits for one."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [file for file, _ in poll.poll(None if wait_s is None else math.ceil(1e3 * wait_s))]


def mjpeg_frames(
    file: int, name: str, size: Size, *, most_bytes: int = MOST_BYTES, stop: Stop | None = None
) -> Iterator[Frame]:
    """The pictures of a stream of JPEGs, read from the descriptor `file`; the n-th is called `name`#n, from 0 on.

    A picture of more than `most_bytes` B, or of more than `MOST_PIXELS` pixels, is not decoded.
    """
    splitter, tally = JpegSplitter(most_bytes=most_bytes), _Tally(name)
    while data := _read(file, READ_BYTES, stop):
        for found in splitter.feed(data):
            yield from tally.frame(found, size)
    if stop is None or not stop.is_set:
        for found in splitter.end():
            yield from tally.frame(found, size)
    tally.end()


class _Tally:
    """Numbers the pictures of a stream, and counts the broken ones."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = self._num_broken = 0

    def frame(self, found: bytes | Broken, size: Size) -> Iterator[Frame]:
        """The frame of a picture, if it is one."""
        number, self._number = self._number, self._number + 1
        if isinstance(found, Broken):
            self.skip(f"{found.why} ({found.num_bytes} B)")
            return
        try:
            pixels = _decoded(found, size)
        except DataError as error:
            self.skip(str(error))
            return
        yield Frame(f"{self._name}#{number}", pixels)

    def skip(self, why: str) -> None:
        """Log why there is no picture, and count it."""
        self._num_broken += 1
        _LOG.warning("%s: picture %d is passed over: %s", self._name, self._number - 1, " ".join(why.split()))

    def end(self) -> None:
        """Log how many there were."""
        if self._num_broken:
            _LOG.warning("%s: %d of %d pictures were passed over", self._name, self._num_broken, self._number)


def _decoded(data: bytes, size: Size) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"a picture has at most {MOST_PIXELS} pixels, got {image.width} x {image.height}")
            return fit_picture(image, size=(size.height, size.width), channels=size.channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{len(data)} B that are no JPEG picture") from error


def raw_frames(file: int, name: str, spec: TensorSpec, *, stop: Stop | None = None) -> Iterator[Frame]:
    """Arrays of `spec`, C order, little endian, one behind another; the n-th is called `name`#n, from 0 on.

    A last one that is not whole is a line in the log.
    """
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    for number in count():
        data = _read_whole(file, spec.num_bytes, stop)
        if len(data) < spec.num_bytes:
            if data and (stop is None or not stop.is_set):
                _LOG.warning("%s: frames have %d B, the last one has %d B", name, spec.num_bytes, len(data))
            return
        yield Frame(f"{name}#{number}", np.frombuffer(data, dtype).astype(spec.dtype, copy=False).reshape(spec.shape))


def path_frames(file: int, name: str, size: Size, *, stop: Stop | None = None) -> Iterator[Frame]:
    """The pictures of the files that the lines of the descriptor `file` name, each called by its path.

    Empty lines are passed over in silence, lines of more than `MOST_PATH_BYTES` B and what cannot be read with a line
    in the log.
    """
    for line in _lines(file, name, stop):
        path = Path(os.fsdecode(line))
        try:
            pixels = read_picture(path, size=(size.height, size.width), channels=size.channels)
        except DataError as error:
            _LOG.warning("%s: passed over: %s", name, " ".join(str(error).split()))
            continue
        yield Frame(str(path), pixels)


def _lines(file: int, name: str, stop: Stop | None) -> Iterator[bytes]:
    """Each line as it is complete, without its end; the last may lack one."""
    data = bytearray()
    is_too_long = False
    while True:
        more = _read(file, READ_BYTES, stop)
        if stop is not None and stop.is_set:
            return
        data += more or b"\n"
        *whole, rest = bytes(data).split(b"\n")
        for line in whole:
            if is_too_long or len(line) > MOST_PATH_BYTES:
                _LOG.warning("%s: passed over: a path has at most %d B", name, MOST_PATH_BYTES)
            elif line.strip():
                yield line.rstrip(b"\r")
            is_too_long = False
        data[:] = rest
        if len(data) > MOST_PATH_BYTES:
            data.clear()
            is_too_long = True
        if not more:
            return


def watched_frames(
    folder: Path,
    size: Size,
    *,
    poll_s: float = POLL_S,
    wait: Callable[[float], bool | None] = time.sleep,
) -> Iterator[Frame]:
    """The pictures below `folder` in the order of their paths, then each that appears, in the order of their times.

    A file is read when it has stayed as it is from one look to the next, or for `poll_s` already: whoever writes slower
    writes under another name (one that begins with a dot, or has another suffix) and renames.  A file that is written
    anew is a new picture.  What cannot be read is a line in the log.  Folders with a dot in front are left out.  `wait`
    passes the seconds between two looks; True ends it.

    Raises:
        DataError: at once where there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    return _watched(folder, size, poll_s, wait)


def _watched(folder: Path, size: Size, poll_s: float, wait: Callable[[float], bool | None]) -> Iterator[Frame]:
    before: dict[str, _Stamp] = {}
    given: dict[str, _Stamp] = {}
    for look in count():
        now = _pictures_in(folder)
        settled_ns = time.time_ns() - round(1e9 * poll_s)
        is_new = {name: given.get(name) != stamp for name, stamp in now.items()}
        whole = [name for name in now if is_new[name] and (before.get(name) == now[name] or now[name][0] < settled_ns)]
        # Files that are gone are forgotten, so that what is known does not grow.
        given = {name: stamp for name, stamp in given.items() if name in now} | {name: now[name] for name in whole}
        for name in sorted(whole, key=lambda name: (_AT_FIRST if look == 0 else now[name], name)):
            try:
                yield Frame(name, read_picture(Path(name), size=(size.height, size.width), channels=size.channels))
            except DataError as error:
                _LOG.warning("watch:%s: passed over: %s", folder, " ".join(str(error).split()))
        before = now
        if wait(poll_s):
            return


# Of a file: when it was changed, its size, its number.
_Stamp = tuple[int, int, int]
_AT_FIRST: _Stamp = (0, 0, 0)


def _pictures_in(folder: Path) -> dict[str, _Stamp]:
    """The picture files below a folder as they are; one that cannot be looked into has none."""
    found: dict[str, _Stamp] = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            path = os.path.join(root, name)
            try:
                facts = os.stat(path)
            except OSError:
                # Gone since, or a link to nothing.
                continue
            if stat.S_ISREG(facts.st_mode) and facts.st_size:
                found[path] = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
    return found


def _read(file: int, most_bytes: int, stop: Stop | None) -> bytes:
    """What is there, at least a byte; nothing at the end, or where the other end is gone or no more is wanted."""
    try:
        # A named pipe nobody has written to yet has no end to be read.
        is_wanted = stop.allows(file) if stop is not None else _readable((file,))
        return os.read(file, most_bytes) if is_wanted else b""
    except OSError as error:
        _LOG.warning("the stream ended: %s", (error.strerror or str(error)).lower())
        return b""


def _read_whole(file: int, num_bytes: int, stop: Stop | None) -> bytearray:
    """So many bytes, fewer at the end."""
    data = bytearray()
    while len(data) < num_bytes and (more := _read(file, num_bytes - len(data), stop)):
        data += more
    return data
