"""Pictures for a bundle from what `--data` names.

    evaluate   the held-out test part of a source, all of the bundle's size, as one array
    run        requests one after another, as a device meets them: every picture below a folder, the
               rows of a .npy file, the test part of any other source, or pictures as they come (LIVE)
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import DataError
from ..plan import TensorSpec
from .options import LIVE

if TYPE_CHECKING:
    from ..data import Images
    from ..data.live import Frame, Size, Stop


class Request(NamedTuple):
    """One picture (H, W, C), where it comes from, and its class where that is known."""

    pixels: NDArray[Any]
    name: str
    label: int | None


def test_images(source: str, bundle: Bundle, *, limit: int | None, data_dir: Path | None) -> Images:
    """`limit` pictures drawn from the source's test part (all by default), their labels by the bundle's classes.

    The bundle's own source has the parts that it was built with.

    Raises:
        DataError: there is no such source, its pictures do not have the shape that the bundle takes, or it has
            classes that the bundle does not know.
    """
    from ..data import Images, load_source

    manifest = bundle.manifest
    wanted = manifest.input
    if source.endswith(".npy"):
        return Images(_load_array(Path(source), wanted)[:limit], None)
    if wanted.dtype != "uint8" or len(wanted.shape) != 3:
        raise DataError(
            f'this bundle takes {wanted.dtype} {_text(wanted.shape)}, not pictures: give a .npy file, got "{source}"'
        )
    height, width, channels = wanted.shape
    is_own = _absolute(source) == _absolute(manifest.data)
    found = load_source(
        source,
        data_dir=data_dir,
        size=(height, width),
        channels=channels,
        holdout=manifest.holdout if is_own else None,
        labels=not (is_own and manifest.is_agreement),
    )
    images = found.images("test") if limit is None else found.drawn("test", limit)
    if images.labels is None or found.classes == manifest.classes:
        return images
    unknown = [name for name in found.classes if name not in manifest.classes]
    if unknown:
        raise DataError(f'classes {", ".join(unknown[:5])} of data "{source}" are none of the bundle\'s')
    places = np.array([manifest.classes.index(name) for name in found.classes], dtype=np.int64)
    return Images(images.pixels, places[images.labels])


def _absolute(source: str) -> str:
    """A folder by its absolute path, as a build keeps it; other sources as they are."""
    if not source.startswith("folder:"):
        return source
    return f"folder:{Path(source.removeprefix('folder:')).expanduser().resolve()}"


def requests(
    source: str, bundle: Bundle, *, limit: int | None, data_dir: Path | None, stop: Stop | None = None
) -> Iterator[Request]:
    """The first `limit` requests that the source brings, read as they are asked for, until `stop` is set.

    A picture of a folder or a stream is scaled and cropped to the bundle's size; its class is the name of its folder,
    where the bundle knows a class of that name.  Live sources (`LIVE`) give each request when it is there; what of
    theirs is no picture is a line in the log, see `data.live`.

    Raises:
        DataError: at once where there is nothing to read, while iterating where a picture cannot be read.
    """
    found = islice(_requests(source, bundle, stop, data_dir), limit)
    return found if stop is None else _until(stop, found)


def _until(stop: Stop, found: Iterator[Request]) -> Iterator[Request]:
    """What is found until then; what is only found by then is not taken."""
    while not stop.is_set and (request := next(found, None)) is not None and not stop.is_set:
        yield request


def _requests(source: str, bundle: Bundle, stop: Stop | None, data_dir: Path | None) -> Iterator[Request]:
    if source.startswith("folder:"):
        return _folder(_path_of(source), bundle)
    kind = source.partition(":")[0]
    if kind in ("stdin", "mjpeg", "watch"):
        return _live(source, bundle, stop)
    images = test_images(source, bundle, limit=None, data_dir=data_dir)
    labels = [None] * len(images) if images.labels is None else images.labels.tolist()
    rows = zip(images.pixels, labels, strict=True)
    return (Request(pixels, f"{source}#{row}", label) for row, (pixels, label) in enumerate(rows))


def _path_of(source: str) -> Path:
    """What stands behind a source's first colon."""
    return Path(source.partition(":")[2]).expanduser()


def _folder(path: Path, bundle: Bundle) -> Iterator[Request]:
    from ..data.folder import SUFFIXES, read_picture

    size = _size_of(bundle)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"no pictures in folder {path}" if path.is_dir() else f"there is no folder {path}")
    return (
        Request(
            read_picture(file, size=(size.height, size.width), channels=size.channels),
            str(file),
            _class_of(file, bundle),
        )
        for file in files
    )


def _live(source: str, bundle: Bundle, stop: Stop | None) -> Iterator[Request]:
    """Requests as they come, their classes known where their files' folders have the names of classes."""
    frames = _frames(source, bundle, stop)
    return (Request(pixels, name, _class_of(Path(name), bundle)) for name, pixels in frames)


def _frames(source: str, bundle: Bundle, stop: Stop | None) -> Iterator[Frame]:
    from ..data.live import mjpeg_frames, path_frames, raw_frames, watched_frames

    if source == "stdin:raw":
        return raw_frames(_stdin(), source, bundle.manifest.input, stop=stop)
    size = _size_of(bundle)
    if source == "stdin:mjpeg":
        return mjpeg_frames(_stdin(), source, size, stop=stop)
    if source == "stdin:paths":
        return path_frames(_stdin(), source, size, stop=stop)
    kind, _, path = source.partition(":")
    if kind == "stdin" or not path:
        raise DataError(f'a live source is one of {", ".join(LIVE)}, got "{source}"')
    if kind == "watch":
        return watched_frames(_path_of(source), size, wait=time.sleep if stop is None else stop.wait)
    return _of_file(source, size, stop)


def _of_file(source: str, size: Size, stop: Stop | None) -> Iterator[Frame]:
    """The pictures of a file, a pipe with a name, or a camera's device; opened when the first is asked for."""
    path = _path_of(source)
    if not path.exists() or path.is_dir():
        raise DataError(f'{"there is no file" if not path.exists() else "this is a folder:"} {path} (data "{source}")')

    def frames() -> Iterator[Frame]:
        from ..data.live import mjpeg_frames

        # A pipe that nobody writes to yet is waited for where it is read.
        with open(path, "rb", buffering=0, opener=_opened) as file:
            yield from mjpeg_frames(file.fileno(), source, size, stop=stop)

    return frames()


def _opened(path: str, flags: int) -> int:
    is_pipe = stat.S_ISFIFO(os.stat(path).st_mode)
    return os.open(path, flags | (os.O_NONBLOCK if is_pipe else 0))


def _stdin() -> int:
    """Standard input's descriptor.

    Raises:
        DataError: it is closed, or a terminal.
    """
    from ..data.live import STDIN

    try:
        is_terminal = os.isatty(STDIN) or stat.S_ISDIR(os.fstat(STDIN).st_mode)
    except OSError as error:
        raise DataError("standard input is closed: give it a stream, such as ffmpeg ... - | coinfer run ...") from error
    if is_terminal:
        raise DataError("standard input is a terminal: give it a stream, such as ffmpeg ... - | coinfer run ...")
    return STDIN


def _size_of(bundle: Bundle) -> Size:
    """What pictures are scaled to.

    Raises:
        DataError: the bundle does not take pictures.
    """
    from ..data.live import Size

    wanted = bundle.manifest.input
    if wanted.dtype != "uint8" or len(wanted.shape) != 3:
        raise DataError(f"this bundle takes {wanted.dtype} {_text(wanted.shape)}, not pictures: give a .npy file")
    height, width, channels = wanted.shape
    if channels not in (1, 3):
        raise DataError(f"this bundle takes {channels} channels, a picture has 1 or 3: give a .npy file")
    return Size(height, width, channels)


def _class_of(file: Path, bundle: Bundle) -> int | None:
    classes = bundle.manifest.classes
    return classes.index(file.parent.name) if file.parent.name in classes else None


def _load_array(path: Path, wanted: TensorSpec) -> NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is not an array that numpy.save wrote: {error}") from error
    if array.ndim == len(wanted.shape):
        array = array[None]
    if array.dtype.name != wanted.dtype or array.shape[1:] != wanted.shape or len(array) == 0:
        raise DataError(
            f"{path} must hold {wanted.dtype} N x {_text(wanted.shape)} with N at least 1, "
            f"got {array.dtype.name} {_text(array.shape)} (bundle {wanted.name})"
        )
    return np.asarray(array)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
